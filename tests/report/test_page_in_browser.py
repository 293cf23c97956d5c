"""The page as a person meets it: in Chromium, with mouse and keyboard, wide and narrow, light and dark."""

from dataclasses import replace
from pathlib import Path

import pytest
from chromium import Chromium
from page_examples import make_content, make_incoherence, without_verdict

from viditq.report.page import write_page

CARD = "document.querySelectorAll('.pair')[{}]"
ROOT = "document.documentElement.dataset."
# A copy is read, since reading the page's own canvases would change how the browser keeps them.
BYTES_OF = """
window.bytesOf = (canvas) => {
  const copy = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  return [...copy.getImageData(0, 0, 32, 32).data];
}; true
"""
# The lowest ratios of contrast between text and what lies behind it (as WCAG defines them), with their elements.
LOWEST_CONTRASTS = """
(() => {
  const linear = (v) => v <= 10 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const parse = (css) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = css;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color[3] === 255) return color;
    }
  };
  document.querySelectorAll('details').forEach((d) => { d.open = true; });
  const texts = document.querySelectorAll('h1,h2,h3,p,a,dt,dd,th,td,small,.pill,button,figcaption,.layer,pre');
  return [...texts].filter((e) => e.textContent.trim()).map((e) => {
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), `${e.className} ${e.textContent.slice(0, 20)}`];
  }).sort((p, q) => p[0] - q[0]).slice(0, 3);
})()
"""
LONG = ["<script>window.stolen = 1</script><img src=x onerror='window.stolen=2'>", "x" * 2000, "דג אדום", "🦊 " * 300]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(make_content(count=4), tmp_path_factory.mktemp("video") / "report.html")


@pytest.fixture
def still(browser: Chromium, video: Path) -> Chromium:
    """The video page without autoplay."""
    return load(browser, video, height=5000, prefers_reduced_motion="reduce")  # all pairs in sight


def load(browser: Chromium, path: Path, width: int = 1280, height: int = 900, **media: str) -> Chromium:
    browser.open(path, width, height, **media)
    browser.wait(f"{ROOT}drawn === 'true'")
    browser.evaluate(BYTES_OF)
    return browser


def assert_clean(browser: Chromium) -> None:
    assert browser.messages == [] and browser.evaluate(f"{ROOT}error") is None
    assert all(url.startswith(("file:", "data:", "about:")) for url in browser.requests)


def colors(browser: Chromium, pair: int, canvas: int) -> list[int]:
    """All bytes of a canvas."""
    return browser.evaluate(f"bytesOf({CARD.format(pair)}.querySelectorAll('canvas')[{canvas}])")


def mode(browser: Chromium, pair: int) -> str:
    return browser.evaluate(f"{CARD.format(pair)}.dataset.mode")


def expected(pair: int, which: int, frame: int) -> list[int]:
    """The bytes of frame `frame` of pair `pair`'s float (0) or quantized (1) clip."""
    frame_CHW = make_content(count=4).pairs[pair].clips()[which][frame]
    return [*frame_CHW.permute(1, 2, 0).reshape(-1, 3).tolist()]


def rgb(values: list[int]) -> list[list[int]]:
    return [values[i : i + 3] for i in range(0, len(values), 4)]


def test_both_clips_of_every_pair_show_the_frame_of_the_clock(still):
    assert rgb(colors(still, 0, 0)) == expected(0, 0, 0)
    still.press("ArrowRight")
    still.press("ArrowRight")
    assert still.evaluate(f"{ROOT}frame") == "2"
    for pair in range(3):
        assert rgb(colors(still, pair, 0)) == expected(pair, 0, 2)
        assert rgb(colors(still, pair, 1)) == expected(pair, 1, 2)
    still.press("ArrowLeft")
    still.press("ArrowLeft")
    still.press("ArrowLeft")
    assert still.evaluate(f"{ROOT}frame") == "7", "it goes round"
    assert still.evaluate("document.getElementById('frame-words').textContent") == "8 / 8"
    assert_clean(still)


def test_it_plays_by_itself_and_space_stops_and_starts_it(browser, video):
    load(browser, video, prefers_reduced_motion="no-preference")
    browser.wait(f"Number({ROOT}frame) > 1")
    browser.press(" ")
    assert browser.evaluate("document.getElementById('play').textContent") == "Play"
    frame = browser.evaluate(f"{ROOT}frame")
    browser.evaluate("new Promise(done => setTimeout(done, 400))")
    assert browser.evaluate(f"{ROOT}frame") == frame
    browser.press(" ")
    browser.wait(f"{ROOT}frame !== '{frame}'")
    assert_clean(browser)


def test_reduced_motion_does_not_start_by_itself(still):
    assert still.evaluate("document.getElementById('play').textContent") == "Play"
    still.evaluate("new Promise(done => setTimeout(done, 400))")
    assert still.evaluate(f"{ROOT}frame") == "0"
    still.evaluate("document.getElementById('play').click()")
    still.wait(f"Number({ROOT}frame) > 1")


def test_t_flips_all_pairs_or_the_one_with_the_focus(still):
    still.press("t")
    assert {mode(still, i) for i in range(4)} == {"toggle"}
    assert rgb(colors(still, 0, 2)) == expected(0, 1, 0)
    still.press("t")
    assert rgb(colors(still, 0, 2)) == expected(0, 0, 0) and rgb(colors(still, 1, 2)) == expected(1, 0, 0)
    still.evaluate(f"{CARD.format(1)}.querySelector('[data-mode=toggle]').focus()")
    still.press("t")
    assert rgb(colors(still, 0, 2)) == expected(0, 0, 0) and rgb(colors(still, 1, 2)) == expected(1, 1, 0)
    assert still.evaluate(f"{CARD.format(1)}.querySelector('.single figcaption').textContent") == "quantized"


def test_difference_and_slider_show_both(still):
    still.press("4")
    a, b = expected(0, 0, 0), expected(0, 1, 0)
    amplified = [[min(255, 8 * abs(x - y)) for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]
    assert rgb(colors(still, 0, 2)) == amplified and max(map(max, amplified)) > 0
    still.press("3")
    still.evaluate(
        f"{{ const s = {CARD.format(0)}.querySelector('.split'); s.value = 25; s.dispatchEvent(new Event('input')); }}"
    )
    rows = rgb(colors(still, 0, 2))
    for y in range(32):
        row = rows[32 * y : 32 * y + 32]
        assert row == a[32 * y : 32 * y + 8] + b[32 * y + 8 : 32 * y + 32]
    still.press("1")
    assert mode(still, 0) == "side"
    assert still.evaluate(f"{CARD.format(0)}.querySelector('[data-mode=side]').getAttribute('aria-pressed')") == "true"
    assert_clean(still)


def test_typing_in_the_filter_is_not_taken_for_keys(still):
    still.evaluate("document.getElementById('filter').focus()")
    prompts = [pair.prompt for pair in make_content(count=4).pairs]
    word = prompts[0].split()[2]
    for letter in word:
        still.press(letter)
    assert still.evaluate("document.getElementById('filter').value") == word
    count = sum(word in prompt for prompt in prompts)
    assert still.evaluate("document.getElementById('shown').textContent") == f"{count} shown"
    assert still.evaluate("document.querySelectorAll('.pair:not([hidden])').length") == count
    still.press("t")
    assert mode(still, 0) == "side"


def test_sorting_by_another_metric(still):
    metrics = make_content(count=4).per_prompt["metrics"]
    drops = [q - f for q, f in zip(metrics["clipsim"], metrics["clipsim_float"], strict=True)]
    still.evaluate(
        "{ const s = document.getElementById('sort'); s.value = 'clipsim'; s.dispatchEvent(new Event('change')); }"
    )
    order = still.evaluate("[...document.querySelectorAll('.pair')].map(card => Number(card.dataset.pair))")
    assert order == sorted(range(4), key=lambda i: drops[i])


def test_every_control_is_reached_by_tab_and_shows_its_focus(still):
    seen = []
    for _ in range(120):
        still.press("Tab")
        seen.append(
            still.evaluate("(e => e.id || e.dataset.mode || e.textContent.trim().slice(0, 20))(document.activeElement)")
        )
        outline = still.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or still.evaluate("document.activeElement === document.body")
        if seen[-1] == "All 4 prompts and th":
            break
    assert {"sort", "filter", "side", "toggle", "slider", "difference", "play", "frame", "speed"} <= set(seen)
    assert seen[0] == "Skip to the verdict" and {"range-choice", "Copy", "command"} <= set(seen)


def test_space_on_a_button_presses_it_once(still):
    still.evaluate("document.getElementById('play').focus()")
    still.press(" ")
    assert still.evaluate("document.getElementById('play').textContent") == "Pause"


def test_activation_ranges_of_a_role_and_of_a_layer(still):
    choose = (
        "{ const s = document.getElementById('range-choice'); s.value = '%s'; s.dispatchEvent(new Event('change')); }"
    )
    shown = "[...document.querySelectorAll('#range-panels > figure:not([hidden]) bdi')].map(e => e.textContent)"
    assert still.evaluate(shown) == ["spatial attention", "cross attention", "temporal attention", "mlp"]
    still.evaluate(choose % "role-1")
    assert still.evaluate(shown) == ["cross attention"]
    still.evaluate(choose % "layer-3-0")
    assert still.evaluate(shown) == ["transformer_blocks.0.mlp.to_0"]
    still.evaluate(choose % "")
    assert len(still.evaluate(shown)) == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser, video, scheme):
    """WCAG AA (4.5) for the colours of text on what lies behind."""
    load(browser, video, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    ratios = browser.evaluate(LOWEST_CONTRASTS)
    assert ratios[0][0] >= 4.5, ratios


@pytest.mark.parametrize("num_frames", [1, 8])
def test_a_phone_with_hostile_prompts_does_not_scroll_sideways(browser, tmp_path, num_frames):
    path = write_page(make_content(4, num_frames, prompts=LONG), tmp_path / "report.html")
    load(browser, path, width=360, prefers_reduced_motion="reduce")
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate("window.stolen") is None
    assert browser.evaluate(f"{CARD.format(0)}.querySelector('.prompt').textContent.includes('<script>')")
    assert browser.evaluate(f"getComputedStyle({CARD.format(2)}.querySelector('[dir]')).direction") == "rtl"
    if num_frames == 1:
        browser.press(" ")
        browser.press("t")
        assert mode(browser, 0) == "toggle"
    assert_clean(browser)


@pytest.mark.parametrize("num_layers", [60, 280])
def test_the_incoherence_of_many_layers_fits_a_phone(browser, tmp_path, num_layers):
    """Few layers as a whole; many in a strip that scrolls by itself, wide enough to tell layers apart."""
    roles = {f"blocks.{i}.to_q": ("self_attention", "mlp")[i % 2] for i in range(num_layers)}
    content = replace(make_content(1, 1), incoherence=make_incoherence(roles))
    load(browser, write_page(content, tmp_path / "report.html"), width=360)
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    box = "document.querySelector('#incoherence svg').getBoundingClientRect()"
    assert browser.evaluate(f"{box}.width") == (328 if num_layers == 60 else 900)
    dots = "document.querySelectorAll('#incoherence .dots').length"
    assert browser.evaluate(dots) == 2 * 4
    title = "document.querySelector('#incoherence rect title').textContent"
    assert browser.evaluate(title).startswith("blocks.0.to_q: raw ")
    assert_clean(browser)


def test_a_page_with_little_in_it(browser, tmp_path):
    content = without_verdict(make_content(count=1, num_frames=1))
    load(browser, write_page(content, tmp_path / "one.html"))
    assert_clean(browser)
    browser.open(write_page(replace(content, pairs=()), tmp_path / "none.html"))
    assert_clean(browser)


def test_without_javascript_all_frames_and_all_words_are_there(browser, video):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(video)
        seen = browser.evaluate(
            """[...document.querySelectorAll('.sheet')].every(i => i.complete && i.getBoundingClientRect().width > 200)
            && [...document.querySelectorAll('.js-only')].every(e => !e.offsetParent)
            && document.querySelectorAll('#range-panels > figure').length === 4"""
        )
        assert seen
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_a_broken_script_would_be_seen(browser, video, tmp_path):
    """The policy refuses a changed script, and the tests above would notice."""
    broken = tmp_path / "broken.html"
    broken.write_text(video.read_text(encoding="utf-8").replace("class Clock", "class  Clock"), encoding="utf-8")
    browser.open(broken)
    assert any("Content Security Policy" in message for message in browser.messages)

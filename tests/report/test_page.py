"""The page is one safe file that says everything, for any content."""

import json
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from page_examples import make_content, make_incoherence, without_verdict

from viditq.report.cards import badness
from viditq.report.page import render, write_page

NASTY = '<script>alert("x")</script></script><!-- & \' \u2028 {{ 7*7 }}'
VOID = {"meta", "link", "img", "input", "br"}


class Parsed(HTMLParser):
    """Tags with attributes, the visible text, and scripts and styles; checks that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.raw: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == [], "every element is closed"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            self.raw.append((tag, ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.raw[-1] = (self.raw[-1][0], self.raw[-1][1] + data)
        else:
            self.texts.append(data)

    def all(self, tag, **attributes):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attributes.items())]


@pytest.fixture(scope="module")
def page() -> Parsed:
    return Parsed(render(make_content(count=4)))


def test_nothing_is_fetched(page):
    addresses = [
        a.get(k) for _, a in page.tags for k in ("src", "href", "action", "srcset", "data", "poster") if a.get(k)
    ]
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    styles = "".join(text for tag, text in page.raw if tag == "style")
    assert "url(" not in styles and "@import" not in styles
    ids = {a["id"] for _, a in page.tags if a.get("id")}
    assert {address[1:] for address in addresses if address.startswith("#")} <= ids


def test_the_policy_allows_only_what_is_in_the_file(page):
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    for tag, text in page.raw[:1] + page.raw[-1:]:
        assert f"{tag}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" in policy
    assert not any(name == "style" or name.startswith("on") for _, a in page.tags for name in a)


def test_ids_are_unique_and_labels_have_targets(page):
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    named = [a[k] for _, a in page.tags for k in ("aria-labelledby", "for", "data-copy") if a.get(k)]
    assert set(named) <= set(ids)
    assert all(a.get("alt") for a in page.all("img"))


def test_the_order_of_the_sections(page):
    sections = [a["id"] for a in page.all("section")]
    assert sections == ["verdict", "cost", "step", "pairs", "levels", "layers", "ranges", "incoherence", "repeat"]


@pytest.mark.parametrize(
    "words",
    [
        "Quality held: no worse than float on all 2 quality metrics",
        "Samples differ from float's beyond rounding to bfloat16: PSNR.",
        "differs",
        "vs float in bfloat16",
        "equal within noise",
        "34.4 to 36.5",
        "−14.2 dB",
        "other seed 11.9 dB",
        "35.50 dB is 14.20 dB below what float in bfloat16 reaches",
        "weight bits 4.98 of 16",
        "5.32 MB of 9.06 MB",
        "spatial attention",
        "w8a8, w4a8",
        "generate quantized 31.4 s",
        "All 4 prompts, worst first by PSNR",
        "Measured on 8 prompts",
        "A step of the denoiser takes 30 ms, 3 times the speed of float32 and 2 times the speed of bfloat16",
        "quantized (native) 30 ms 27 ms to 36 ms 10 MB –",
        "10 rounds in random order, 8 prompts at once, 1 thread on 2 cores of AMD EPYC 9R45 (avx2), torch 2.13.0",
        "transformer_blocks.0.mlp.to_1",
        "python run.py experiment=w4a8 model=tiny_video seed=0",
        "torch 2.13.0",
        "AMD EPYC 9R45",
        "bits: 4",
    ],
)
def test_what_it_says(page, words):
    assert words in page.text


def test_every_string_is_escaped():
    content = make_content(count=2, prompts=[NASTY, "plain"])
    metrics = json.loads(json.dumps(content.metrics))
    metrics["labels"]["psnr"] = {"label": NASTY, "unit": NASTY, "higher_is_better": True}
    metrics["verdict"]["psnr"].update(reason=NASTY, verdict=NASTY)
    metrics["noise_floor"]["dtype"] = metrics["fingerprint"] = NASTY
    errors = json.loads(json.dumps(content.errors))
    errors["layers"] = {f"{NASTY}{i}": {**v, "role": NASTY} for i, v in enumerate(errors["layers"].values())}
    incoherence = make_incoherence({f"{NASTY}{i}": NASTY for i in range(3)})
    scores = {**content.per_prompt["metrics"], NASTY: [1.0, 2.0]}
    plan = [replace(role, role=NASTY, schemes=((NASTY,), (NASTY,))) for role in content.plan]
    html = render(
        replace(
            content,
            title=NASTY,
            experiment=NASTY,
            model=NASTY,
            command=NASTY,
            configuration=NASTY,
            versions={NASTY: NASTY},
            machine=replace(content.machine, cpu=NASTY, gpu=NASTY),
            metrics=metrics,
            errors=errors,
            incoherence=incoherence,
            per_prompt={**content.per_prompt, "metrics": scores},
            plan=plan,
        )
    )
    found = Parsed(html)
    assert len(found.all("script")) == 2 and html.count("<script") == 2 and "<!--" not in html
    assert not any("alert" in text for tag, text in found.raw if tag == "style" or "class Clock" in text)
    assert found.text.count(" ".join(NASTY.split())) > 20, "it is shown, not dropped"
    data = json.loads(found.raw[1][1])
    assert NASTY in data["orders"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("num_frames", [1, 8])
def test_images_and_video_one_pair_and_several(count, num_frames):
    page = Parsed(render(make_content(count, num_frames)))
    assert len(page.all("article")) == count
    assert bool(page.all("button", id="play")) == (num_frames > 1)
    assert ("The only prompt." in page.text) == (count == 1)
    data = json.loads(page.raw[1][1])
    assert [clip["frames"] for clip in data["clips"]] == [num_frames] * count


def test_a_run_that_is_neither_judged_nor_diagnosed():
    page = Parsed(render(without_verdict(make_content(count=2))))
    assert "Measured, not judged" in page.text and "± 0.54 standard error" in page.text
    assert "Not measured in this run" in page.text
    assert not page.all("section", id="layers")


def test_scores_that_are_missing():
    content = make_content(count=2)
    pairs = [replace(content.pairs[0], scores={"psnr": float("nan")}), replace(content.pairs[1], scores={"psnr": None})]
    scores = {"psnr": [None, None], "clipsim": [None, None], "clipsim_float": [None, None]}
    page = Parsed(render(replace(content, pairs=pairs, per_prompt={**content.per_prompt, "metrics": scores})))
    assert "NaN" not in page.text and "nan" not in page.raw[1][1].lower()
    assert Parsed(render(replace(content, pairs=()))).all("section", id="pairs") == []


def test_long_prompts_fold_and_every_script_has_its_direction():
    prompts = ["word " * 400, "דג אדום קטן נע שמאלה", "🟥 a red square 🦊 👩‍👩‍👧‍👦", "x" * 2000]
    page = Parsed(render(make_content(count=4, prompts=prompts)))
    assert len([a for a in page.all("details") if a.get("class") == "prompt"]) == 2
    for prompt in prompts:
        assert prompt.strip() in page.text
    assert len(page.all("span", dir="auto")) == 4


def test_orders_put_the_worst_first_and_compare_with_float_where_it_has_scores():
    content = make_content(count=5)
    data = json.loads(Parsed(render(content)).raw[1][1])
    metrics = content.per_prompt["metrics"]
    drops = [q - f for q, f in zip(metrics["clipsim"], metrics["clipsim_float"], strict=True)]
    assert data["orders"]["psnr"] == sorted(range(5), key=lambda i: metrics["psnr"][i])
    assert data["orders"]["clipsim"] == sorted(range(5), key=lambda i: drops[i])
    assert data["orders"][""] == list(range(5))
    both_ways = {**content.metrics, "labels": {"clipsim": {"higher_is_better": None}}}
    assert badness(replace(content, metrics=both_ways), content.pairs[0], "clipsim") == abs(drops[0])


def test_it_says_how_many_of_how_many_pairs_are_shown():
    content = make_content(count=3)
    page = Parsed(render(replace(content, metrics={**content.metrics, "prompts": 128})))
    assert "3 of 128 prompts, the worst by PSNR" in page.text


def test_large_clips_stay_within_the_budget_and_the_page_says_what_was_lost(tmp_path):
    content = make_content(count=3, num_frames=4, enlarge=12)
    path = write_page(content, tmp_path / "report.html", max_media_bytes=120_000)
    text = path.read_text(encoding="utf-8")
    assert sum(len(address) for address in re.findall(r'src="data:[^"]*"', text)) < 1.35 * 120_000
    assert "not lossless" in Parsed(text).text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_no_half_a_page_is_left(tmp_path):
    content = make_content(count=1)

    def broken():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_page(replace(content, pairs=[replace(content.pairs[0], clips=broken)]), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layers", "words"),
    [({"fake": 40}, "emulated"), ({"fake": 4, "native": 36}, "emulated in part"), ({"native": 40}, "")],
)
def test_the_headline_says_emulated(layers, words):
    content = make_content(count=1, num_frames=1)
    backend = {"requested": "auto", "layers": layers}
    html = render(replace(content, metrics={**content.metrics, "backend": backend}))
    headline = re.search(r'<h2 id="verdict-title"[^>]*>(.*?)</h2>', html)[1]
    assert (
        headline
        == f"Quality held: no worse than float on all 2 quality metrics{f' <small>{words}</small>' if words else ''}"
    )

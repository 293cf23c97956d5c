"""Sound on the page: whole where it fits, reduced alike where it does not, and said."""

import io
import wave
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chromium import Chromium
from page_examples import make_content
from torch import Tensor

from viditq.report.page import render, write_page
from viditq.report.sound import encode_sounds

RATE = 24_000


def tone(hertz: float, seconds: float = 1.0, channels: int = 2) -> Tensor:
    """A sine of half of full scale, int16 [A, T]."""
    time = torch.arange(round(seconds * RATE)) / RATE
    return (16_000 * torch.sin(2 * torch.pi * hertz * time)).short().expand(channels, -1)


def played(address: str) -> tuple[Tensor, int]:
    """What a browser decodes, [A, T], and its rate."""
    head, content = address.split(",", 1)
    assert head == "data:audio/wav;base64"
    with wave.open(io.BytesIO(b64decode(content))) as file:
        values = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
        return values.view(-1, file.getnchannels()).T, file.getframerate()


def test_short_sounds_are_as_they_were_made() -> None:
    pair = tone(440), tone(550)
    players = encode_sounds([lambda: (*pair, RATE)] * 2)
    found = [played(address) for addresses in players.addresses for address in addresses]
    assert [rate for _, rate in found] == [RATE] * 4
    assert all(torch.equal(sound, pair[i % 2]) for i, (sound, _) in enumerate(found))
    assert players.note == "Sound is stereo, 24 kHz, 16 bits, as the model made it."
    assert players.num_bytes == 4 * (44 + 2 * 2 * RATE)


@pytest.mark.parametrize(("limit", "rate"), [(110_000, 24_000), (60_000, 12_000), (1000, 4000)])
def test_long_ones_are_made_mono_and_slower_until_they_fit(limit: int, rate: int) -> None:
    """A tone that the lower rate holds stays as loud; one that it does not is left out, not turned into another."""
    players = encode_sounds([lambda: (tone(440), tone(9000), RATE)], limit)
    (low, found), (high, _) = (played(address) for address in players.addresses[0])
    assert (
        found == rate and len(low) == 1 and f"to mono, {rate / 1000:.3g} kHz; scores are of the whole" in players.note
    )
    assert players.num_bytes <= limit or rate == 4000
    middle = slice(rate // 4, -rate // 4)
    assert low[0, middle].float().std() == pytest.approx(16_000 / 2**0.5, rel=0.02)
    assert (high[0, middle].float().std() < 100) == (rate < 18_000)


def test_a_page_has_a_player_for_each_and_none_where_the_model_is_silent() -> None:
    content = make_content(count=3)
    silent = render(content)
    assert "<audio" not in silent and "Sound is" not in silent
    pairs = [replace(pair, sounds=lambda: (tone(440, 0.1), tone(550, 0.1), RATE)) for pair in content.pairs]
    page = render(replace(content, pairs=pairs))
    assert page.count("<audio controls") == 6 and page.count('class="sounds"') == 3 and "media-src data:" in page
    assert 'aria-label="Sound of prompt 2, quantized"' in page


def test_one_sound_plays_at_a_time_and_keys_on_it_are_its_own(browser: Chromium, tmp_path: Path) -> None:
    """The space bar on a player plays sound, not the clips; wide and narrow, nothing is refused or sticks out."""
    content = make_content(count=2)
    pairs = [replace(pair, sounds=lambda: (tone(440, 5), tone(550, 5), RATE)) for pair in content.pairs]
    page = write_page(replace(content, pairs=pairs), tmp_path / "report.html")
    for width in (390, 1400):
        browser.open(page, width, prefers_reduced_motion="reduce")
        browser.wait("document.documentElement.dataset.drawn === 'true'")
        browser.evaluate(
            "window.heard = [...document.querySelectorAll('audio')]; heard.forEach((a) => { a.muted = true; })"
        )
        browser.wait("heard.every((a) => a.readyState > 0)")
        assert browser.evaluate("heard.map((a) => Math.round(a.duration))") == [5] * 4
        assert browser.messages == [] and browser.evaluate("document.documentElement.scrollWidth") == width
        assert browser.evaluate("heard.every((a) => a.getBoundingClientRect().width >= 200)")
    browser.evaluate("heard[0].play()")
    browser.evaluate("heard[1].play()")
    browser.wait("heard[0].paused && !heard[1].paused")
    browser.evaluate("heard[1].focus()")
    browser.press(" ")
    assert browser.evaluate("document.getElementById('play').getAttribute('aria-pressed')") == "false"

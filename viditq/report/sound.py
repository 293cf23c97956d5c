"""Sound inside data: addresses, small enough for one page. Legend: A audio channels, T values of each in time."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from viditq.wav import FULL_SCALE, HEADER, WIDTH, wav_bytes

MAX_SOUND_BYTES = 3_000_000  # of what media.py leaves for pictures and sound together
STEPS = ((1, False), (1, True), (2, True), (3, True), (4, True), (6, True))
"""Tried in this order until the page is small enough: every how many-th value, mono. The last is taken in any case."""
Sounds = Callable[[], tuple[Tensor, Tensor, int]]
"""Loads (float sound, quantized sound), both int16 [A, T], and their rate in values a second."""


@dataclass(frozen=True)
class Players:
    """One (float, quantized) pair of addresses a prompt; `note` says what was done to the sound."""

    addresses: tuple[tuple[str, str], ...]
    note: str
    num_bytes: int


def encode_sounds(pairs: Sequence[Sounds], max_bytes: int = MAX_SOUND_BYTES) -> Players:
    """All sounds as WAV, reduced alike until they take `max_bytes` in total; they are as long as the first."""
    first = pairs[0]()
    fitting = (step for step in STEPS if 2 * len(pairs) * _num_bytes(first[0], *step) <= max_bytes)
    factor, mono = next(fitting, STEPS[-1])
    addresses, num_bytes = [], 0
    for *sounds, rate in (pair() for pair in pairs):
        files = [reduced(sound, rate, factor, mono) for sound in sounds]
        addresses.append((address(files[0]), address(files[1])))
        num_bytes += sum(map(len, files))
    return Players(tuple(addresses), _note(first, factor, mono), num_bytes)


def _num_bytes(sound_AT: Tensor, factor: int, mono: bool) -> int:
    channels, length = sound_AT.shape
    return HEADER + WIDTH * (1 if mono else channels) * ceil(length / factor)


def reduced(sound_AT: Tensor, rate: int, factor: int, mono: bool) -> bytes:
    """A WAV file with the mean of the channels, at a lower rate; scipy leaves out what that cannot hold."""
    values = sound_AT.float().mean(0, keepdim=True) if mono else sound_AT.float()
    if factor > 1:
        from scipy.signal import resample_poly  # a third of a second, for pages of long clips alone

        values = torch.from_numpy(resample_poly(values.numpy(), 1, factor, axis=1))
    return wav_bytes(values.round().clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16), round(rate / factor))


def address(content: bytes) -> str:
    """A WAV file as a page holds it."""
    return f"data:audio/wav;base64,{b64encode(content).decode()}"


def _note(pair: tuple[Tensor, Tensor, int], factor: int, mono: bool) -> str:
    sound_AT, _, rate = pair
    channels = {1: "mono", 2: "stereo"}.get(len(sound_AT), f"{len(sound_AT)} channels")
    whole = f"{channels}, {rate / 1000:g} kHz, 16 bits"
    if factor == 1 and (not mono or len(sound_AT) == 1):
        return f"Sound is {whole}, as the model made it."
    return f"Sound is reduced from {whole}, to mono, {rate / factor / 1000:.3g} kHz; scores are of the whole."

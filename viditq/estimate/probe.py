"""One pass of the sampling loop in which only two forwards are computed: what it calls, how long, how much it holds."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from viditq.errors import UserError
from viditq.estimate.hollow import as_meta, as_zeros, autocast_on_meta, twin_on_meta
from viditq.estimate.live import FusedAttention, LiveBytes
from viditq.estimate.readers import Readers
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import generate, generate_samples
from viditq.models.text import PromptEmbeds


@dataclass(frozen=True)
class Probe:
    """Of one call of the pipeline with `batch_size` prompts.

    forwards: of the denoisers, together. forward_seconds: of one; decode_seconds: from the last forward to the sample.
    forward_bytes, decode_bytes: the most that tensors other than weights take at one time, None where it cannot be
    told (`why`). inputs: Linear -> what it read, by number (`Readers`), of denoisers that were reached.
    """

    batch_size: int
    forwards: int
    sample_bytes: int
    forward_seconds: float | None = None
    decode_seconds: float | None = None
    forward_bytes: int | None = None
    decode_bytes: int | None = None
    why: str = ""
    inputs: Mapping[str, Sequence[int]] = field(default_factory=dict)


def probe(
    adapter: ModelAdapter,
    pipeline: Any,
    embeds: PromptEmbeds,
    batch_size: int,
    synchronize: Callable[[], None] = lambda: None,
) -> Probe:
    """Samples once. The first forward is computed and its tensors counted, the second is computed and timed, the rest
    return what the first of their shapes did; the scheduler leaves the latents as they are."""
    watch = _Watch(pipeline, synchronize)
    for name in adapter.denoiser_names:
        denoiser = getattr(pipeline, name)
        denoiser.forward = watch.around(denoiser.forward, denoiser, _prefix(adapter, name))
    with watch.live:
        clips, sounds = generate_samples(adapter, pipeline, [embeds] * batch_size, list(range(batch_size)), seed=0)
        synchronize()
        end = time.perf_counter()
    return Probe(
        batch_size=batch_size,
        forwards=watch.count,
        sample_bytes=clips[0].nbytes + (0 if sounds is None else sounds[0].nbytes),
        forward_seconds=watch.seconds,
        decode_seconds=end - watch.left,
        forward_bytes=watch.forward_bytes,
        decode_bytes=watch.live.peak,
        inputs=watch.readers.inputs,
    )


def _prefix(adapter: ModelAdapter, denoiser: str) -> str:
    return f"{denoiser}." if len(adapter.denoiser_names) > 1 else ""


class _Watch:
    """What is known of the forwards of a running pipeline."""

    def __init__(self, pipeline: Any, synchronize: Callable[[], None]) -> None:
        self.pipeline, self.synchronize, self.live, self.readers = pipeline, synchronize, LiveBytes(), Readers()
        self.count, self.seconds, self.left, self.forward_bytes = 0, 0.0, 0.0, 0
        self.made: dict[tuple[Any, ...], Any] = {}  # by the shapes of what a forward is given

    def around(self, forward: Callable[..., Any], denoiser: nn.Module, prefix: str) -> Callable[..., Any]:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            freeze(self.pipeline.scheduler)
            self.count += 1
            shapes = tuple(tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            out = self.made.get(shapes)
            if self.count <= 2 or out is None:  # LTX-2's guidance calls with half a batch as well
                with self.readers.watching(denoiser, prefix) if self.count == 1 else nullcontext():
                    out = self._computed(forward, args, kwargs)
                self.made.setdefault(shapes, out)
            self.live.restart()
            self.synchronize()
            self.left = time.perf_counter()
            return out

        return watched

    def _computed(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = self.live.current
        self.live.restart()
        self.synchronize()
        start = time.perf_counter()
        with _disable_current_modes() if self.count == 2 else nullcontext():
            out = forward(*args, **kwargs)
        self.synchronize()
        if self.count <= 2:
            self.seconds = time.perf_counter() - start  # of the second, where there is one
        if self.count == 1:
            self.forward_bytes = self.live.peak - before
        return out


def probe_on_meta(adapter: ModelAdapter, pipeline: Any, embeds: PromptEmbeds, batch_size: int) -> Probe:
    """The same from configurations alone, for a hollow `pipeline`: no durations, and of each model one forward, whose
    shapes come from the meta device (attention taken as fused). Where one decoding gives all of a batch's pixels, it
    ends there: made ready to be saved they would be dense."""
    pixels = None if adapter.height is None or adapter.width is None else 3 * adapter.height * adapter.width
    sample = None if pixels is None else pixels * (adapter.num_frames or 1)
    meta = _OnMeta(pipeline, None if sample is None else sample * batch_size)
    for name in adapter.denoiser_names:
        denoiser = getattr(pipeline, name)
        denoiser.forward = meta.around(denoiser.forward, twin_on_meta(denoiser), "forward", _prefix(adapter, name))
    vae: Any = getattr(pipeline, "vae", None)
    if vae is not None:
        vae.decode = meta.around(vae.decode, twin_on_meta(vae), "decode")
    try:
        clips = generate(adapter, pipeline, [embeds] * batch_size, list(range(batch_size)), seed=0)
        sample = clips[0].numel()
    except _AllDecoded:
        assert sample is not None
    return Probe(
        batch_size=batch_size,
        forwards=meta.count,
        sample_bytes=sample,
        forward_bytes=meta.peaks.get("forward"),
        decode_bytes=meta.peaks.get("decode"),
        inputs=meta.readers.inputs,
    )


class _AllDecoded(Exception):
    """The pixels of a whole batch are known."""


class _OnMeta:
    """Calls of a hollow pipeline's models, answered with zeros of the shapes that their twins on meta return.

    last: numbers in what is decoded after which nothing more need be known.
    """

    def __init__(self, pipeline: Any, last: int | None) -> None:
        self.pipeline, self.last = pipeline, last
        self.count = 0
        self.peaks: dict[str, int] = {}
        self.readers = Readers()
        self._answers: dict[str, Any] = {}

    def around(
        self, function: Callable[..., Any], twin: nn.Module, method: str, prefix: str = ""
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def answered(*args: Any, **kwargs: Any) -> Any:
            if method == "forward":
                freeze(self.pipeline.scheduler)
                self.count += 1
            key = f"{method} {id(twin)} {_shapes(args, kwargs)}"
            if key not in self._answers:
                first = method == "forward" and not any(
                    known.startswith(f"forward {id(twin)}") for known in self._answers
                )
                with self.readers.watching(twin, prefix) if first else nullcontext():
                    self._answers[key] = self._ask(getattr(twin, method), method, args, kwargs)
            if method == "decode" and _numbers(self._answers[key]) == self.last:
                raise _AllDecoded
            return self._answers[key]

        return answered

    @torch.no_grad()
    def _ask(self, function: Callable[..., Any], method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = as_meta(args), as_meta(kwargs)
        try:
            with LiveBytes() as live, FusedAttention(), autocast_on_meta():
                out = function(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"The shapes inside {type(self.pipeline).__name__} depend on values ({str(error).splitlines()[0]}), so "
                "that estimate=meta cannot follow them. Use estimate=true, which loads the model and runs one step."
            ) from error
        self.peaks[method] = max(self.peaks.get(method, 0), live.peak)
        return as_zeros(out)


def _numbers(value: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    return str([tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)])


def freeze(scheduler: Any) -> None:
    """Let `scheduler.step` return the sample unchanged: latents stay as large as noise, whatever is predicted."""
    if getattr(scheduler.step, "frozen", False):
        return
    signature = inspect.signature(scheduler.step)

    @functools.wraps(scheduler.step)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        sample = given["sample"]
        return (sample, sample) if given.get("return_dict") is False else _Step(sample)

    step.frozen = True  # type: ignore[attr-defined]
    scheduler.step = step


@dataclass
class _Step:
    """What schedulers return with return_dict=True."""

    prev_sample: Any
    pred_original_sample: Any = None

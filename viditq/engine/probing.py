"""Candidates of a sensitivity search as a Lightning `predict` loop: each is swapped in, generated and scored."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from viditq.engine.sampling import PipelineModule
from viditq.metrics.batch import EvalBatch, to_unit
from viditq.models.generate import denoise, generate
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.description.plan import QuantPlan
from viditq.quant.search.candidates import Candidate, Group
from viditq.quant.search.proxy import OneStep, ProxyErrors, proxy_errors
from viditq.quant.search.sensitivity import Replay, Swapper

Scores = dict[str, list[float]]
OUTPUT = "output"  # the score that every probe has: mean square of the pixel error, pixels in [0, 1]


class Probe:
    """One plan to generate: its scores by the output error and by the named metrics go to `sink`.

    first_level: the highest noise level at which it differs from float.
    """

    def __init__(
        self, plan: Callable[[], QuantPlan], first_level: float, metrics: Sequence[str], sink: Callable[[Scores], None]
    ) -> None:
        self.plan, self.first_level, self.metrics, self.sink = plan, first_level, metrics, sink


class Probing(PipelineModule):
    """Runs probes on one float pipeline. `noise_indices`: of the prompts' noise; `batches`: positions of prompts."""

    def __init__(
        self,
        *args: Any,
        prompts: Sequence[str],
        noise_indices: Sequence[int],
        batches: Sequence[list[int]],
        metrics: Mapping[str, nn.Module],
        base: QuantPlan,
        stats: CalibrationStats | None,
        backend: str,
    ) -> None:
        super().__init__(*args)
        self.prompts, self.noise_indices, self.batches = list(prompts), list(noise_indices), batches
        self.metrics = nn.ModuleDict(metrics)  # moved to the device with this module
        denoiser = self.adapter.denoiser_of(self.pipeline)
        self.swapper = Swapper(denoiser, base.edges, stats, self.adapter.timestep_scale, backend)
        self.replay = Replay(denoiser, self.swapper.context)
        self.floats: list[Tensor] = []  # the float model's clips, batch by batch
        self.perfect: dict[str, list[Tensor]] = {}

    def predict_step(self, probe: Probe, batch_idx: int) -> None:
        """One probe, all prompts."""
        if not self.floats:
            with self.replay.recording():
                self.floats = [self._clips(batch) for batch in self.batches]
        with ExitStack() as stack:
            stack.enter_context(self.swapper.swapped(probe.plan()))
            stack.enter_context(self.replay.skipping(probe.first_level))
            clips = [self._clips(batch) for batch in self.batches]
        scores = {OUTPUT: [self._squared_error(c, f) for c, f in zip(clips, self.floats, strict=True)]}
        scores |= {name: self._changes(name, clips) for name in probe.metrics}
        probe.sink({name: torch.cat(values).tolist() for name, values in scores.items()})

    def _clips(self, batch: list[int]) -> Tensor:
        embeds = [self.load_embeds(i) for i in batch]
        return generate(self.adapter, self.pipeline, embeds, [self.noise_indices[i] for i in batch], self.seed)

    @staticmethod
    def _squared_error(clips: Tensor, floats: Tensor) -> Tensor:
        return (to_unit(clips) - to_unit(floats)).square().flatten(1).double().mean(1)

    def _changes(self, name: str, clips: list[Tensor]) -> list[Tensor]:
        """Squared difference between the metric of each clip and that of the float model's own, set against itself."""
        if name not in self.perfect:
            self.perfect[name] = self._scores(name, self.floats)
        return [(s - p).square() for s, p in zip(self._scores(name, clips), self.perfect[name], strict=True)]

    def _scores(self, name: str, clips: list[Tensor]) -> list[Tensor]:
        metric: Any = self.metrics[name]
        triples = zip(self.batches, clips, self.floats, strict=True)
        device = self.device  # the metric's; clips are kept on the CPU
        batches = [
            EvalBatch(c.to(device), f.to(device), [self.prompts[i] for i in b], torch.tensor(b, device=device))
            for b, c, f in triples
        ]
        return [metric.scores(batch)["per_sample"].double().cpu() for batch in batches]


class ProxyPass(PipelineModule):
    """Samples its one batch, of (prompt, index of its noise), in float and hands what proxies are made of to `sink`."""

    def __init__(
        self,
        *args: Any,
        base: QuantPlan,
        stats: CalibrationStats,
        groups: Mapping[str, Group],
        candidates: Sequence[Candidate],
        backend: str,
        sink: Callable[[ProxyErrors], None],
    ) -> None:
        super().__init__(*args)
        self.base, self.stats, self.groups, self.candidates, self.sink = base, stats, groups, candidates, sink
        self.backend = backend

    def predict_step(self, batch: list[tuple[int, int]], batch_idx: int) -> None:
        """The whole pass."""
        denoiser = self.adapter.denoiser_of(self.pipeline)
        swapper = Swapper(denoiser, self.base.edges, self.stats, self.adapter.timestep_scale, self.backend)
        one_step = OneStep(swapper)
        with one_step.recording():
            embeds = [self.load_embeds(prompt) for prompt, _ in batch]
            denoise(self.adapter, self.pipeline, embeds, [index for _, index in batch], self.seed)
        self.sink(proxy_errors(denoiser, self.base, self.stats, self.groups, self.candidates, one_step))
        swapper.close()

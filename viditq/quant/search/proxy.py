"""Proxies: what quantizing one part does, told without sampling.

Two of them: the error of the Linears' own outputs on calibration rows, which says how bit-widths of one part compare,
and the error of the denoiser's output in one step, which says how parts compare. Legend: C in_features, O out_features,
n reservoir rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from viditq.quant.calibration.context import denoisers_of
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.convert import fit_variant
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.diagnosis.arguments import Call, unshared
from viditq.quant.diagnosis.diagnosis import predicted
from viditq.quant.execution.backends import get_backend
from viditq.quant.execution.variant import Variant
from viditq.quant.search.candidates import Candidate, Group, candidate_plan
from viditq.quant.search.costs import anchors_of, completed
from viditq.quant.search.recorded import recorded
from viditq.quant.search.sensitivity import Swapper

TINY = torch.finfo(torch.float64).tiny


class OneStep:
    """Error of the denoiser's output in one step of each segment, the middle one, on inputs of a float run.

    Where several denoisers of one pipeline share the noise levels, each has middle steps of its own.
    Use: `with one_step.recording(): sample`, then `error`.
    """

    def __init__(self, swapper: Swapper) -> None:
        self._swapper = swapper
        self._parts = denoisers_of(swapper.denoiser)
        self._calls: dict[tuple[str, int], Call] = {}
        self._exact: dict[tuple[str, int], Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps the inputs of every step that the denoiser makes."""
        with recorded(self._parts, self._swapper.context) as calls:
            yield
        for step, of_step in calls.items():  # prompts of several lengths are sampled one group after the other
            self._calls[step] = sorted(of_step, key=lambda call: -call[0])[len(of_step) // 2][1]
        self._exact = {step: self._output(step) for step in self._calls}

    def error(self, plan: QuantPlan, segment: int) -> float:
        """||quantized - float||^2 / ||float||^2 of the output in the step of `segment`; 0 where there is no step.

        plan: of Linears of one denoiser.
        """
        layer = next(iter(plan.layers))
        step = next(prefix for prefix in self._parts if layer.startswith(prefix)), segment
        if step not in self._calls:
            return 0.0
        with self._swapper.swapped(plan):
            error = self._output(step) - self._exact[step]
        return float(error.square().sum() / self._exact[step].square().sum().clamp(min=TINY))

    @torch.no_grad()
    def _output(self, step: tuple[str, int]) -> Tensor:
        args, kwargs = unshared(*self._calls[step])
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return predicted(self._parts[step[0]](*args, **kwargs), inputs).double()


class OnRows:
    """Error of the Linears' own outputs on reservoir rows of the calibration: costs no sampling."""

    def __init__(self, denoiser: nn.Module, base: QuantPlan, stats: CalibrationStats) -> None:
        self._denoiser, self._base, self._stats = denoiser, base, stats
        self._backend = get_backend("fake")
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._variants: dict[tuple[str, LayerScheme], Variant] = {}

    def error(self, group: Group, candidate: Candidate) -> float:
        """Sum over the group's Linears of ||quantized(x) - float(x)||^2 / ||float(x)||^2 over the segment's rows."""
        plan = candidate_plan(self._base, group, candidate)
        return sum(self._layer_error(plan, layer, candidate.segment) for layer in plan.layers)

    @torch.no_grad()
    def _layer_error(self, plan: QuantPlan, layer: str, segment: int) -> float:
        scheme, linear = plan.scheme(layer, segment), self._denoiser.get_submodule(layer)
        assert scheme is not None and isinstance(linear, nn.Linear)
        lo, hi = plan.edges[segment], plan.edges[segment + 1]
        if (layer, segment) not in self._rows:
            rows_nC = self._stats.segment(layer, lo, hi).rows
            self._rows[layer, segment] = rows_nC.to(linear.weight.device, linear.weight.dtype)
        if scheme.per_segment:
            variant = self._fit(layer, linear, scheme, lo, hi)
        else:
            key = (layer, scheme)
            if key not in self._variants:
                self._variants[key] = self._fit(layer, linear, scheme, lo, hi)
            variant = self._variants[key]
        rows_nC = self._rows[layer, segment]
        exact_nO = (rows_nC.float() @ linear.weight.float().T).double()
        # one row = one token; a leading axis of 1 makes dynamic "tensor" take all rows together
        error_nO = self._backend.linear(variant, rows_nC[None], None)[0] - exact_nO
        return float(error_nO.square().sum() / exact_nO.square().sum().clamp(min=TINY))

    def _fit(self, layer: str, linear: nn.Linear, scheme: LayerScheme, lo: float, hi: float) -> Variant:
        variant = fit_variant(layer, linear, scheme, self._stats, lo, hi).to(linear.weight.device)
        self._backend.prepare(variant)
        return variant


def errors_on_rows(
    denoiser: nn.Module,
    base: QuantPlan,
    stats: CalibrationStats,
    groups: Mapping[str, Group],
    candidates: Sequence[Candidate],
) -> dict[Candidate, float]:
    """`OnRows.error` of every candidate."""
    errors: dict[Candidate, float] = {}
    for name, group in groups.items():  # what one group has fitted is dropped before the next
        of_group = OnRows(denoiser, base, stats)
        errors |= {c: of_group.error(group, c) for c in candidates if c.group == name}
    return errors


@dataclass
class ProxyErrors:
    """What proxies are made of: errors in one step (of each part's fewest bits) and on rows (of every candidate)."""

    one_step: dict[Candidate, float] = field(default_factory=dict)
    on_rows: dict[Candidate, float] = field(default_factory=dict)

    def missing(self, candidates: Sequence[Candidate]) -> bool:
        """Whether more is needed for the proxies of these."""
        anchors = anchors_of(candidates).values()
        return not (self.one_step.keys() >= {*anchors} and self.on_rows.keys() >= {*candidates})

    def proxies(self, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
        """Of each candidate: one step with the fewest bits of each part; other widths by errors on rows."""
        steps = {c: self.one_step[c] for c in anchors_of(candidates).values()}
        return completed(steps, {c: self.on_rows[c] for c in candidates})


def proxy_errors(
    denoiser: nn.Module,
    base: QuantPlan,
    stats: CalibrationStats,
    groups: Mapping[str, Group],
    candidates: Sequence[Candidate],
    one_step: OneStep,
) -> ProxyErrors:
    """What the proxies of these candidates need."""
    anchors = anchors_of(candidates).values()
    steps = {c: one_step.error(candidate_plan(base, groups[c.group], c), c.segment) for c in anchors}
    return ProxyErrors(steps, errors_on_rows(denoiser, base, stats, groups, candidates))

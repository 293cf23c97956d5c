"""What a treatment does to the outputs of a part's own Linears, on inputs of a float run: costs no sampling.

Legend: n rows, C in_features, O out_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.convert import fit_variant
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends import get_backend
from viditq.quant.search.treatments import Menu, Treatment

TINY = torch.finfo(torch.float64).tiny
WORTH = 0.8  # of an error: what a later transform has to bring it down to, as rotating costs time at every step


class PartErrors:
    """Of one part's Linears. rows: Linear -> segment -> inputs [n, C]. stats: what treatments are fitted to."""

    def __init__(
        self,
        denoiser: nn.Module,
        rows: Mapping[str, Mapping[int, Tensor]],
        edges: Sequence[float],
        stats: CalibrationStats,
        symmetric: bool,
    ) -> None:
        self._denoiser, self._edges, self._stats, self._symmetric = denoiser, edges, stats, symmetric
        self._backend = get_backend("fake")
        self._rows = {layer: {s: x.float() for s, x in of.items()} for layer, of in rows.items()}

    def error(self, treatment: Treatment) -> float:
        """Sum over the Linears of ||quantized(x) - float(x)||^2 / ||float(x)||^2 over the rows."""
        scheme = treatment.scheme(self._symmetric)
        return sum(self._layer_error(layer, scheme, rows) for layer, rows in self._rows.items())

    @torch.no_grad()
    def _layer_error(self, layer: str, scheme: LayerScheme, rows: Mapping[int, Tensor]) -> float:
        linear, wrong, whole = self._denoiser.get_submodule(layer), 0.0, 0.0
        assert isinstance(linear, nn.Linear)
        apart = {self._edges[s : s + 2]: x for s, x in rows.items()}
        for (lo, hi), rows_nC in (apart if scheme.per_segment else {(0.0, 1.0): torch.cat([*rows.values()])}).items():
            variant = fit_variant(layer, linear, scheme, self._stats, lo, hi).to(linear.weight.device)
            self._backend.prepare(variant)
            exact_nO = rows_nC @ linear.weight.float().T
            # one row = one token; a leading axis of 1 makes dynamic "tensor" take all rows together
            error_nO = self._backend.linear(variant, rows_nC[None].to(linear.weight.dtype), None)[0] - exact_nO
            wrong += float(error_nO.double().square().sum())
            whole += float(exact_nO.double().square().sum())
        return wrong / max(whole, TINY)


def explored(
    menu: Menu, error: Callable[[Treatment], float], nbytes: Callable[[Treatment], float]
) -> dict[Treatment, float]:
    """Errors of the treatments worth knowing, one choice after the other instead of their whole product.

    Transforms at middle widths, with the first group and rounding, of which the first is taken that comes near the best
    (`WORTH`), beside it the first that is stored once and the first that does not rotate; then roundings and ranges on
    top; then every width and group with the winners; last low-rank branches, at middle widths first, and at all where
    bits do not buy more. Of many widths two are fitted (`between_widths`).
    """
    known: dict[Treatment, float] = {}

    def best(treatments: Iterable[Treatment]) -> Treatment:
        treatments = list(treatments)
        known.update({treatment: error(treatment) for treatment in treatments if treatment not in known})
        return min(treatments, key=lambda treatment: known[treatment])

    def near(treatments: Sequence[Treatment]) -> Treatment:
        enough = known[best(treatments)] / WORTH
        return next(treatment for treatment in treatments if known[treatment] <= enough)

    def everywhere(treatments: Sequence[Treatment]) -> None:
        best(treatment for treatment in treatments if treatment.weight_bits in menu.fitted_bits)
        for treatment in treatments:
            if treatment not in known:
                fitted = {bits: known[replace(treatment, weight_bits=bits)] for bits in menu.fitted_bits}
                known[treatment] = between_widths(fitted, treatment.weight_bits)

    plain = [menu.plain(transform) for transform in menu.transforms]
    once = [treatment for treatment in plain if not treatment.per_segment]
    still = [treatment for treatment in once if not treatment.rotates]
    few = [near(some) for some in (plain, once, still) if some]
    first, transforms = few[0], dict.fromkeys(treatment.transform for treatment in few)
    how = best(replace(first, rounding=r, ranges=s) for r, s in product(menu.roundings, menu.ranges))
    found = [
        replace(how, transform=transform, weight_bits=weight, activation_bits=activation, group=group)
        for transform, weight, activation, group in product(
            transforms, menu.weight_choices, menu.activation_choices, menu.groups
        )
    ]
    everywhere(found)
    grouped = best(replace(how, group=group) for group in menu.groups)
    for rank in menu.low_ranks[1:]:
        branch = replace(grouped, low_rank=rank)
        best([branch])
        if known[branch] < _between(found, known, nbytes, nbytes(branch)):
            everywhere([replace(treatment, low_rank=rank) for treatment in found])
    return known


def between_widths(fitted: Mapping[int, float], bits: int) -> float:
    """The error at a width, from those at two others: a part that no bits of the weight take away, and one that goes
    with the square of its step, 1 / (2^bits - 1). fitted: width -> error.
    """
    (low, coarse), (high, fine) = sorted(fitted.items())
    steps = {width: (2**width - 1) ** -2.0 for width in (low, high, bits)}
    slope = max(coarse - fine, 0.0) / (steps[low] - steps[high])
    return max(fine + slope * (steps[bits] - steps[high]), TINY)


def _between(
    treatments: Sequence[Treatment], known: Mapping[Treatment, float], nbytes: Callable[[Treatment], float], size: float
) -> float:
    """The error that these would have at this size: of the best ones a straight line of its logarithm."""
    below = [t for t in treatments if nbytes(t) <= size]
    above = [t for t in treatments if nbytes(t) > size]
    if not below or not above:
        return min((known[t] for t in below), default=math.inf)
    low, high = (min(side, key=lambda t: known[t]) for side in (below, above))
    high = min(above, key=lambda t: (known[t] - known[low]) / (nbytes(t) - nbytes(low)))
    share = (size - nbytes(low)) / (nbytes(high) - nbytes(low))
    return math.exp((1 - share) * math.log(max(known[low], TINY)) + share * math.log(max(known[high], TINY)))

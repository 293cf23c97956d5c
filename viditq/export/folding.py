"""Foldable smoothing taken over by the layer before, for programs that know no scale of inputs.

A modulation's rows become (1 + scale) / s and shift / s, those of a value projection or a norm's weight W / s; codes
stay as they are. Where that cannot be, the smoothing stays in the plan, and the program refuses it.

Legend: O out_features, C in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.export.refusal import Refusal
from viditq.models.fold_sites import KNOWN, Site, fold_sites
from viditq.quant.artifact import PLAN, StoredTensors
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.methods.transforms.foldable import smooths_foldably, without_foldable

Edit = Callable[[Tensor], Tensor]
NO_SITE = "and this input's scale cannot be folded: nothing of its block's own makes it"


def sites_of(denoiser: nn.Module) -> list[Site]:
    """Of a denoiser, or of those of one pipeline by their full names."""
    if isinstance(denoiser, nn.ModuleDict):
        return [_prefixed(site, f"{name}.") for name, part in denoiser.items() for site in sites_of(part)]
    return fold_sites(type(denoiser).__name__, shapes_of(denoiser))


def _prefixed(site: Site, prefix: str) -> Site:
    return replace(site, source=f"{prefix}{site.source}", readers=tuple(f"{prefix}{r}" for r in site.readers))


def only_foldable(plan: QuantPlan, denoiser: nn.Module) -> QuantPlan:
    """The plan with foldable smoothing where it can be folded alone.

    Raises UserError where that is nowhere, and for a modulation that is quantized itself.
    """
    smoothed = [layer for layer in plan.layers if smooths_foldably(plan, layer)]
    if not smoothed:
        return plan
    sites = sites_of(denoiser)
    if not sites:
        raise UserError(
            "quant/smoothing=foldable: this model's blocks share one modulation, or are not known, so that no scale "
            f"can be folded away. Known are {', '.join(KNOWN)}. Choose quant/smoothing=static or convrot."
        )
    for site in sites:
        if site.scale is not None and any(plan.layers.get(site.source, ())):
            raise UserError(
                f"quant/smoothing=foldable: {site.source} is quantized, whose rows would have to take the scales. "
                "Leave modulations in float (model.keep_float), or choose quant/smoothing=static."
            )
    foldable = {reader for site in sites for reader in site.readers}
    return without_foldable(plan, [layer for layer in smoothed if layer not in foldable])


class FoldedTensors(StoredTensors):
    """An artifact's tensors with what can be folded folded.

    plan: without the smoothing that is. reasons: layers that keep it -> why. touched: layers whose weights, outputs or
    inputs are others than in the artifact. but: layers that are quantized again, which stay as they are.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], sites: Sequence[Site], but: Collection[str] = ()) -> None:
        super().__init__(folder, meta)
        self.plan = QuantPlan.from_json((folder / PLAN).read_text())
        self._edits: dict[str, list[Edit]] = {}
        self._folded: set[str] = set()
        smoothed = [layer for layer in self.plan.layers if smooths_foldably(self.plan, layer)]
        self.reasons, self.touched = dict.fromkeys(smoothed, NO_SITE), set[str]()
        for site in sites if smoothed else ():
            self._take(site, but)
        self.plan = without_foldable(self.plan, self._folded)

    def _take(self, site: Site, but: Collection[str]) -> None:
        readers = [reader for reader in site.readers if smooths_foldably(self.plan, reader)]
        if not readers:
            return
        stored = super().state()
        names = [n for n in stored if n.endswith(".chain.0.scale") and n.partition(".variants.")[0] in readers]
        self.check(names)
        scales = [stored[name] for name in names]
        why = self._obstacle(site, readers, scales, but)
        if why is not None:
            self.reasons |= dict.fromkeys(readers, why)
            return
        self._folded.update(readers)
        self.touched |= {site.source, *site.readers}
        for reader in readers:
            del self.reasons[reader]
        scale_C = scales[0].float()
        for name in stored:
            layer, field = _place(name)
            if layer == site.source and field in ("weight", "bias", "weight_scale", "low_rank_up"):
                self._edits.setdefault(name, []).append(partial(_by_row, scale_C, site, field))
            elif layer in site.readers and field == "weight":
                self._edits.setdefault(name, []).append(partial(torch.mul, scale_C))

    def _obstacle(
        self, site: Site, readers: Sequence[str], scales: Sequence[Tensor], but: Collection[str]
    ) -> str | None:
        """Why a site is left alone."""
        schemes = [self.plan.schemes[name] for name in self.plan.layers.get(site.source, ()) if name is not None]
        if site.scale is not None and schemes:
            return f"and {site.source} is quantized, whose rows would have to take the scale"
        if any(scheme.weight is None or scheme.weight.granularity == "tensor" for scheme in schemes):
            return f"and {site.source} has one scale for all rows"
        if f"{site.source}.bias" not in super().state() and site.scale is not None:
            return f"and {site.source} has no bias to take the scale"
        again = [name for name in (site.source, *site.readers) if name in but]
        if again:
            return f"and {again[0]} is quantized again"
        plain = [r for r in site.readers if r not in readers and any(self.plan.layers.get(r, ()))]
        if plain:
            return f"and {plain[0]}, which reads the same input, is quantized without it"
        if any(not torch.equal(scale, scales[0]) for scale in scales):
            return "and Linears that read the same input have other scales"
        return None

    def state(self) -> dict[str, Tensor]:
        """Name -> tensor; those that differ from what is stored have no values here (`of` makes them)."""
        return self._state

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in super().state().items():
            layer, _, rest = name.partition(".variants.")
            if layer in self._folded and ".chain." in rest:
                before, _, after = rest.partition(".chain.")
                number, _, field = after.partition(".")
                if number == "0":
                    continue
                name = f"{layer}.variants.{before}.chain.{int(number) - 1}.{field}"
            elif name in self._edits:
                tensor = torch.empty(tensor.shape, dtype=self.runs.get(name, tensor.dtype), device="meta")
            found[name] = tensor
        return found

    def of(self, name: str) -> Tensor:
        """One tensor in the type that `state` says; raises UserError where it is not as it was written."""
        if name not in self._edits:
            return super().of(name)
        self.check([name])
        tensor = super().state()[name]
        edited = tensor.float()
        for edit in self._edits[name]:
            edited = edit(edited)
        return edited.to(self.runs.get(name, tensor.dtype))


def _place(name: str) -> tuple[str, str]:
    """The layer that a tensor is of, and the tensor's own name."""
    layer, found, rest = name.partition(".variants.")
    return (layer, rest.partition(".")[2]) if found else (name.rpartition(".")[0], name.rpartition(".")[2])


def _by_row(scale_C: Tensor, site: Site, field: str, values: Tensor) -> Tensor:
    """Rows of a source's weight, bias or grid, with the scale taken over."""
    over_C = scale_C.view(-1, *[1] * (values.ndim - 1))
    if site.scale is None or site.shift is None:
        return values / over_C
    chunks = [*values.split(len(scale_C))]
    for place in (site.shift, site.scale):
        chunks[place] = chunks[place] / over_C
    if field == "bias":
        chunks[site.scale] = chunks[site.scale] + 1 / scale_C - 1
    return torch.cat(chunks)


def opened(
    folder: Path, meta: Mapping[str, Any], denoiser: nn.Module, prefix: str, but: Collection[str]
) -> FoldedTensors:
    """The tensors of an artifact, of which the layers of one denoiser, that begin with `prefix`, are folded."""
    return FoldedTensors(folder, meta, [_prefixed(site, prefix) for site in sites_of(denoiser)], but)


def folded(
    folder: Path,
    meta: Mapping[str, Any],
    denoiser: nn.Module,
    refusals: Callable[[QuantPlan], dict[str, Refusal]],
    requantize: bool,
    but: Collection[str] = (),
) -> tuple[FoldedTensors, dict[str, Refusal]]:
    """The tensors of an artifact, and what is refused of their plan; with `requantize` nothing is folded for the sake
    of a layer that is to be quantized again, because it is refused or one of `but`.
    """
    sites, but = sites_of(denoiser), {*but}
    while True:
        tensors = FoldedTensors(folder, meta, sites, but)
        found = {n: _explained(r, tensors.reasons) for n, r in refusals(tensors.plan).items()}
        if not requantize or found.keys() <= but:
            return tensors, found
        but |= found.keys()


def _explained(refusal: Refusal, reasons: Mapping[str, str]) -> Refusal:
    known = refusal.field == "transforms" and refusal.layer in reasons
    return replace(refusal, why=reasons[refusal.layer]) if known else refusal

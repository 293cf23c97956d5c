"""Swaps the Linears of a denoiser for QuantLinears, as a plan says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from viditq.errors import UserError, close_names
from viditq.mapped import is_finite
from viditq.quant.calibration.context import StepContext, TimestepScaleLike
from viditq.quant.calibration.segment_sources import segment_sources
from viditq.quant.calibration.segment_stats import SegmentStats
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.description.blocks import block_of
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends import Backend, check_supported, get_backend
from viditq.quant.execution.denoiser import settle
from viditq.quant.execution.linear import QuantLinear
from viditq.quant.execution.model_linears import linears_of, places_of, put_at
from viditq.quant.execution.variant import Variant, empty_variant
from viditq.quant.methods.quantizer import Grid
from viditq.quant.methods.ranges import static_grid
from viditq.quant.methods.transforms import Chain
from viditq.quant.numerics.granularity import check_group_size
from viditq.quant.numerics.low_rank import check_rank
from viditq.quant.reconstruction.learn import BlockReconstruction

MakeVariant = Callable[[nn.Linear, LayerScheme, float, float], Variant]


class Conversion:
    """From float Linears to QuantLinears, as a plan says; everything that can be is checked at the start.

    denoiser: one, or an nn.ModuleDict of those of one pipeline (the plan's layers are `<denoiser>.<layer>`); any
    nn.Module where the plan has a single segment, otherwise one whose forward takes a timestep. It is not changed.
    dtypes: names of parameters -> the type they compute in, of those that are stored in another. reconstruct: the
    inputs of blocks, for a plan that learns its roundings block by block.

    Raises UserError for: layers the model or the statistics lack, missing statistics or inputs of blocks, group sizes
    that do not divide, schemes the backend cannot run.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        plan: QuantPlan,
        stats: CalibrationStats | None,
        backend: str = "fake",
        timestep_scale: TimestepScaleLike = 1000.0,
        reconstruct: BlockReconstruction | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        if plan.needs_stats and stats is None:
            raise UserError(
                "this plan needs calibration statistics (for static activations, smoothing or rounding); "
                "calibrate first"
            )
        if plan.learned_blocks and reconstruct is None:
            raise UserError(
                "this plan learns roundings block by block: give quantize_denoiser the kept inputs of blocks"
            )
        if plan.open_layers:
            raise UserError(
                f"this plan leaves open whether {plan.open_layers[0]} gets codes for each segment (min_gain): let "
                "viditq.quant.search.shared_codes.share_codes decide, and quantize by the plan that it gives"
            )
        self.denoiser, self.plan, self.context = denoiser, plan, StepContext(plan.edges, timestep_scale)
        self._stats, self._reconstruct, self._dtypes = stats, reconstruct, dtypes or {}
        self._backend = get_backend(backend)
        if plan.num_segments > 1:
            self.context.check(denoiser)
        self.linears = _checked_linears(denoiser, plan, self._backend)
        self._segments = segment_sources(denoiser, plan, stats)
        for name in plan.layers:
            for segment in range(plan.num_segments):
                _check_stats(plan, stats, name, segment, self._segments[name][segment])

    @property
    def turns(self) -> list[list[str]]:
        """The plan's layers by what is quantized at once: blocks whose roundings are learned, and single layers."""
        groups: dict[str, list[str]] = {}
        for name in self.plan.layers:
            block = block_of(name)
            groups.setdefault(block if block in self.plan.learned_blocks else name, []).append(name)
        return [*groups.values()]

    def check_finite(self, names: Iterable[str]) -> None:
        """Raises UserError for NaN or inf in a weight."""
        for name in names:
            dtype = self.dtype_of(name)
            if not is_finite(self.linears[name].weight.detach(), dtype):
                raise UserError(
                    f"the weight of {name} contains NaN or inf as {str(dtype).removeprefix('torch.')}; check the "
                    "checkpoint and its dtype"
                )

    def quantized(self, names: Sequence[str]) -> dict[str, QuantLinear]:
        """The QuantLinears of one turn, not prepared."""
        layers = {name: self._made(name, partial(self._fitted, name)) for name in names}
        block = block_of(names[0])
        if block in self.plan.learned_blocks:
            assert self._reconstruct is not None
            self._reconstruct.learn(block, self._real_block(block), layers, self.plan)
        if self._stats is not None:
            for name in names:
                self._stats.let_go(name)
        return layers

    def empty(self, name: str) -> QuantLinear:
        """The shapes and types of a layer, on the meta device."""
        dtype = self.dtype_of(name)

        def empty(linear: nn.Linear, scheme: LayerScheme, lo: float, hi: float) -> Variant:
            return empty_variant(scheme, linear.in_features, linear.out_features, dtype)

        return self._made(name, empty)

    def dtype_of(self, name: str) -> torch.dtype:
        """In which a Linear computes."""
        return self._dtypes.get(f"{name}.weight", self.linears[name].weight.dtype)

    def _made(self, name: str, make: MakeVariant) -> QuantLinear:
        return quant_linear(name, self.linears[name], self.plan, make, self.context, self._backend)

    def _fitted(self, name: str, linear: nn.Linear, scheme: LayerScheme, lo: float, hi: float) -> Variant:
        segment = self._segments[name][self.plan.edges.index(lo)]
        levels = self.plan.edges[segment], self.plan.edges[segment + 1]
        return fit_variant(name, linear, scheme, self._stats, *levels, self.dtype_of(name))

    def _real_block(self, block: str) -> nn.Module:
        """A copy in the types that it computes in."""
        copied = copy.deepcopy(self.denoiser.get_submodule(block))
        for name, parameter in copied.named_parameters():
            parameter.data = parameter.data.to(self._dtypes.get(f"{block}.{name}", parameter.dtype))
        return copied


def quantize_denoiser(
    denoiser: nn.Module,
    plan: QuantPlan,
    stats: CalibrationStats | None,
    backend: str = "fake",
    timestep_scale: TimestepScaleLike = 1000.0,
    reconstruct: BlockReconstruction | None = None,
) -> StepContext:
    """Quantizes in place and attaches the returned StepContext; everything is checked before anything is
    changed.

    denoiser, reconstruct: as of `Conversion`. Raises UserError as it does, and for NaN or inf in a weight.
    """
    return convert_in_place(Conversion(denoiser, plan, stats, backend, timestep_scale, reconstruct))


def convert_in_place(conversion: Conversion) -> StepContext:
    """The denoiser gets its QuantLinears and the returned StepContext. Raises UserError for NaN or inf in a weight."""
    places = places_of(conversion.denoiser)
    conversion.check_finite(conversion.plan.layers)
    for names in conversion.turns:
        for name, quantized in conversion.quantized(names).items():
            quantized.prepare()
            put_at(places[conversion.linears[name]], quantized)
    settle(conversion.denoiser, conversion.context)
    return conversion.context


def build_quantized(
    denoiser: nn.Module, plan: QuantPlan, backend: str = "fake", timestep_scale: TimestepScaleLike = 1000.0
) -> StepContext:
    """Swaps in the structure that `load_state_dict` fills; call `prepare` on each QuantLinear afterwards."""
    chosen = get_backend(backend)
    linears = _checked_linears(denoiser, plan, chosen)
    context, places = StepContext(plan.edges, timestep_scale), places_of(denoiser)

    def empty(linear: nn.Linear, scheme: LayerScheme, lo: float, hi: float) -> Variant:
        return empty_variant(scheme, linear.in_features, linear.out_features, linear.weight.dtype)

    for name in plan.layers:
        put_at(places[linears[name]], quant_linear(name, linears[name], plan, empty, context, chosen))
    settle(denoiser, context)
    return context


def fit_variant(
    name: str,
    linear: nn.Linear,
    scheme: LayerScheme,
    stats: CalibrationStats | None,
    lo: float,
    hi: float,
    dtype: torch.dtype | None = None,
) -> Variant:
    """Transforms fitted, then the weight quantized once; [lo, hi]: the noise levels of its segment.

    dtype: in which the float layer computes, where its weight is stored in another.
    """
    weight_OC = linear.weight.detach()
    assert stats is not None or not scheme.needs_stats

    def seen(per_segment: bool) -> SegmentStats | None:
        return None if stats is None else stats.segment(name, *((lo, hi) if per_segment else (0.0, 1.0)))

    fitted = (
        t.fit(weight_OC, seen(t.differs_by_segment) if t.needs_stats else None, scheme) for t in scheme.transforms
    )
    chain = Chain(list(fitted))
    grid: Grid | None = None
    if scheme.static_activation:
        segment = seen(per_segment=True)
        assert segment is not None and scheme.activation is not None
        grid = static_grid(chain, segment, scheme.activation, scheme.activation_ranges, weight_OC)
    moments = partial(stats.moments.of, name) if scheme.moments_for(name) and stats is not None else None
    return Variant.fit(scheme, weight_OC, chain, grid, moments, dtype)


def _checked_linears(denoiser: nn.Module, plan: QuantPlan, backend: Backend) -> dict[str, nn.Linear]:
    linears = linears_of(denoiser)
    for name in plan.layers:
        if name not in linears:
            raise UserError(f"the plan quantizes {name}, which is no Linear of the model; {close_names(name, linears)}")
        for segment in range(plan.num_segments):
            scheme = plan.scheme(name, segment)
            if scheme is None:
                continue
            check_supported(backend, name, scheme)
            for transform in scheme.transforms:
                transform.check(name, linears[name].in_features)
            check_rank(scheme.low_rank, linears[name].in_features, linears[name].out_features, name)
            for spec in (scheme.weight, scheme.activation):
                if spec is not None:
                    check_group_size(linears[name].in_features, spec.group_size, name)
    return linears


def _check_stats(plan: QuantPlan, stats: CalibrationStats | None, name: str, segment: int, stand_in: int) -> None:
    scheme = plan.scheme(name, segment)
    if scheme is not None and scheme.needs_stats:
        assert stats is not None
        if scheme.moments_for(name):
            stats.moments.check(name, float(stats.segment(name, 0.0, 1.0).amax("max").max()))
        stats.segment(name, plan.edges[stand_in], plan.edges[stand_in + 1])


def quant_linear(
    name: str, linear: nn.Linear, plan: QuantPlan, make: MakeVariant, context: StepContext, backend: Backend
) -> QuantLinear:
    """Segments whose tensors cannot differ share one variant."""
    variants: list[Variant] = []
    index_of: dict[tuple[str | None, int | None], int] = {}
    segment_to_variant = []
    for segment, scheme_name in enumerate(plan.layers[name]):
        scheme = plan.scheme(name, segment) or LayerScheme(None, None)
        key = (scheme_name, segment if scheme.per_segment else None)
        if key not in index_of:
            index_of[key] = len(variants)
            variants.append(make(linear, scheme, plan.edges[segment], plan.edges[segment + 1]))
        segment_to_variant.append(index_of[key])
    return QuantLinear(name, linear.bias, variants, segment_to_variant, linear.out_features, context, backend)

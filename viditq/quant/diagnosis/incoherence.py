"""Incoherence, amax / mean |x|: how far the largest value sticks out, and what scaling and rotation do about it.

A grid of b bits spans the largest value, so the error of the others grows with it. ViDiT-Q (arXiv 2406.02540) shows one
layer's 40.8 raw, 17.8 scaled, 12.8 rotated and 5.0 with both.

A rotation mixes channels, so what it does to activations cannot be had from the ranges of channels in the statistics:
all four variants are computed on the same kept input rows. Those are a sample (at most `rows_per_bucket` per bucket of
noise levels), so a peak rarer than one row in that many may be missing. The scales do know it: they come from the
largest magnitude of each channel over everything seen. Of a weight beyond SAMPLE elements, rows at equal distances.

Legend: O out_features, C in_features, n rows.
"""

from collections.abc import Mapping

from torch import Tensor

from viditq.mapped import release
from viditq.quant.calibration.observers import CalibrationStats
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.methods.transforms import Chain, RotateSpec, SmoothSpec, Transform

VARIANTS = ("raw", "scaled", "rotated", "both")
SCALE = SmoothSpec(0.5, aggregate="max")
ROTATE = RotateSpec()
SAMPLE = 2**21  # elements of a weight


def incoherence_of(x: Tensor) -> float:
    """amax / mean |x| of a whole tensor: at least 1, 0 for zeros; about 6 for a million Gaussian numbers."""
    mean = float(x.abs().float().mean())
    return float(x.abs().amax()) / mean if mean else 0.0


def incoherence(
    stats: CalibrationStats,
    weights: Mapping[str, Tensor],
    scale: SmoothSpec = SCALE,
    rotate: RotateSpec = ROTATE,
    noise_levels: tuple[float, float] = (0.0, 1.0),
) -> dict[str, dict[str, dict[str, float]]]:
    """{layer: {"activation": {raw, scaled, rotated, both}, "weight": likewise}}, in the order of `weights`.

    weights: layer -> [O, C]. Activations are the kept input rows of `noise_levels`, taken as one tensor. Raises
    UserError for layers without statistics there.
    """
    out: dict[str, dict[str, dict[str, float]]] = {}
    for layer, weight_OC in weights.items():
        segment = stats.segment(layer, *noise_levels)
        scheme = LayerScheme(None, QuantSpec(8, granularity="token", dynamic=True))
        scaled, rotated = scale.fit(weight_OC, segment, scheme), rotate.fit(weight_OC, None, scheme)
        transforms: list[list[Transform]] = [[], [scaled], [rotated], [scaled, rotated]]
        chains = {name: Chain(parts) for name, parts in zip(VARIANTS, transforms, strict=True)}
        rows_nC = segment.rows.to(weight_OC.device)
        sample_nC = weight_OC.detach()[:: -(-weight_OC.numel() // SAMPLE)].float()
        out[layer] = {
            "activation": {name: incoherence_of(chain.activation(rows_nC)) for name, chain in chains.items()},
            "weight": {name: incoherence_of(chain.weight(sample_nC)) for name, chain in chains.items()},
        }
        release([weight_OC])
        stats.let_go(layer)
    return out

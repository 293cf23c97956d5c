"""Incoherence, amax / mean |x|: how far the largest value sticks out, and what scaling and rotation do about it.

A grid of b bits spans the largest value, so the error of the others grows with it. ViDiT-Q (arXiv 2406.02540) shows one
layer's 40.8 raw, 17.8 scaled, 12.8 rotated and 5.0 with both. Legend: O out_features, C in_features, n rows.
"""

from collections.abc import Mapping

from torch import Tensor

from viditq.quant.observers import CalibrationStats
from viditq.quant.scheme import LayerScheme, QuantSpec
from viditq.quant.transforms import Chain, RotateSpec, SmoothSpec

SCALE = SmoothSpec(0.5, aggregate="max")
ROTATE = RotateSpec()


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

    weights: layer -> [O, C]. Activations are the kept input rows of `noise_levels`. Raises UserError for layers
    without statistics there.
    """
    out: dict[str, dict[str, dict[str, float]]] = {}
    for layer, weight_OC in weights.items():
        weight_OC = weight_OC.detach().float()
        segment = stats.segment(layer, *noise_levels)
        scheme = LayerScheme(None, QuantSpec(8, granularity="token", dynamic=True))
        scaled, rotated = scale.fit(weight_OC, segment, scheme), rotate.fit(weight_OC, None, scheme)
        chains = {
            "raw": Chain(),
            "scaled": Chain([scaled]),
            "rotated": Chain([rotated]),
            "both": Chain([scaled, rotated]),
        }
        rows_nC = segment.rows.to(weight_OC.device)
        out[layer] = {
            "activation": {name: incoherence_of(chain.activation(rows_nC)) for name, chain in chains.items()},
            "weight": {name: incoherence_of(chain.weight(weight_OC)) for name, chain in chains.items()},
        }
    return out

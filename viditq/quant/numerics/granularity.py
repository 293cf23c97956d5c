"""Which elements share a scale.

Legend: O out_features, C in_features, G groups, g group_size (C = G g), L leading (batch) axis of an
activation, n rows of an activation, S sets of elements that share a scale, E elements of each.
"""

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.mapped import in_pieces

Range = tuple[Tensor, Tensor]


def check_group_size(in_features: int, group_size: int | None, layer: str = "this tensor") -> None:
    """Raises UserError when `in_features` is not a multiple of `group_size`."""
    if group_size is not None and in_features % group_size:
        raise UserError(
            f"{layer} has {in_features} input features, which group_size={group_size} does not divide; "
            "choose a divisor or another granularity for this layer"
        )


def to_groups(x: Tensor, group_size: int | None) -> Tensor:
    """[..., C] -> [..., G, g], a view; unchanged without a group_size."""
    if group_size is None:
        return x
    check_group_size(x.shape[-1], group_size)
    return x.unflatten(-1, (-1, group_size))


def column_amax(weight_OC: Tensor) -> Tensor:
    """Largest magnitude of each column, float32 [C]."""
    extremes = [(piece_nC.amin(0).float(), piece_nC.amax(0).float()) for piece_nC in in_pieces(weight_OC.detach())]
    low_mC, high_mC = (torch.stack(parts) for parts in zip(*extremes, strict=True))
    return torch.maximum(-low_mC.amin(0), high_mC.amax(0))


def weight_range(weight_OC: Tensor, granularity: str, group_size: int | None) -> Range:
    """Smallest and largest weight of each group: tensor [1, 1], channel [O, 1], group [O, G, 1]."""
    view = to_groups(weight_OC, group_size)
    dims = (0, 1) if granularity == "tensor" else (-1,)
    return view.amin(dims, keepdim=True), view.amax(dims, keepdim=True)


def weight_sets(weight_OC: Tensor, granularity: str, group_size: int | None) -> Tensor:
    """The weights that share a scale, as rows [S, E]: tensor S = 1, channel S = O, group S = O G."""
    return (
        weight_OC.reshape(1, -1) if granularity == "tensor" else weight_OC.reshape(-1, group_size or len(weight_OC[0]))
    )


def weight_grid_shape(weight_OC: Tensor, granularity: str, group_size: int | None) -> tuple[int, ...]:
    """Shape of scale and zero point: tensor [1, 1], channel [O, 1], group [O, G, 1]."""
    if granularity == "tensor":
        return (1, 1)
    out_features, in_features = weight_OC.shape
    return (out_features, 1) if group_size is None else (out_features, in_features // group_size, 1)


def activation_sets(x_nC: Tensor, granularity: str, group_size: int | None) -> Tensor:
    """The elements of calibration rows that share a static scale, as rows [S, E]: tensor 1, channel C, group G."""
    if granularity == "tensor":
        return x_nC.reshape(1, -1)
    return x_nC.T if granularity == "channel" else to_groups(x_nC, group_size).transpose(0, 1).flatten(1)


def per_weight(parameter: Tensor, weight_OC: Tensor, group_size: int | None) -> Tensor:
    """A scale or zero point as [O, C]."""
    return parameter.expand_as(to_groups(weight_OC, group_size)).reshape(weight_OC.shape)


def activation_range(x: Tensor, granularity: str, group_size: int | None) -> Range:
    """Ranges of the very tensor being quantized: token [..., 1], group [..., G, 1], tensor [L, 1, ...].

    "tensor" is one range per element of the leading axis: a sample must not depend on its batch mates. A vector is one
    token.
    """
    view = to_groups(x, group_size)
    if granularity == "tensor" and x.ndim > 1:
        shape = (len(x),) + (1,) * (x.ndim - 1)
        rows = x.flatten(1)
        return rows.amin(-1).view(shape), rows.amax(-1).view(shape)
    return view.amin(-1, keepdim=True), view.amax(-1, keepdim=True)  # aminmax is 16x slower on CPU


def calibrated_range(minimum_C: Tensor, maximum_C: Tensor, granularity: str, group_size: int | None) -> Range:
    """Ranges from per-channel extremes seen in calibration: tensor [1], channel [C], group [G, 1]."""
    if granularity == "channel":
        return minimum_C, maximum_C
    return to_groups(minimum_C, group_size).amin(-1, True), to_groups(maximum_C, group_size).amax(-1, True)

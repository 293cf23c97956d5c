"""ConvRot beside what comfy-kitchen defines, and where it cannot go."""

import pytest
import torch
from torch import nn

from viditq.errors import UserError
from viditq.quant import ConvRot, ConvRotSpec, LayerScheme, QuantPlan, QuantSpec, quantize_denoiser

W8A8 = (QuantSpec(8, True, "channel"), QuantSpec(8, True, "token", dynamic=True))


def regular(order: int) -> torch.Tensor:
    """Entry by entry: -1 for each digit of base 4 in which row and column add up to 3."""
    index = torch.arange(order)
    digits = [(index // 4**k) % 4 for k in range(order.bit_length() // 2)]
    sign = torch.ones(order, order, dtype=torch.float64)
    for digit in digits:
        sign *= 1.0 - 2.0 * (digit[:, None] + digit[None] == 3)
    return sign / order**0.5


@pytest.mark.parametrize("group", [16, 64, 256])
def test_each_group_is_multiplied_by_the_regular_matrix(group: int) -> None:
    x = torch.randn(3, 5, 3 * group, dtype=torch.float64, generator=torch.Generator().manual_seed(group))
    wanted = x.unflatten(-1, (3, group)) @ regular(group)
    torch.testing.assert_close(ConvRot(group).activation(x), wanted.flatten(-2), rtol=0, atol=1e-12)
    torch.testing.assert_close(ConvRot(group).weight(x[0]), wanted.flatten(-2)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", [16, 64, 256])
def test_it_undoes_itself_and_leaves_a_common_offset_alone(group: int) -> None:
    rotate = ConvRot(group)
    x = torch.randn(7, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate.activation(rotate.activation(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate.activation(x + 3), rotate.activation(x) + 3, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("setting", "width", "group"),
    [("auto", 1536, 256), ("auto", 1152, 64), ("auto", 2240, 64), ("auto", 48, 16), (16, 1536, 16), (64, 192, 64)],
)
def test_the_group_is_the_largest_that_divides(setting: int | str, width: int, group: int) -> None:
    assert ConvRotSpec(setting).fit(torch.zeros(4, width), None, None).group_size == group
    assert ConvRotSpec(setting).empty(width).group_size == group


@pytest.mark.parametrize(("setting", "width"), [("auto", 40), (256, 192), (64, 96), (16, 24)])
def test_a_layer_that_it_cannot_rotate_is_named_before_anything_changes(setting: int | str, width: int) -> None:
    model = nn.Sequential(nn.Linear(width, 8))
    scheme = LayerScheme(*W8A8, transforms=(ConvRotSpec(setting),))
    plan = QuantPlan((0.0, 1.0), {"x": scheme}, {"0": ("x",)})
    with pytest.raises(UserError, match=f"convrot cannot rotate 0: its {width} inputs"):
        quantize_denoiser(model, plan, None)
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("group", [0, 4, 32, 128, 1024, "largest", True, 64.5])
def test_other_groups_are_refused(group: object) -> None:
    with pytest.raises(UserError, match="give 16, 64, 256 or auto"):
        ConvRotSpec(group)

"""Why comfy-kitchen's int8_linear is no candidate: of half precision its codes are others than `fake`'s."""

import pytest
import torch
from agreement import RELATIVE

from viditq.quant import QuantSpec
from viditq.quant.methods.quantizer import (
    dequantize_weight,
    fake_quantize_activation,
    quantize_activation,
    quantize_weight,
)

kitchen = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
TOKEN, CHANNEL = QuantSpec(8, True, "token", dynamic=True), QuantSpec(8, True, "channel")


@pytest.mark.parametrize(
    ("dtype", "differing", "beyond"),
    [
        (torch.float32, (0, 0), (0, 1)),
        (torch.bfloat16, (0.02, 0.2), (100, 1e5)),
        (torch.float16, (1e-3, 0.05), (100, 1e5)),
    ],
)
def test_codes_of_half_precision_differ_and_those_of_float32_do_not(
    dtype: torch.dtype, differing: tuple[float, float], beyond: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(128, 256).to(dtype), quantize_weight(torch.randn(64, 256), CHANNEL)
    codes = (weight.codes.to(torch.int16) - 128).to(torch.int8)
    with kitchen.use_backend("eager"):
        theirs, _ = kitchen.quantize_int8_rowwise(x)
        out = kitchen.int8_linear(x, codes, weight.scale, out_dtype=torch.float32)
    ours = (quantize_activation(x, TOKEN, None).codes.to(torch.int16) - 128).to(torch.int8)
    assert differing[0] <= float((theirs != ours).float().mean()) <= differing[1]
    rows, columns = fake_quantize_activation(x, TOKEN, None).double(), dequantize_weight(weight, CHANNEL).double()
    bound = RELATIVE * (rows.abs() @ columns.abs().T)
    assert beyond[0] <= float(((out - rows @ columns.T).abs() / bound).max()) <= beyond[1]

#!/usr/bin/env bash
# torchao: Int8Tensor takes a zero point of the weight, dequantizes by it, and multiplies without it.
#
# Expected: F.linear with an Int8Tensor whose weight has zero points agrees with F.linear with its dequantized weight, up to what
# quantizing the activations costs; and symmetric int8 scales are the largest magnitude over 127.
# Seen with torchao 0.18.0 and torch 2.13.0 (CPU): dequantize() is exact, F.linear is off by some 30 % without a warning; with zero points of zero
# it is right within 1 %. Symmetric activation scales are the largest magnitude over 127.5, so that codes reach -128. Whoever writes
# torchao files from other quantizers has to refuse asymmetric weights.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY' 2>/dev/null
import torch
import torchao
from torch.nn.functional import linear
from torchao.quantization import Int8Tensor, PerRow
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

print("torch", torch.__version__, "torchao", torchao.__version__)
torch.manual_seed(0)
codes = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
scale, x = torch.rand(32, 1) * 0.01 + 0.01, torch.randn(16, 64)
acts = QuantizeTensorToInt8Kwargs(granularity=PerRow(), mapping_type=MappingType.SYMMETRIC)


def errors(zero: torch.Tensor) -> tuple[float, float]:
    """Of dequantize() and of F.linear, relative."""
    exact = (codes.float() - zero.float()) * scale
    weight = Int8Tensor(codes, scale, [1, 64], torch.float32, zero_point=zero, act_quant_kwargs=acts)
    held = float((weight.dequantize() - exact).norm() / exact.norm())
    out, wanted = linear(x, weight), linear(x, exact)
    return held, float((out - wanted).norm() / wanted.norm())


plain = errors(torch.zeros(32, 1, dtype=torch.int8))
shifted = errors(torch.randint(-40, 40, (32, 1), dtype=torch.int8))
print(f"zero points of 0: dequantize {plain[0]:.1e}, F.linear {plain[1]:.1e}")
print(f"zero points up to 40: dequantize {shifted[0]:.1e}, F.linear {shifted[1]:.1e}")
made = Int8Tensor.from_hp(x, granularity=PerRow(), mapping_type=MappingType.SYMMETRIC)
over = float((x.abs().amax(1) / made.scale.flatten()).mean())
print(f"largest magnitude over the scale: {over:.2f}")
assert plain[1] < 0.02 and shifted[0] < 1e-6 and shifted[1] > 0.05 and abs(over - 127.5) < 0.1, "the behaviour has changed"
PY

#!/usr/bin/env bash
# torchao: symmetric int8 puts each row's largest value midway between two codes, and rounds the scale to the input's type.
#
# Expected: symmetric int8 as elsewhere, scale = largest magnitude / 127, so that the largest value is a code exactly; a scale that is asked for in
# float32 is computed in it, and the same numbers have the same codes in bfloat16 and float32.
# Seen with torchao 0.18.0 and torch 2.13.0 (CPU): scale = largest / 127.5; the largest value is 127.5 steps, and since torchao multiplies by
# 1 / scale, a negative one becomes -127 in some rows and -128 in others, by the last bit of that quotient, a positive one always 127. In bfloat16
# the scale is rounded to 8 bits before it becomes float32: other codes than in float32 in one place of thirteen. To compute the same codes elsewhere: 127.5, multiply by 1 / scale,
# and do so in float32.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - 2>/dev/null <<'PY'
from importlib.metadata import version

import torch
from torchao.quantization import Int8Tensor
from torchao.quantization.granularity import PerRow
from torchao.quantization.quant_primitives import MappingType

print("torch", torch.__version__, "torchao", version("torchao"))
torch.manual_seed(0)
half = torch.randn(4000, 96).bfloat16()
x = torch.randn(4000, 96)
of_x, of_half, of_wide = (Int8Tensor.from_hp(v, PerRow(), mapping_type=MappingType.SYMMETRIC) for v in (x, half, half.float()))
codes = of_x.qdata[x.abs() == x.abs().amax(-1, True)]
counts = {code: int((codes == code).sum()) for code in (-128, -127, 127)}
print("codes of the largest values:", counts, "; scale * 127.5 / largest:", float((of_x.scale * 127.5 / x.abs().amax(-1, True)).mean()))
other = float((of_half.qdata != of_wide.qdata).float().mean())
print(f"bfloat16 against the same numbers in float32: {other:.1%} of the codes differ; scales equal: {torch.equal(of_half.scale, of_wide.scale)}")
by_hand = (x * (1 / of_x.scale)).round().clamp(-128, 127).to(torch.int8)
assert torch.equal(by_hand, of_x.qdata), "the behaviour has changed"
assert counts[-128] > 100 and counts[-127] > 100 and sum(counts.values()) == len(codes), "the behaviour has changed"
assert other > 0.01 and not torch.equal(of_half.scale, of_wide.scale), "the behaviour has changed"
PY

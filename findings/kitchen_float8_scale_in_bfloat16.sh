#!/usr/bin/env bash
# comfy-kitchen: weights of 8-bit floating point, widened to bfloat16, are all too large or too small by up to 0.4 %, since their scale is rounded first.
#
# Expected: a weight of float8_e4m3fn with one float32 scale becomes the product rounded to bfloat16 once: errors of both signs, whose mean is near 0.
# Seen with comfy-kitchen 0.2.40 and torch 2.13.0 (CPU, eager): dequantize_per_tensor_fp8 rounds the scale to the output's type and then multiplies, so
# that with a scale midway between two numbers of bfloat16 the mean of the whole layer is off by 0.4 %, many times what rounding once leaves.
# The product of 8-bit numbers (scaled_mm) takes the float32 scale: the two ways of computing one layer differ by that. Widen in float32, and round once.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 comfy-kitchen==0.2.40 packaging==25.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import comfy_kitchen as kitchen
import torch

print("torch", torch.__version__, "comfy-kitchen", version("comfy-kitchen"))
torch.manual_seed(0)
codes, scale = torch.randn(256, 256).mul(50).to(torch.float8_e4m3fn), torch.tensor(1.0117)
exact = codes.double() * scale.double()
once = exact.to(torch.bfloat16).double()
with kitchen.use_backend("eager"):
    theirs = kitchen.dequantize_per_tensor_fp8(codes, scale, torch.bfloat16).double()
there = exact != 0
off = {name: float((got[there] / exact[there]).mean() - 1) for name, got in (("once", once), ("theirs", theirs))}
print(f"mean relative error: rounded once {off['once']:+.2e}, theirs {off['theirs']:+.2e}; scale {float(scale):.5f} became {float(scale.bfloat16()):.5f}")
assert abs(off["theirs"]) > 2e-3 > 3 * abs(off["once"]), "the behaviour has changed"
PY

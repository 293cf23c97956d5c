#!/usr/bin/env bash
# Casting to FP8: what is too large becomes 448 in torch's e4m3, infinity included, and inf in its e5m2; NaN in ml_dtypes' e4m3.
#
# Expected: one rule for both formats, and the same in both libraries.
# Seen with torch 2.13.0 (CPU) and ml_dtypes 0.6.0, in every float type and size tried: torch's e4m3fn saturates, so an infinite activation comes out as a plain
# 448; its e5m2 overflows to inf from 61440 on; ml_dtypes gives NaN for e4m3fn from 465 on and agrees with torch on e5m2. The shared exponent type
# differs too: 0 becomes 2^-127 in torch's e8m0fnu and NaN in ml_dtypes'. Whoever emulates FP8 by casts should clamp before and look for infinities himself.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 ml_dtypes==0.6.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY' 2>/dev/null
import ml_dtypes
import numpy
import torch

print("torch", torch.__version__, "ml_dtypes", ml_dtypes.__version__)
numpy.seterr(all="ignore")
x = torch.tensor([448.0, 464.0, 465.0, 1e6, float("inf"), 57344.0, 61440.0])
seen = {}
for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
    given = torch.tensor([0.0, 1.5, 3.0]) if "e8m0" in name else x
    seen[name] = given.to(getattr(torch, name)).float().tolist()
    other = given.numpy().astype(getattr(ml_dtypes, name)).astype(numpy.float32).tolist()
    print(f"{name} of {given.tolist()}\n  torch     {seen[name]}\n  ml_dtypes {other}")
    seen[f"{name} ml"] = other
inf = float("inf")
assert seen["float8_e4m3fn"] == [448.0] * 7, "the behaviour has changed"
assert [v != v for v in seen["float8_e4m3fn ml"]] == [False, False, True, True, True, True, True], "the behaviour has changed"
assert seen["float8_e5m2"][3:] == [inf, inf, 57344.0, inf] == seen["float8_e5m2 ml"][3:], "the behaviour has changed"
assert seen["float8_e8m0fnu"][0] == 2.0**-127 and seen["float8_e8m0fnu ml"][0] != seen["float8_e8m0fnu ml"][0], "the behaviour has changed"
PY

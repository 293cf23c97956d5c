#!/usr/bin/env bash
# torch on a CPU: scaled_dot_product_attention refuses a mask of one axis, though its documentation asks for a broadcastable one.
#
# Expected: a float or bool mask [keys] broadcasts with [batch, heads, queries, keys], as it does in an explicit softmax.
# Seen with torch 2.13.0 (CPU): IndexError "Dimension out of range"; [1, keys] works. What helps: view masks with two axes at least.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
q = k = v = torch.randn(1, 2, 4, 64)
mask = torch.zeros(4)
explicit = torch.softmax(q @ k.transpose(-1, -2) / 8 + mask, -1) @ v
two_axes = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
assert torch.allclose(explicit, two_axes, atol=1e-5)
try:
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
except IndexError as error:
    print("mask [4]: IndexError:", str(error).splitlines()[0])
else:
    raise SystemExit("the behaviour has changed: a mask of one axis is taken")
PY

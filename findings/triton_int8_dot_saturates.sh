#!/usr/bin/env bash
# triton: tl.dot of int8 saturates its int32 sums on sm_80 and sm_89, and wraps them on sm_90 and in the interpreter.
#
# Expected: one kernel means one thing on every GPU; an int32 that overflows wraps, as it does in its interpreter, in torch._int_mm and in C with -fwrapv.
# Seen with triton 3.9.0, compiling without a GPU: the products for sm_80 and sm_89 are mma.sync...satfinite.s32.s8.s8.s32, which clamps at the largest int32;
# for sm_90 wgmma without .satfinite, which wraps. Who lets partial sums wrap and subtracts a zero point's term afterwards is right on one and wrong on the
# other, without a message. What helps: cut the sum so that no partial sum can leave an int32 (131,071 products of -128 x -128 stay within).
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.9.0 numpy==2.4.6 2>/dev/null
cat > "$folder/kernel.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out, K, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.int32)
    for k in range(0, K, BLOCK):
        left = tl.load(a + i[:, None] * K + k + i[None, :])
        right = tl.load(b + i[None, :] * K + k + i[:, None])
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
    tl.store(out + i[:, None] * BLOCK + i[None, :], acc)


print("triton", triton.__version__)
found = {}
for capability in (80, 89, 90):
    signature = {"a": "*i8", "b": "*i8", "out": "*i32", "K": "i32", "BLOCK": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(product, signature, {"BLOCK": 64}, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    found[capability] = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[\w.]*s8[\w.]*", ptx)))
    print(f"sm_{capability}:", *found[capability])
saturates = {capability: all("satfinite" in name for name in names) for capability, names in found.items()}
assert all(found.values()) and saturates == {80: True, 89: True, 90: False}, "the behaviour has changed"
PY
"$folder/venv/bin/python" -W ignore "$folder/kernel.py"

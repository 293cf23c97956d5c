#!/usr/bin/env bash
# triton: on sm_90 a product of int8 waits for itself, where one of float16 or FP8 stays under way while the next begins.
#
# Expected: tl.dot in a pipelined loop becomes wgmma that runs on while the next tiles are fetched, for int8 as for float16: the instruction is asynchronous for both.
# Seen with triton 3.7.1 (the one of CUDA builds of torch 2.13), compiling without a GPU: of the same kernel the wait behind the product leaves 1 product pending for
# float16 and FP8, and 0 for int8. So each int8 product ends before the next begins, and twice the arithmetic of float16 is not to be had from this loop.
# What helps: more warps a block or more blocks a multiprocessor, whose products fill the gaps, and a trial of several cuts instead of one that was tuned for float16.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.7.1 numpy==2.4.6 2>/dev/null
cat > "$folder/kernel.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out, K, SUM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, STEP)
    left, right = a + i[:, None] * K + k[None, :], b + i[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK, BLOCK), SUM)
    for _ in range(0, K // STEP):
        acc = tl.dot(tl.load(left), tl.load(right), acc, out_dtype=SUM)
        left += STEP
        right += STEP
    tl.store(out + i[:, None] * BLOCK + i[None, :], acc)


print("triton", triton.__version__)
pending = {}
for kind, acc, sums, step in (
    ("fp16", tl.float32, "*fp32", 64),
    ("fp8e4nv", tl.float32, "*fp32", 128),
    ("i8", tl.int32, "*i32", 128),
):
    signature = {"a": f"*{kind}", "b": f"*{kind}", "out": sums, "K": "i32"}
    signature |= dict.fromkeys(("SUM", "BLOCK", "STEP"), "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(product, signature, {"SUM": acc, "BLOCK": 128, "STEP": step}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
    assert "wgmma.mma_async" in made.asm["ptx"]
    pending[kind] = int(re.findall(r"warp_group_dot_wait.*?pendings = (\d)", made.asm["ttgir"])[0])
    print(f"{kind}: products under way while the next begins: {pending[kind]}")
assert pending == {"fp16": 1, "fp8e4nv": 1, "i8": 0}, "the behaviour has changed"
PY
"$folder/venv/bin/python" -W ignore "$folder/kernel.py"

#!/usr/bin/env bash
# torch on a CPU: torch._int_mm of matrices with one inner column gives sums that are wrong.
#
# Expected: int8 [5, 1] x [1, 7] gives the exact int32 outer product, as every other inner size does.
# Seen with torch 2.13.0 (CPU): the result differs from the exact one and from call to call, without an error; inner sizes from 2 on
# are exact. Layers with one input feature are rare, but a group or a remainder of one column is not. What helps: pad
# the inner size with a zero column.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)
torch.manual_seed(0)


def wrong(inner: int) -> int:
    """How many of 20 products are not exact."""
    count = 0
    for _ in range(20):
        a = torch.randint(-128, 128, (5, inner), dtype=torch.int8)
        w = torch.randint(-128, 128, (7, inner), dtype=torch.int8)
        count += not torch.equal(torch._int_mm(a, w.t()), a.int() @ w.int().t())
    return count


found = {inner: wrong(inner) for inner in (1, 2, 3, 8, 17)}
print("inexact products of 20, by inner size:", found)
assert found[1] > 0 and not any(count for inner, count in found.items() if inner > 1), "the behaviour has changed"
PY

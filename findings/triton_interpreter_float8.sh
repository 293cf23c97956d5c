#!/usr/bin/env bash
# triton: its interpreter casts float32 to FP8 wrongly, by up to half of the number, and multiplies NaN of e4m3 as 480.
#
# Expected: .to(tl.float8e4nv) under TRITON_INTERPRET=1 gives what it gives on a GPU and in torch: the nearest number, ties to even, too large ones saturated.
# Seen with triton 3.9.0: 1.99 becomes 1.0 and 7.9 becomes 4.0 (where a mantissa rounds up to the next power of two, at every second power the carry is lost), ties go away from zero,
# numbers below the smallest normal one are cut off (0.003 is 0.002, not 0.0039), and what is too large becomes anything: 600 is 288, 1000 is 256. tl.dot reads e4m3's NaN as 480. Who tests a
# kernel of FP8 under the interpreter tests another one. What helps: round by arithmetic on the bits of float32, and store bytes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 triton==3.9.0 numpy==2.4.6 2>/dev/null
cat > "$folder/kernel.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.float8e4nv))


@triton.jit
def product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


print("triton", triton.__version__, "torch", torch.__version__)
x = torch.tensor([1.99, 7.9, 1.0625, 3.0, 0.25, 0.003, 600.0, 1000.0])
found = torch.zeros(8, dtype=torch.float8_e4m3fn)
cast[(1,)](x, found, N=8)
wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn)
for given, mine, right in zip(x.tolist(), found.float().tolist(), wanted.float().tolist()):
    print(f"{given:10.4f}  interpreter {mine:10.4f}  torch {right:10.4f}")
nan = torch.full((32, 32), torch.nan).to(torch.float8_e4m3fn)
out = torch.zeros(32, 32)
product[(1,)](nan, torch.eye(32).to(torch.float8_e4m3fn), out, N=32)
print("NaN times one, in tl.dot:", out[0, 0].item())
assert found.float().tolist()[:3] == [1.0, 4.0, 1.125] and wanted.float().tolist()[:3] == [2.0, 8.0, 1.0], "the behaviour has changed"
assert out[0, 0].item() == 480.0, "the behaviour has changed"
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/kernel.py"

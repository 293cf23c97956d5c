#!/usr/bin/env bash
# torch.compile: what is written to a contiguous tensor by `out=` comes out with the strides of its sources, while `is_contiguous()` in the compiled function says True.
#
# Expected: `torch.add(a, b, out=torch.empty(shape))` leaves the strides of `out` alone, as in eager mode; a function that has asked `out.is_contiguous()` may hand it to a custom operator that reads rows through a pointer.
# Seen with torch 2.13.0 (CPU, Python 3.11): with backend="eager" that holds; with "aot_eager" and "inductor" the sum takes the place of `out`, so that an operand of a permuted view hands on its strides. A branch on
# `is_contiguous()` is traced as taken, a `.contiguous()` behind it changes nothing, and the operator's own implementation gets a tensor that is not contiguous - also where it was declared with the tag
# needs_exact_strides, as the strides it is held to are those of the sources. Values are right. `(a + b).contiguous()` is contiguous everywhere.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 2>/dev/null
cat > "$folder/out.py" <<'PYTHON'
import torch

seen = []


@torch.library.custom_op("found::read", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def read(x: torch.Tensor) -> torch.Tensor:
    seen.append(x.stride())
    return x.clone()


@read.register_fake
def _(x):
    return torch.empty_like(x)


def written(a, b):
    out = torch.empty(b.shape)
    torch.add(a, b, out=out)
    if not out.is_contiguous():
        out = torch.zeros(b.shape)  # never: both modes say that it is
    return read(out.contiguous())


def added(a, b):
    return read((a + b).contiguous())


a, b = torch.ones(6, 1, 8), torch.arange(96.0).view(2, 6, 8).permute(1, 0, 2)
print("torch", torch.__version__)
for function in (written, added):
    for backend in (None, "eager", "aot_eager"):
        torch._dynamo.reset()
        run = function if backend is None else torch.compile(function, backend=backend)
        right = torch.equal(run(a, b), a + b)
        print(function.__name__, backend, "the operator sees strides", seen[-1], "values right:", right)
PYTHON
out=$("$folder/venv/bin/python" "$folder/out.py" 2>/dev/null)
echo "$out"
[[ $(grep -c "(16, 8, 1) values right: True" <<< "$out") == 5 && $out == *"written aot_eager the operator sees strides (8, 48, 1) values right: True"* ]] || { echo "the behaviour has changed"; exit 1; }

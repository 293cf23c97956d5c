#!/usr/bin/env bash
# torch: in a build without CUDA, FakeTensorMode makes tensors on "cuda" and adds them, but a Linear on them, an index and .to("cuda") raise.
#
# Expected: fake tensors compute nothing, so that under FakeTensorMode a whole model can be followed on a device that the machine has not, e.g. to see whether all
# tensors of a quantized pipeline lie on one device.
# Seen with torch 2.13.0+cpu: torch.empty(4, 8, device="cuda"), sums, scaled_dot_product_attention, .cpu() and .to("cuda:0") work, and a sum of tensors of two devices is
# refused as on a GPU. Whatever asks for the current device of that kind raises "PyTorch is not linked with support for cuda devices": .to("cuda") without a number,
# nn.Linear with a bias, x[index]; Module.to("cuda:0") ends with "Couldn't swap Linear.weight". So no real model passes.
# What helps: a library of thirty lines that registers a device guard and CUDA hooks that do nothing, loaded before torch is imported; then a wrapper subclass of Tensor
# that says cuda:0 and holds a tensor of the CPU follows whole models with their values, autograd included.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
cat > "$folder/fake.py" <<'PY'
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

print("torch", torch.__version__, "CUDA", torch.version.cuda)
if torch.version.cuda is not None:
    raise SystemExit("this is a build with CUDA, and the finding is of one without")


def seen(call):
    try:
        return str(call())
    except RuntimeError as error:
        return f"raises: {str(error).splitlines()[0][:70]}"


with FakeTensorMode():
    x, here = torch.empty(4, 8, device="cuda"), torch.ones(4, 8)
    found = {
        "a sum": seen(lambda: (x + x).device),
        "attention": seen(lambda: nn.functional.scaled_dot_product_attention(*3 * [torch.empty(1, 1, 4, 8, device="cuda")]).device),
        ".to('cuda:0')": seen(lambda: here.to("cuda:0").device),
        "two devices": seen(lambda: x + here),
        ".to('cuda')": seen(lambda: here.to("cuda").device),
        "a Linear": seen(lambda: nn.Linear(8, 2, device="cuda")(x).device),
        "an index": seen(lambda: x[torch.tensor([0, 1])].device),
    }
for name, what in found.items():
    print(f"{name}: {what}")
unlinked = "raises: PyTorch is not linked with support for cuda devices"
assert [found[name] for name in ("a sum", "attention", ".to('cuda:0')")] == 3 * ["cuda:0"], "the behaviour has changed"
assert "same device" in found["two devices"], "the behaviour has changed"
assert [found[name] for name in (".to('cuda')", "a Linear", "an index")] == 3 * [unlinked], "the behaviour has changed"
PY
"$folder/venv/bin/python" -W ignore "$folder/fake.py" 2>/dev/null

#!/usr/bin/env bash
# torch: a timestep that a pipeline has expanded for one prompt cannot be looked at as bytes, not even after contiguous().
#
# Expected: what contiguous() returns can be viewed in another dtype, as hashing and writing files do.
# Seen with torch 2.13.0 (CPU): expand leaves the single number a stride of 0. is_contiguous() says True, so contiguous() returns it as it is, and
# view(torch.uint8) raises "self.stride(-1) must be 1 ... but got 0". With two prompts it works, as contiguous() copies then. Diffusers' pipelines expand
# timesteps so at each step, so that code which stores a denoiser's inputs fails for a batch of one alone. clone() keeps the stride; as_strided((n,), (1,)) helps.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY' 2>/dev/null
import torch

print("torch", torch.__version__)


def as_bytes(x):
    try:
        return f"{x.view(torch.uint8).numel()} bytes"
    except RuntimeError as error:
        return str(error)


timestep = torch.tensor(999)
seen = []
for prompts in (1, 2):
    x = timestep.expand(prompts).contiguous()
    for how, y in (("contiguous", x), ("clone", x.clone()), ("as_strided", x.as_strided((prompts,), (1,)))):
        seen.append(as_bytes(y))
        print(f"{prompts} prompts, {how}: is_contiguous {y.is_contiguous()}, stride {y.stride()}: {seen[-1]}")
assert "must be 1" in seen[0] and "must be 1" in seen[1] and seen[2] == "8 bytes" and seen[3:] == ["16 bytes"] * 3, "the behaviour has changed"
PY

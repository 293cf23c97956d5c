#!/usr/bin/env bash
# diffusers: HeliosPyramidPipeline with its scheduler's own gamma, 1/3, ends on a CPU where the second size begins.
#
# Expected: noise for the next size, as with any other gamma below 1/3.
# Seen with diffusers 0.42.1 and torch 2.13 on a CPU: LinAlgError of linalg.cholesky in sample_block_noise. The covariance of a block of n pixels,
# (1 + gamma) I - gamma 1, has the eigenvalue 1 - (n - 1) gamma, which is 0 for blocks of 2 x 2 and gamma = 1/3; the 1e-8 that is added to its
# diagonal is less than float32 resolves beside 1, so that rounding alone decides whether it is positive.
# What helps: a gamma a little less (0.33), or factors from torch.linalg.eigh.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY' 2>/dev/null
from types import SimpleNamespace

import diffusers
import torch

print("diffusers", diffusers.__version__, "torch", torch.__version__)
failed = []
for gamma in (diffusers.HeliosScheduler().config.gamma, 0.33):
    pipeline = SimpleNamespace(scheduler=diffusers.HeliosScheduler(gamma=gamma))
    try:
        noise = diffusers.HeliosPyramidPipeline.sample_block_noise(
            pipeline, 1, 16, 9, 8, 8, (1, 2, 2), torch.device("cpu"), torch.Generator().manual_seed(0)
        )
        print(f"gamma {gamma:.4f}: noise of {tuple(noise.shape)}")
    except torch.linalg.LinAlgError as error:
        print(f"gamma {gamma:.4f}:", error)
        failed.append(gamma)
assert failed == [1 / 3], "the behaviour has changed"
PY

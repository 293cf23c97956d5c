#!/usr/bin/env bash
# diffusers: PRXPixelPipeline, asked for tensors, hands on what it denoised, from -1 to 1 and beyond, where an array of the same call is a picture.
#
# Expected: output_type="pt" and "np" give one picture, from 0 to 1, as a tensor and as an array, as other pipelines do.
# Seen with diffusers 0.42.1 and torch 2.13.0 (CPU): "np" is from 0 to 1; "pt" is what "latent" is. A caller who clamps it to 0 and 1 gets
# pictures whose darker half is black, without an error.
# What helps: output_type="np".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY' 2>/dev/null
import diffusers
import torch

print("diffusers", diffusers.__version__)
torch.manual_seed(0)
sizes = {"in_channels": 3, "context_in_dim": 16, "hidden_size": 16, "num_heads": 2, "depth": 1, "axes_dim": [4, 4]}
transformer = diffusers.PRXTransformer2DModel(**sizes, patch_size=8)
pipeline = diffusers.PRXPixelPipeline(transformer, diffusers.FlowMatchEulerDiscreteScheduler(), None, None)
embeds = torch.randn(1, 4, 16)
settings = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0, "use_resolution_binning": False}
seen = {}
for kind in ("np", "pt", "latent"):
    noise = torch.Generator().manual_seed(0)
    out = pipeline(prompt_embeds=embeds, **settings, generator=noise, output_type=kind, return_dict=False)[0]
    seen[kind] = torch.as_tensor(out)
    print(f"{kind}: from {seen[kind].min():.2f} to {seen[kind].max():.2f}")
assert 0 <= seen["np"].min() and seen["np"].max() <= 1, "the behaviour has changed"
assert torch.equal(seen["pt"], seen["latent"]) and seen["pt"].min() < -0.1, "the behaviour has changed"
PY

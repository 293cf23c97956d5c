#!/usr/bin/env bash
# diffusers: PRXPipeline takes two prompts, and takes guidance, but not both.
#
# Expected: a list of prompts is sampled together, with guidance as without.
# Seen with diffusers 0.42.1 and torch 2.13.0 (CPU): with guidance the latents and the texts are doubled, and the timestep is repeated twice whatever
# the number of prompts is; from two prompts on the call ends in a RuntimeError about tensor a (2) and tensor b (4).
# What helps: one prompt a call.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY' 2>/dev/null
import diffusers
import torch

print("diffusers", diffusers.__version__)
torch.manual_seed(0)
sizes = {"in_channels": 4, "context_in_dim": 16, "hidden_size": 16, "num_heads": 2, "depth": 1, "axes_dim": [4, 4]}
transformer = diffusers.PRXTransformer2DModel(**sizes)
pipeline = diffusers.PRXPipeline(transformer, diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None)
seen = {}
for prompts, guidance in ((1, 5.0), (2, 1.0), (2, 5.0)):
    embeds = {name: torch.randn(prompts, 4, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "use_resolution_binning": False}
    try:
        out = pipeline(**embeds, **settings, guidance_scale=guidance, output_type="latent", return_dict=False)[0]
        seen[prompts, guidance] = tuple(out.shape)
    except RuntimeError as error:
        seen[prompts, guidance] = str(error)
    print(f"{prompts} prompts, guidance {guidance}:", seen[prompts, guidance])
assert seen[1, 5.0] == (1, 4, 4, 4) and seen[2, 1.0] == (2, 4, 4, 4), "the behaviour has changed"
assert "must match the size of tensor b (4)" in seen[2, 5.0], "the behaviour has changed"
PY

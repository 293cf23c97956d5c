#!/usr/bin/env bash
# diffusers: LTXPipeline documents an argument timesteps, and refuses every value of it.
#
# Expected: the distilled LTX-Video, which the documentation gives timesteps of its own, is sampled so by LTXPipeline too.
# Seen with diffusers 0.42.1 and torch 2.13.0 (CPU): the call makes sigmas always, hands both on, and ends in "Only one of `timesteps` or `sigmas` can
# be passed", whatever the timesteps are; LTXConditionPipeline, on the same parts, takes them.
# What helps: LTXConditionPipeline, without conditions.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY' 2>/dev/null
import diffusers
import torch

print("diffusers", diffusers.__version__)
sizes = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 8, "num_layers": 1}
transformer = diffusers.LTXVideoTransformer3DModel(num_attention_heads=2, attention_head_dim=8, **sizes)
widths = {"block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4}
layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
vae = diffusers.AutoencoderKLLTXVideo(latent_channels=8, **widths, **layers)
prompt = {"prompt_embeds": torch.randn(1, 4, 8), "prompt_attention_mask": torch.ones(1, 4)}
seen = {}
for cls in (diffusers.LTXPipeline, diffusers.LTXConditionPipeline):
    none = {"text_encoder": None, "tokenizer": None}
    pipeline = cls(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **none)
    settings = {"guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": 9, "output_type": "latent"}
    try:
        seen[cls.__name__] = tuple(pipeline(**prompt, **settings, timesteps=[1000, 500], return_dict=False)[0].shape)
    except ValueError as error:
        seen[cls.__name__] = str(error)
    print(f"{cls.__name__}, timesteps=[1000, 500]:", seen[cls.__name__])
assert "Only one of `timesteps` or `sigmas`" in seen["LTXPipeline"], "the behaviour has changed"
assert seen["LTXConditionPipeline"] == (1, 8, 2, 1, 1), "the behaviour has changed"
PY

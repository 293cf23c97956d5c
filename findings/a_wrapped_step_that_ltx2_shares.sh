#!/usr/bin/env bash
# diffusers: LTX2Pipeline (and Kandinsky6TI2VAPipeline) step their sound by copy.deepcopy(self.scheduler). A step that was replaced by a function is
# not copied: it goes on stepping the frames' own scheduler, for the sound too.
#
# Expected: pipe.scheduler.step = wrapper(pipe.scheduler.step), by which steps are logged or changed, alters nothing of a sample when it only calls the original.
# Seen with diffusers 0.42.1 and torch 2.13.0 (CPU): Python copies functions as they are, with the bound method that they hold. With FlowMatchEulerDiscreteScheduler
# the one scheduler is stepped twice a step and the call ends in an IndexError. What helps: functools.partial of the bound method, or an object with
# __call__ that holds it: both are copied in depth, and step the copy.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY' 2>/dev/null
import functools

import diffusers
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

print("diffusers", diffusers.__version__)
torch.manual_seed(0)
heads = {f"{kind}_connector_{what}": n for kind in ("video", "audio") for what, n in {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}.items()}
registers = {f"{kind}_connector_num_learnable_registers": 4 for kind in ("video", "audio")}
rope = {"rope_double_precision": False, "rope_type": "split"}
video = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
audio = {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8}
transformer = diffusers.LTX2VideoTransformer3DModel(
    **video, **audio, **rope, num_layers=1, qk_norm="rms_norm_across_heads", caption_channels=16, vae_scale_factors=(8, 32, 32)
)
vae = diffusers.AutoencoderKLLTX2Video(
    latent_channels=4, down_block_types=("LTX2VideoDownBlock3D",), block_out_channels=(4,), decoder_block_out_channels=(4,), layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
    spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False), downsample_type=("spatiotemporal",),
    upsample_type=("spatiotemporal",), upsample_residual=(False,), upsample_factor=(1,), spatial_compression_ratio=8, temporal_compression_ratio=2,
)
pipeline = diffusers.LTX2Pipeline(
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    vae=vae.eval(),
    audio_vae=diffusers.AutoencoderKLLTX2Audio(base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8).eval(),
    text_encoder=None,
    tokenizer=None,
    connectors=LTX2TextConnectors(caption_channels=16, text_proj_in_factor=1, connector_rope_base_seq_len=32, **registers, **heads, **rope),
    transformer=transformer.eval(),
    vocoder=LTX2Vocoder(
        in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]]
    ).eval(),
)
pipeline.set_progress_bar_config(disable=True)
text = {"prompt_embeds": torch.randn(1, 8, 16), "prompt_attention_mask": torch.ones(1, 8, dtype=torch.long)}
scales = {f"{sound}{name}_scale": value for sound in ("", "audio_") for name, value in {"guidance": 1.0, "stg": 0.0, "modality": 1.0}.items()}
sizes = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 4}


def sample(step):
    """Frames of the pipeline with this step in place of its scheduler's, None = its own."""
    if step is not None:
        pipeline.scheduler.step = step
    try:
        return pipeline(**text, **sizes, **scales, generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False)[0]
    finally:
        vars(pipeline.scheduler).pop("step", None)


def logged(step):
    @functools.wraps(step)
    def wrapper(*args, **kwargs):
        return step(*args, **kwargs)

    return wrapper


plain = sample(None)
assert torch.equal(sample(functools.partial(pipeline.scheduler.step)), plain), "the behaviour has changed"
print("functools.partial of the step: the same sample")
try:
    sample(logged(pipeline.scheduler.step))
except IndexError as error:
    print("a function around the step: IndexError:", error)
else:
    raise SystemExit("the behaviour has changed")
PY

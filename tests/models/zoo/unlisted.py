"""Pipelines without a yaml of their own, from text alone; each builder returns one ready to be saved."""

from typing import Any

import diffusers

from zoo import text, text_2026, vaes
from zoo.saving import stirred
from zoo.videos import WAN_FLOW

FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
FLUX_LIKE: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": text.WIDTH,
    "axes_dims_rope": (2, 2, 4),
}


def chroma() -> Any:
    tokenizer, encoder = text.t5()
    sizes = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vaes.image_vae(**FLUX_VAE),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=diffusers.ChromaTransformer2DModel(**FLUX_LIKE, **sizes),
    )


def ovis_image() -> Any:
    tokenizer, encoder = text.qwen3()
    return diffusers.OvisImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vaes.image_vae(**FLUX_VAE),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=diffusers.OvisImageTransformer2DModel(**FLUX_LIKE, out_channels=16),
    )


def lumina2() -> Any:
    """Told 1 - sigma."""
    tokenizer, encoder = text.gemma()
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 16, 16),
        cap_feat_dim=text.WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vaes.image_vae(**FLUX_VAE),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def prx() -> Any:
    tokenizer, encoder = text_2026.t5gemma()
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=text.WIDTH, hidden_size=16, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    return diffusers.PRXPipeline(
        transformer=stirred(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=encoder,
        tokenizer=tokenizer,
        vae=vaes.image_vae(**FLUX_VAE),
    )


def prx_pixel() -> Any:
    """Without a VAE: what is denoised is the picture."""
    tokenizer, encoder = text_2026.qwen3_vl()
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=3,
        context_in_dim=text.WIDTH,
        hidden_size=16,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
        patch_size=8,
        bottleneck_size=12,
    )
    return diffusers.PRXPixelPipeline(
        transformer=stirred(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=encoder,
        tokenizer=tokenizer,
        default_sample_size=32,
    )


def ernie_image() -> Any:
    """Without the language model that rewrites prompts."""
    tokenizer, encoder = text_2026.mistral3_trunk()
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=24,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=text.WIDTH,
        rope_axes_dim=(4, 4, 4),
    )
    return diffusers.ErnieImagePipeline(
        transformer=stirred(transformer),
        vae=vaes.flux2_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0),
    )


def mochi() -> Any:
    """Told 1000 (1 - sigma)."""
    tokenizer, encoder = text.t5()
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=text.WIDTH,
        time_embed_dim=4,
        max_sequence_length=256,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        add_attention_block=(False, False, False, False, False),
    )
    return diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae.eval(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def skyreels_v2() -> Any:
    tokenizer, encoder = text.umt5()
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=text.WIDTH,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return diffusers.SkyReelsV2Pipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        transformer=transformer,
        vae=vaes.wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(**WAN_FLOW),
    )

"""Video pipelines that no yaml names; each builder returns a tiny random one ready to be saved."""

from typing import Any

import diffusers
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Gemma2EncoderConfig,
)
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

from zoo import conditioned, text, text_2026, vaes, videos, videos_2026
from zoo.saving import stirred

WAN = {**videos_2026.WAN, "num_layers": 2}


def anyflow() -> Any:
    """Told where a step ends as well."""
    return diffusers.AnyFlowPipeline(
        **videos_2026._parts(videos.wan21(), "tokenizer", "text_encoder", "vae"),
        transformer=diffusers.AnyFlowTransformer3DModel(**WAN, rope_max_seq_len=32),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
    )


def anyflow_far() -> Any:
    """Makes a clip chunk by chunk, each after the keys and values of those before."""
    sizes = {"rope_max_seq_len": 32, "chunk_partition": (1, 1), "full_chunk_limit": 2}
    return diffusers.AnyFlowFARPipeline(
        **videos_2026._parts(videos.wan21(), "tokenizer", "text_encoder", "vae"),
        transformer=diffusers.AnyFlowFARTransformer3DModel(**WAN, **sizes),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
    )


def chronoedit() -> Any:
    """An edit as the last of two frames."""
    parts = conditioned.wan_i2v()
    transformer = diffusers.ChronoEditTransformer3DModel(
        **WAN,
        in_channels=36,
        out_channels=16,
        rope_max_seq_len=32,
        image_dim=8,
        added_kv_proj_dim=24,
        rope_temporal_skip_len=8,
    )
    names = ("tokenizer", "text_encoder", "vae", "image_encoder", "image_processor")
    return diffusers.ChronoEditPipeline(
        **videos_2026._parts(parts, *names),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def consisid() -> Any:
    """Without the face, which no prompt here comes with."""
    tokenizer, encoder = text.t5()
    transformer = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=text.WIDTH,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        use_rotary_positional_embeddings=True,
    )
    return diffusers.ConsisIDPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.cogvideox_vae(),
        transformer=transformer,
        scheduler=diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction"),
    )


def easyanimate() -> Any:
    values = {k: v for k, v in text.DECODER.items() if k != "head_dim"}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": text.WIDTH, "num_heads": 2}
    config = Qwen2VLConfig(text_config={**values, "rope_parameters": text_2026.MROPE}, vision_config=vision)
    transformer: Any = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=4,
        sample_height=4,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=text.WIDTH,
    )
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    )
    return diffusers.EasyAnimatePipeline(
        vae=vae.eval(),
        text_encoder=Qwen2VLForConditionalGeneration(config).eval(),
        tokenizer=text.word_tokenizer(512, ends=False),
        transformer=stirred(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def helios() -> Any:
    """Makes a clip in chunks of 33 frames, each after what was made before, at three sizes of patches."""
    sizes = {**WAN, "attention_head_dim": 12, "rope_dim": (4, 4, 4)}
    return diffusers.HeliosPipeline(
        **videos_2026._parts(videos.wan21(), "tokenizer", "text_encoder", "vae"),
        scheduler=diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1.0),
        transformer=diffusers.HeliosTransformer3DModel(**sizes),
    )


def motif_video() -> Any:
    """Guided by a part of its own."""
    values = {**text.DECODER, "dropout_rate": 0.0}
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = T5Gemma2EncoderConfig(
        text_config=values,
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        boi_token_index=0,
        eoi_token_index=0,
        image_token_index=0,
    )
    transformer: Any = diffusers.MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=text.WIDTH,
        rope_axes_dim=(2, 2, 4),
    )
    return diffusers.MotifVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vaes.wan_vae(),
        text_encoder=T5Gemma2Encoder(config, eoi_token_index=0).eval(),
        tokenizer=text.word_tokenizer(512),
        transformer=stirred(transformer),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    )


def sana_wm() -> Any:
    """From a picture and a way of the camera."""
    tokenizer, encoder = text.gemma()
    transformer: Any = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=2,
        chunk_plucker_channels=12,
        chunk_plucker_post_attn_blocks=2,
        caption_channels=text.WIDTH,
    )
    return diffusers.SanaWMPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.ltx2_vae(),
        transformer=stirred(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )

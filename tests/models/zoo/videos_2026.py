"""Video pipelines of 2025 and 2026, from text or from pictures; each builder returns one ready to be saved."""

from typing import Any

import diffusers
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from zoo import conditioned, guided, text, text_2026, unlisted, vaes, videos

VISION = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": text.WIDTH, "freq_dim": 16, "ffn_dim": 24}


def _parts(pipeline: Any, *names: str) -> dict[str, Any]:
    """Those parts of a pipeline of the same family."""
    return {name: pipeline.components[name] for name in names}


def _of_wan(pipeline: Any) -> dict[str, Any]:
    return _parts(pipeline, "tokenizer", "text_encoder", "vae", "scheduler")


def wan_flf2v() -> Any:
    """CLIP sees both pictures."""
    pipeline = conditioned.wan_i2v()
    config = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
    pipeline.register_modules(transformer=diffusers.WanTransformer3DModel(**{**config, "pos_embed_seq_len": 10}))
    return pipeline


def wan22_5b_i2v() -> Any:
    """A timestep per token: that of the first frame is 0."""
    return diffusers.WanImageToVideoPipeline(
        **_of_wan(videos.wan22_5b()), transformer=videos._wan_transformer(), expand_timesteps=True
    )


def wan_vace() -> Any:
    transformer = diffusers.WanVACETransformer3DModel(
        **WAN, num_layers=2, rope_max_seq_len=32, vace_layers=[0, 1], vace_in_channels=96
    )
    return diffusers.WanVACEPipeline(**_of_wan(videos.wan21()), transformer=transformer)


def wan_animate() -> Any:
    """A character from a picture, its motion from clips of poses and of a face."""
    sizes = {"motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16}
    transformer = diffusers.WanAnimateTransformer3DModel(
        **WAN,
        **sizes,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=8,
        added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    of_image = _parts(conditioned.wan_i2v(), "image_encoder", "image_processor")
    return diffusers.WanAnimatePipeline(**_of_wan(videos.wan21()), **of_image, transformer=transformer)


def hunyuan_video15_i2v() -> Any:
    parts = guided.hunyuan_video15().components
    vision = SiglipVisionModel(SiglipVisionConfig(**{**VISION, "hidden_size": 12}, image_size=16, patch_size=8)).eval()
    size = {"height": 16, "width": 16}
    return diffusers.HunyuanVideo15ImageToVideoPipeline(
        **parts, image_encoder=vision, feature_extractor=SiglipImageProcessor(size=size)
    )


def ltx2(cls: Any = None, **kwargs: Any) -> Any:
    """A clip and its sound, denoised together."""
    tokenizer, encoder = text_2026.gemma3()
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=text.WIDTH,
        rope_double_precision=False,
        rope_type="split",
        vae_scale_factors=(8, 32, 32),
    )
    registers = {f"{kind}_connector_num_learnable_registers": 4 for kind in ("video", "audio")}
    heads = {f"{kind}_connector_{what}": n for kind in ("video", "audio") for what, n in HEADS.items()}
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=text.WIDTH,
        text_proj_in_factor=text.DECODER["num_hidden_layers"] + 1,
        **registers,
        **heads,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    return (cls or diffusers.LTX2Pipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vaes.ltx2_vae(),
        audio_vae=vaes.ltx2_audio_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        connectors=connectors,
        transformer=transformer,
        vocoder=vaes.ltx2_vocoder(),
    )


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}


def ltx2_i2v() -> Any:
    return ltx2(diffusers.LTX2ImageToVideoPipeline)


def ltx_i2v() -> Any:
    parts = videos.ltx_video().components
    return diffusers.LTXImageToVideoPipeline(**parts)


def kandinsky5(cls: Any = None) -> Any:
    from_image = cls is not None
    (_, encoder), (clip_tokenizer, clip) = text.qwen_vl(), text.clip()
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=text.WIDTH,
        in_text_dim2=text.WIDTH,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=24,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
        visual_cond=from_image,
    )
    for parameter in transformer.parameters():  # modulations are 0 at first, and no block would count
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return (cls or diffusers.Kandinsky5T2VPipeline)(
        transformer=transformer,
        vae=vaes.hunyuan_vae(),
        text_encoder=encoder,
        tokenizer=text.word_tokenizer(1024, ends=False, lead=128),
        text_encoder_2=clip,
        tokenizer_2=clip_tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def kandinsky5_i2v() -> Any:
    return kandinsky5(diffusers.Kandinsky5I2VPipeline)


def skyreels_v2_i2v() -> Any:
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, image_size=32, patch_size=16, projection_dim=8))
    square = {"height": 32, "width": 32}
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        **WAN, in_channels=36, out_channels=16, num_layers=2, rope_max_seq_len=32, image_dim=8, added_kv_proj_dim=24
    )
    return diffusers.SkyReelsV2ImageToVideoPipeline(
        **_of_wan(unlisted.skyreels_v2()),
        image_encoder=vision.eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square),
        transformer=transformer,
    )


def sana_video_i2v() -> Any:
    return diffusers.SanaImageToVideoPipeline(**videos.sana_video().components)


def cogvideox_i2v() -> Any:
    parts = videos.cogvideox_5b().components
    config = {**parts["transformer"].config, "in_channels": 8, "use_learned_positional_embeddings": False}
    transformer = diffusers.CogVideoXTransformer3DModel.from_config(config)
    return diffusers.CogVideoXImageToVideoPipeline(**{**parts, "transformer": transformer})


def allegro() -> Any:
    tokenizer, encoder = text.t5()
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        caption_channels=text.WIDTH,
    )
    return diffusers.AllegroPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.allegro_vae(),
        transformer=transformer,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )

"""Pipelines that sample from a picture; each builder returns one ready to be saved."""

from typing import Any

import diffusers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from zoo import images, text, vaes, videos
from zoo.videos import WAN_FLOW


def wan_i2v(image_dim: int | None = 8, **kwargs: Any) -> Any:
    """Wan 2.1: the first frame as latents, and as embeddings of CLIP."""
    tokenizer, encoder = text.umt5()
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=8)).eval()
    square = {"height": 32, "width": 32}
    parts = dict(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(**WAN_FLOW),
        image_encoder=vision,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square),
        transformer=_wan(image_dim),
        transformer_2=None,
    )
    return diffusers.WanImageToVideoPipeline(**parts | kwargs)


def wan22_i2v() -> Any:
    """Wan 2.2: no embeddings of CLIP, two denoisers."""
    none = {"image_encoder": None, "image_processor": None}
    return wan_i2v(None, transformer_2=_wan(None), boundary_ratio=0.9, **none)


def _wan(image_dim: int | None) -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=text.WIDTH,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=image_dim,
        added_kv_proj_dim=24 if image_dim else None,
    )


def flux_kontext() -> Any:
    """The picture's latents as more tokens."""
    parts = images.flux_dev().components
    return diffusers.FluxKontextPipeline(**{k: v for k, v in parts.items() if v is not None})


def flux_fill() -> Any:
    """Latents of the masked picture and the mask, 8 x 8 of it for each latent, beside the sample's."""
    parts = images.flux_dev(in_channels=16 + 16 + 256).components
    return diffusers.FluxFillPipeline(**{k: v for k, v in parts.items() if v is not None})


def qwen_image_edit() -> Any:
    """A tokenizer stands for Qwen2.5-VL's processor, which needs torchvision: the text encoder sees no picture."""
    parts = images.qwen_image().components
    return diffusers.QwenImageEditPlusPipeline(**parts, processor=text.word_tokenizer(1024, ends=False))


def framepack() -> Any:
    """Makes a clip in sections, each after the picture and what was made before."""
    parts = videos.hunyuan_video().components
    vision = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        rope_axes_dim=(2, 2, 4),
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.HunyuanVideoFramepackPipeline(
        **{**parts, "transformer": transformer, "scheduler": scheduler},
        image_encoder=SiglipVisionModel(SiglipVisionConfig(**vision, image_size=16, patch_size=8)).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    )

"""More pipelines that sample from pictures or clips, by model=diffusers alone; each builder returns one to be saved."""

from typing import Any

import diffusers
from transformers import LlavaProcessor, Qwen2VLImageProcessorPil, SiglipImageProcessorPil

from zoo import families, guessed, guessed_videos, processors, text, unlisted
from zoo.saving import stirred

SQUARE = {"height": 16, "width": 16}


def motif_video_i2v() -> Any:
    """Its text encoder's other half looks at the picture while the clip is sampled."""
    parts = guessed_videos.motif_video().components
    config = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
    transformer: Any = diffusers.MotifVideoTransformer3DModel(**{**config, "image_embed_dim": 8})
    return diffusers.MotifVideoImage2VideoPipeline(
        **{**parts, "transformer": stirred(transformer), "feature_extractor": SiglipImageProcessorPil(size=SQUARE)}
    )


def easyanimate_inpaint() -> Any:
    """Latents of the clip that is kept and of its mask beside the sample's; clips as tensors."""
    return _easyanimate(diffusers.EasyAnimateInpaintPipeline, in_channels=4 + 1 + 4)


def easyanimate_control() -> Any:
    """Its own call gives its `encode_prompt` an argument that this does not have."""
    return _easyanimate(diffusers.EasyAnimateControlPipeline, in_channels=4 + 4 + 4)


def _easyanimate(cls: Any, in_channels: int) -> Any:
    parts = guessed_videos.easyanimate().components
    config = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
    transformer: Any = diffusers.EasyAnimateTransformer3DModel(**{**config, "in_channels": in_channels})
    parts["vae"].register_to_config(cache_mag_vae=True)  # as the file of its repository has it
    return cls(**{**parts, "transformer": stirred(transformer)})


def bria_fibo_edit() -> Any:
    """Prompts are JSON; the picture's latents as more tokens."""
    return diffusers.BriaFiboEditPipeline(**guessed.bria_fibo().components)


def longcat_image_edit() -> Any:
    """Made at a million pixels only; Llava's processor stands for Qwen2.5-VL's, which needs torchvision."""
    parts = families.longcat_image().components
    tokenizer = processors.knowing(parts["tokenizer"], parts["text_encoder"])
    processor = LlavaProcessor(
        image_processor=Qwen2VLImageProcessorPil(**processors.PATCH),
        tokenizer=tokenizer,
        chat_template=text.CHAT,
        image_token=processors.PICTURE,
    )
    return diffusers.LongCatImageEditPipeline(**{**parts, "tokenizer": tokenizer, "text_processor": processor})


def skyreels_v2_forcing(cls: Any = None) -> Any:
    """Each frame has a schedule of its own."""
    parts = unlisted.skyreels_v2().components
    config = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
    transformer = diffusers.SkyReelsV2Transformer3DModel(**{**config, "inject_sample_info": True})
    return (cls or diffusers.SkyReelsV2DiffusionForcingPipeline)(**{**parts, "transformer": transformer})


def skyreels_v2_forcing_i2v() -> Any:
    return skyreels_v2_forcing(diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline)


def skyreels_v2_forcing_v2v() -> Any:
    return skyreels_v2_forcing(diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline)


def helios_pyramid() -> Any:
    """Each chunk at three sizes, from the smallest.

    The scheduler's own gamma, 1/3, makes the noise between them degenerate: its factors are found or not by rounding.
    """
    parts = guessed_videos.helios().components
    return diffusers.HeliosPyramidPipeline(**{**parts, "scheduler": diffusers.HeliosScheduler(gamma=0.3)})


def helios_distilled() -> Any:
    """Its scheduler goes back to noise at each step."""
    parts = {**guessed_videos.helios().components, "scheduler": diffusers.HeliosDMDScheduler(gamma=0.3)}
    return diffusers.HeliosPyramidPipeline(**parts, is_distilled=True)

"""Pipelines with their real processors, which need torchvision; each builder returns one ready to be saved."""

from typing import Any

import diffusers
import transformers

from zoo import conditioned, families, modular, text

PICTURE = "<|image_pad|>"
MARKS = ("<|vision_start|>", PICTURE, "<|vision_end|>", "<|video_pad|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
PATCH = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 28 * 28, "max_pixels": 56 * 56}


def knowing(tokenizer: Any, encoder: Any) -> Any:
    """The tokenizer, with the marks of pictures as tokens that the text encoder knows."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    encoder.resize_token_embeddings(len(tokenizer))
    encoder.config.image_token_id = tokenizer.convert_tokens_to_ids(PICTURE)
    encoder.config.vision_start_token_id = tokenizer.convert_tokens_to_ids(MARKS[0])
    return tokenizer


def _qwen(name: str, tokenizer: Any, encoder: Any) -> Any:
    """A processor of this class."""
    return getattr(transformers, name)(
        image_processor=transformers.Qwen2VLImageProcessor(**PATCH),
        tokenizer=knowing(tokenizer, encoder),
        video_processor=getattr(transformers, f"{name[:5]}VLVideoProcessor")(),
        chat_template=tokenizer.chat_template,
    )


def flux2_dev() -> Any:
    parts = families.flux2_dev().components
    tokenizer = knowing(parts["tokenizer"], parts["text_encoder"])
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(patch_size=16),
        tokenizer=tokenizer,
        patch_size=16,
        chat_template=text.CHAT,
    )
    return diffusers.Flux2Pipeline(**{**parts, "tokenizer": processor})


def longcat_image() -> Any:
    parts = families.longcat_image().components
    processor = _qwen("Qwen2VLProcessor", parts["text_processor"], parts["text_encoder"])
    return diffusers.LongCatImagePipeline(**{**parts, "text_processor": processor})


def bria_fibo2() -> Any:
    parts = families.bria_fibo2().components
    processor = _qwen("Qwen3VLProcessor", parts["processor"], parts["text_encoder"])
    return diffusers.BriaFibo2Pipeline(**{**parts, "processor": processor})


def flux3() -> Any:
    pipeline = modular.flux3()
    pipeline.update_components(tokenizer=_qwen("Qwen3VLProcessor", pipeline.tokenizer, pipeline.text_encoder))
    return pipeline


def kandinsky5_image() -> Any:
    parts = families.kandinsky5().components
    processor = _qwen("Qwen2VLProcessor", parts["tokenizer"], parts["text_encoder"])
    return diffusers.Kandinsky5T2IPipeline(**{**parts, "tokenizer": processor})


def qwen_image_edit() -> Any:
    """The text encoder sees the picture."""
    parts = conditioned.qwen_image_edit().components
    processor = _qwen("Qwen2VLProcessor", parts["tokenizer"], parts["text_encoder"])
    return diffusers.QwenImageEditPlusPipeline(**{**parts, "processor": processor})


def qwen_image21() -> Any:
    parts = families.qwen_image21().components
    processor = _qwen("Qwen3VLProcessor", parts["processor"].tokenizer, parts["text_encoder"])
    return diffusers.QwenImage21Pipeline(**{**parts, "processor": processor})

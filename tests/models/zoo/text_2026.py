"""Tiny random text encoders of the pipelines of 2025 and 2026."""

from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from zoo.text import DECODER, ROPE, WIDTH, word_tokenizer

VISION = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}


def qwen3_lm() -> tuple[Any, Any]:
    """Qwen3 with its head, of FLUX.2 klein."""
    return word_tokenizer(512, ends=False), Qwen3ForCausalLM(Qwen3Config(**DECODER)).eval()


def qwen3_vl() -> tuple[Any, Any]:
    """Qwen3-VL, of Krea 2."""
    vision = {**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config={**DECODER, "rope_parameters": MROPE}, vision_config=vision)
    return word_tokenizer(600, ends=False), Qwen3VLModel(config).eval()


def qwen_vl_text() -> tuple[Any, Any]:
    """The text model of Qwen2.5-VL, of HunyuanVideo 1.5."""
    values = {k: v for k, v in DECODER.items() if k != "head_dim"}
    config = Qwen2_5_VLTextConfig(**values, rope_parameters=MROPE)
    return word_tokenizer(1200, ends=False, lead=108), Qwen2_5_VLTextModel(config).eval()


def gemma3() -> tuple[Any, Any]:
    """Gemma 3, of LTX-2: the states of all its layers."""
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {k: v for k, v in DECODER.items() if k != "bos_token_id"}
    config = Gemma3Config(text_config=values, vision_config={**vision, "image_size": 16, "patch_size": 8})
    return word_tokenizer(64), Gemma3ForConditionalGeneration(config).eval()

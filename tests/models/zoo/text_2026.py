"""Tiny random text encoders of the pipelines of 2025 and 2026."""

from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5GemmaConfig,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from zoo.text import DECODER, ROPE, WIDTH, word_tokenizer

VISION = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}


def qwen3_lm() -> tuple[Any, Any]:
    """Qwen3 with its head, of FLUX.2 klein."""
    return word_tokenizer(512, ends=False), Qwen3ForCausalLM(Qwen3Config(**DECODER)).eval()


def qwen3_vl(num_layers: int = 3) -> tuple[Any, Any]:
    """Qwen3-VL, of Krea 2 and Ideogram 4."""
    return word_tokenizer(600, ends=False), Qwen3VLModel(_qwen3_vl(num_layers)).eval()


def qwen3_vl_lm(num_layers: int = 3) -> tuple[Any, Any]:
    """Qwen3-VL with its head, of Bria FIBO 2 and Qwen-Image 2.1."""
    return word_tokenizer(600, ends=False), Qwen3VLForConditionalGeneration(_qwen3_vl(num_layers)).eval()


def _qwen3_vl(num_layers: int) -> Qwen3VLConfig:
    vision = {**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    layers = {"num_hidden_layers": num_layers, "rope_parameters": MROPE}
    return Qwen3VLConfig(text_config={**DECODER, **layers}, vision_config=vision)


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


def llama_lm() -> tuple[Any, Any]:
    """Llama with its head, of HiDream."""
    return word_tokenizer(512), LlamaForCausalLM(LlamaConfig(**{**DECODER, "num_hidden_layers": 2})).eval()


def mistral3() -> tuple[Any, Any]:
    """Mistral 3 with its head, of FLUX.2 dev."""
    return word_tokenizer(512, ends=False), Mistral3ForConditionalGeneration(_mistral3()).eval()


def mistral3_trunk() -> tuple[Any, Any]:
    """Mistral 3, of ERNIE-Image."""
    return word_tokenizer(512, ends=False), Mistral3Model(_mistral3()).eval()


def _mistral3() -> Mistral3Config:
    vision = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Mistral3Config(
        text_config=MistralConfig(**DECODER),
        vision_config=PixtralVisionConfig(**vision, head_dim=8, image_size=32, patch_size=16),
    )


def glm() -> tuple[Any, Any]:
    """GLM, of CogView4."""
    return word_tokenizer(1024), GlmModel(GlmConfig(**DECODER)).eval()


def t5gemma() -> tuple[Any, Any]:
    """The encoder of T5Gemma, of PRX; diffusers reads its config as that of both halves, and takes `encoder` of it."""
    encoder = T5GemmaEncoder(T5GemmaConfig(encoder=DECODER, decoder=DECODER).encoder).eval()
    encoder.config.encoder = DECODER
    return word_tokenizer(256), encoder

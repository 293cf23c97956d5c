"""Tokenizers that know the captions' words, and tiny random text encoders of the real classes."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from viditq.tiny.networks import SPECIAL_TOKENS, vocabulary
from viditq.tiny.text import t5_tokenizer

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(w for w in vocabulary() if w not in SPECIAL_TOKENS)]
NUM_WORDS = len(WORDS)
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
WIDTH = 16
DECODER: dict[str, Any] = {
    "vocab_size": NUM_WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def word_tokenizer(max_length: int, ends: bool = True, lead: int = 0) -> PreTrainedTokenizerFast:
    """Whole words, with a begin and an end token if `ends`; stands for the BPE tokenizers.

    lead: tokens before all others, as many as a pipeline cuts off for its instruction.
    """
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends or lead:
        single = "<bos> " * lead + "$A" if lead else "<bos> $A <eos>"
        template = {"single": single, "special_tokens": [("<bos>", 1), ("<eos>", 2)]}
        tokenizer.post_processor = processors.TemplateProcessing(**template)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{{ '<bos> ' * " + str(lead) + " }}" + CHAT,
    )


def t5(width: int = WIDTH) -> tuple[Any, T5EncoderModel]:
    """T5's tokenizer and encoder."""
    tokenizer = t5_tokenizer()
    return tokenizer, T5EncoderModel(_t5_config(T5Config, len(tokenizer), width)).eval()


def umt5() -> tuple[Any, UMT5EncoderModel]:
    """UMT5's, of Wan."""
    tokenizer = t5_tokenizer()
    return tokenizer, UMT5EncoderModel(_t5_config(UMT5Config, len(tokenizer), WIDTH)).eval()


def _t5_config(cls: Any, vocab_size: int, width: int) -> Any:
    return cls(vocab_size=vocab_size, d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2)


def clip(projection: bool = False, width: int = WIDTH) -> tuple[Any, Any]:
    """CLIP's text model, with its projection or without."""
    config = CLIPTextConfig(
        vocab_size=NUM_WORDS,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    return word_tokenizer(77), cls(config).eval()


def llama() -> tuple[Any, LlamaModel]:
    """Llama, of HunyuanVideo."""
    return word_tokenizer(512), LlamaModel(LlamaConfig(**DECODER)).eval()


def gemma() -> tuple[Any, Gemma2Model]:
    """Gemma 2, of Sana."""
    return word_tokenizer(300), Gemma2Model(Gemma2Config(**DECODER)).eval()


def qwen3() -> tuple[Any, Qwen3Model]:
    """Qwen3, of Z-Image."""
    return word_tokenizer(512, ends=False), Qwen3Model(Qwen3Config(**DECODER)).eval()


def qwen_vl() -> tuple[Any, Qwen2_5_VLForConditionalGeneration]:
    """Qwen2.5-VL, of Qwen-Image."""
    text = {k: v for k, v in DECODER.items() if k != "head_dim"}
    rope = {**ROPE, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision)
    return word_tokenizer(1024, ends=False), Qwen2_5_VLForConditionalGeneration(config).eval()

"""Tokenizers of the tiny pipelines, and text embeddings exactly as the diffusers pipelines make them."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel, T5Tokenizer

from viditq.tiny.networks import SPECIAL_TOKENS, vocabulary


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose pieces are whole words; unknown words become `<unk>`."""
    words = [w if w in SPECIAL_TOKENS else "\u2581" + w for w in vocabulary()]
    pieces = [(w, 0.0 if w in SPECIAL_TOKENS else -1.0) for w in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=120)


def encode(encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Tensor:
    """Prompts of equal token count -> float embeddings [B, T, D] (no padding enters)."""
    tokens = tokenizer(prompts, padding=False)["input_ids"]
    with torch.no_grad():
        return encoder(torch.tensor(tokens)).last_hidden_state


def encode_null(encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The empty prompt padded to `num_tokens`: embeddings [1, T, D] and mask [1, T].

    The pipelines leave the embeddings of the padding in place; PixArt masks them, Latte attends to them.
    """
    tokens = tokenizer("", padding="max_length", max_length=num_tokens, return_tensors="pt")
    with torch.no_grad():
        embeds = encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    return embeds, tokens["attention_mask"]

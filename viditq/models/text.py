"""Prompt embeddings: each prompt encoded alone, by the pipeline's own code, so that batches change nothing."""

from typing import Any

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.models.adapter import ModelAdapter

PromptEmbeds = dict[str, Tensor]
"""Argument name of the pipeline's `__call__` -> tensor with a leading axis of 1."""


def check_prompts(adapter: ModelAdapter, pipeline: Any, prompts: list[str]) -> None:
    """Raises UserError for a prompt with more tokens than the text encoder takes, or if there is no text encoder."""
    if pipeline.tokenizer is None or pipeline.text_encoder is None:
        raise UserError(
            f"The pipeline in {adapter.folder} holds no text encoder, and {len(prompts)} prompts have no embeddings, "
            f"first {prompts[0][:60]!r}. Add tokenizer and text_encoder to the folder, or give data.embeds."
        )
    for prompt in prompts:
        assert prompt.strip(), "PromptData gives no empty prompts"
        count = len(pipeline.tokenizer(prompt)["input_ids"])
        if count > adapter.max_tokens:
            raise UserError(
                f"The prompt {prompt[:60]!r}... has {count} tokens, {adapter.name} takes at most "
                f"{adapter.max_tokens} (model.max_tokens). Shorten it."
            )


@torch.no_grad()
def encode_prompt(adapter: ModelAdapter, pipeline: Any, prompt: str) -> PromptEmbeds:
    """One prompt -> the embeddings (and masks, and those of the empty prompt) that the pipeline takes."""
    returned = pipeline.encode_prompt(prompt, **adapter.encode)
    if len(returned) != len(adapter.encode_outputs):
        raise UserError(
            f"{adapter.pipeline}.encode_prompt returns {len(returned)} values, model.encode_outputs names "
            f"{len(adapter.encode_outputs)}: {list(adapter.encode_outputs)}."
        )
    pairs = zip(adapter.encode_outputs, returned, strict=True)
    return {name: value.contiguous() for name, value in pairs if value is not None}


def in_model_dtype(adapter: ModelAdapter, embeds: PromptEmbeds) -> PromptEmbeds:
    """Embeddings made elsewhere, as the pipeline's own text encoder would hand them on."""
    return {k: v.to(adapter.torch_dtype) if v.is_floating_point() else v for k, v in embeds.items()}

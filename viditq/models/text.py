"""Prompt embeddings: each prompt encoded alone, by the pipeline's own code, so that batches change nothing."""

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.models import conditions, replay
from viditq.models.adapter import ModelAdapter
from viditq.models.labels import class_label
from viditq.models.settings import text_settings

PromptEmbeds = dict[str, Tensor]
"""Argument name of the pipeline's `__call__` -> tensor with a leading axis of 1."""


def check_encodes(adapter: ModelAdapter, prompts: list[str]) -> None:
    """Raises UserError where prompts are to be encoded and the pipeline has no text encoder, or no tokenizer."""
    index = adapter.index()
    tokenizer = "processor" if "processor" in index and "tokenizer" not in index else "tokenizer"
    absent = [part for part in (tokenizer, "text_encoder") if index.get(part, [None])[0] is None]
    if adapter.conditioning == "text" and absent and not adapter.reads_words:
        raise UserError(
            f"The pipeline in {adapter.folder} holds no {' and no '.join(absent)}, and {len(prompts)} prompts have no "
            f"embeddings, first {prompts[0][:60]!r}. Add tokenizer and text_encoder to the folder, or give data.embeds."
        )


def check_prompts(adapter: ModelAdapter, pipeline: Any, prompts: list[str]) -> None:
    """Raises UserError for too long a prompt, one that names no class, or where there is no text encoder."""
    check_encodes(adapter, prompts)
    for prompt in prompts:
        assert prompt.strip(), "PromptData gives no empty prompts"
        if adapter.conditioning == "class":
            class_label(adapter, prompt)
        elif adapter.max_tokens is not None:
            _check_length(adapter, pipeline, prompt, adapter.max_tokens)


def _check_length(adapter: ModelAdapter, pipeline: Any, prompt: str, limit: int) -> None:
    count = num_tokens(getattr(pipeline, adapter.prompt_tokenizer), prompt)
    if count > limit:
        raise UserError(
            f"The prompt {prompt[:60]!r}... has {count} tokens, {adapter.name} takes at most "
            f"{limit} (model.max_tokens). Shorten it."
        )


def num_tokens(tokenizer: Any, prompt: str) -> int:
    """How many a tokenizer makes of a prompt, or that of a processor, whose own first argument is a picture."""
    return len(getattr(tokenizer, "tokenizer", tokenizer)(str(prompt))["input_ids"])


@torch.no_grad()
def encode_prompt(adapter: ModelAdapter, pipeline: Any, prompt: str) -> PromptEmbeds:
    """One prompt -> what the pipeline takes: embeddings, masks, those of the negative prompt; or its class label.

    And the prompt's pictures (`conditions.py`), which some pipelines encode with the text.
    """
    if adapter.conditioning == "class":
        return {"class_labels": torch.tensor([class_label(adapter, prompt)])}
    pictures = conditions.stored(prompt)
    if adapter.replays:
        return replay.record(adapter, pipeline, prompt)
    if pictures and conditions.encoded_with_text(pipeline):
        return record_encoding(adapter, pipeline, prompt) | pictures
    return _encode_all(adapter, pipeline, prompt) | pictures


def _encode_all(adapter: ModelAdapter, pipeline: Any, prompt: str) -> PromptEmbeds:
    embeds = _encode(adapter, pipeline, prompt)
    if adapter.negative_prompt is not None:
        negative = _encode(adapter, pipeline, adapter.negative_prompt)
        taken = inspect.signature(pipeline.__call__).parameters  # some take less of it, and need no more
        embeds |= {key: value for name, value in negative.items() if (key := f"negative_{name}") in taken}
    return embeds


def _encode(adapter: ModelAdapter, pipeline: Any, prompt: str) -> PromptEmbeds:
    told = _as_called(pipeline) | dict(adapter.encode)
    try:
        return _named(adapter, pipeline.encode_prompt(str(prompt), **told))
    except (AttributeError, TypeError, ValueError) as error:
        if not adapter.guess or told.get("negative_prompt", "") is not None:
            raise
        raise UserError(
            f"{adapter.pipeline} cannot encode {prompt[:60]!r} as its call does by default, without a negative prompt "
            f"({type(error).__name__}: {error}). Give one: +model.encode.negative_prompt=''."
        ) from error


def record_encoding(adapter: ModelAdapter, pipeline: Any, prompt: str) -> PromptEmbeds:
    """What the pipeline's own call, given the prompt and its pictures, has encoded by the time that it denoises.

    Raises UserError where it fails before.
    """
    found: list[Any] = []
    expected = 2 if adapter.negative_prompt is not None else 1

    def recorder_of(encode: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            found.append(encode(*args, **kwargs))
            if len(found) == expected:
                raise _Encoded
            return found[-1]

        return recorded

    encoders = conditions.encoders_of(pipeline)
    for name in encoders:
        setattr(pipeline, name, recorder_of(getattr(pipeline, name)))
    try:
        with suppress(_Encoded):
            pipeline(
                prompt=str(prompt),
                **conditions.given(adapter, conditions.stored(prompt)),
                **text_settings(adapter, pipeline),
            )
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{adapter.pipeline} cannot encode {prompt[:60]!r} with its pictures: {error}") from error
    finally:
        for name in encoders:
            delattr(pipeline, name)
    taken = inspect.signature(pipeline.__call__).parameters
    first, *second = [_named(adapter, one) for one in found]
    negative = {key: value for one in second for name, value in one.items() if (key := f"negative_{name}") in taken}
    return first | negative


class _Encoded(Exception):
    """All that was to be encoded is."""


def _named(adapter: ModelAdapter, returned: Any) -> PromptEmbeds:
    names = adapter.encode_outputs
    if len(returned) != len(names):
        raise UserError(
            f"{adapter.pipeline}.encode_prompt returns {len(returned)} values, model.encode_outputs names "
            f"{len(names)}: {list(names)}."
        )
    pairs = [(name, _first(value)) for name, value in zip(names, returned, strict=True) if name is not None]
    return {name: value.contiguous() for name, value in pairs if value is not None}


def _as_called(pipeline: Any) -> dict[str, Any]:
    """The arguments of `encode_prompt` as `__call__` gives them by default: some of the two's own defaults differ."""
    of_text, of_call = (inspect.signature(f).parameters for f in (pipeline.encode_prompt, pipeline.__call__))
    return {k: of_call[k].default for k in of_text if k != "prompt" and k in of_call}


def _first(value: Any) -> Tensor | None:
    """A batch of one as a tensor; pipelines that take lists of tensors return one, and an empty one for none."""
    if isinstance(value, list):
        return value[0][None] if value else None
    assert value is None or isinstance(value, Tensor)
    return value


def in_model_dtype(adapter: ModelAdapter, embeds: PromptEmbeds) -> PromptEmbeds:
    """Embeddings made elsewhere, as the pipeline's own text encoder would hand them on."""
    return {k: v.to(adapter.torch_dtype) if v.is_floating_point() else v for k, v in embeds.items()}

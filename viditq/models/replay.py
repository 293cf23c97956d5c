"""Prompts of pipelines whose call takes no embeddings: what `encode_prompt` returns is kept, and given back.

The pipeline's own call, given the prompt, encodes it once and ends where it begins to denoise. Each sample is made by
the same call with the same prompt, in which `encode_prompt` returns what was kept, call by call. Where there is none
(`checks.reads_words`), nothing is to be kept but the words: the call turns them into tokens at every sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.models import conditions
from viditq.models.settings import text_settings
from viditq.models.stand_ins import stand_in_encoders, stand_in_sketch

MARK = "encoded:"
TEXT = MARK + "text"  # uint8 [1, bytes] of JSON: the prompt, and what each call returned, its tensors by number
KINDS = {"list": list, "tuple": tuple}


class _Encoded(Exception):
    """Denoising would begin."""


def are_among(embeds: Mapping[str, Tensor]) -> bool:
    """Whether these are of a pipeline whose call takes none."""
    return TEXT in embeds


def record(adapter: Any, pipeline: Any, prompt: str) -> dict[str, Tensor]:
    """All that `encode_prompt` returns while the pipeline samples this prompt; raises UserError where it fails."""
    encode, returned = getattr(pipeline, "encode_prompt", None), []
    denoisers = [getattr(pipeline, name) for name in adapter.denoiser_names]

    def kept(*args: Any, **kwargs: Any) -> Any:
        assert encode is not None
        returned.append(encode(*args, **kwargs))
        return returned[-1]

    def ends(*args: Any, **kwargs: Any) -> None:
        raise _Encoded

    if encode is not None:
        pipeline.encode_prompt = kept
    for denoiser in denoisers:
        denoiser.forward = ends
    pictures = conditions.stored(prompt)
    stand_in_sketch(pipeline)
    if encode is None:  # all that it does with words it has done before
        pipeline.prepare_latents = ends
    if pictures:
        stand_in_encoders(pipeline, [])
    try:
        pipeline(prompt=str(prompt), **conditions.given(adapter, pictures), **text_settings(adapter, pipeline))
    except _Encoded:
        tensors: list[Tensor] = []
        text = json.dumps({"prompt": str(prompt), "returned": _packed(returned, tensors)}).encode()
        numbered = {f"{MARK}{i}": value.contiguous() for i, value in enumerate(tensors)}
        return {TEXT: torch.frombuffer(bytearray(text), dtype=torch.uint8)[None], **numbered, **pictures}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{adapter.pipeline} cannot encode {prompt[:60]!r}: {error}") from error
    finally:
        if encode is None:
            del pipeline.prepare_latents
        else:
            del pipeline.encode_prompt
        for denoiser in denoisers:
            del denoiser.forward
    raise UserError(f"{adapter.pipeline} calls none of its denoisers {adapter.denoiser_names}; set model.denoisers.")


@contextmanager
def given_back(pipeline: Any, embeds: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """The argument of the call that is the prompt; within, `encode_prompt` returns what `record` has kept of it."""
    kept = json.loads(bytes(embeds[TEXT].flatten().tolist()))
    if not hasattr(pipeline, "encode_prompt"):
        yield {"prompt": kept["prompt"]}
        return
    returned = iter(_unpacked(kept["returned"], embeds))
    pipeline.encode_prompt = lambda *args, **kwargs: next(returned)
    try:
        yield {"prompt": kept["prompt"]}
    finally:
        del pipeline.encode_prompt


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """As JSON takes it, its tensors put aside."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    for name, kind in KINDS.items():
        if isinstance(value, kind):
            return {name: [_packed(one, tensors) for one in value]}
    return value


def _unpacked(value: Any, embeds: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return embeds[f"{MARK}{content}"]
    return KINDS[kind](_unpacked(one, embeds) for one in content)

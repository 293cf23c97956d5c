"""Which arguments of a pipeline's call take what `encode_prompt` returns: measured on made-up embeddings."""

from __future__ import annotations

import copy
from typing import Any

from viditq.models.checks import pictures_of_call
from viditq.models.guess import gives_prompt_again
from viditq.models.made_up_text import Returned
from viditq.models.registry import find_class
from viditq.models.schedulers import make_scheduler
from viditq.models.trial import returned_text, samples_from


def measured_outputs(adapter: Any) -> list[str | None]:
    """`encode_outputs`: what was measured, before what was read from source; that alone where nothing can be measured.

    A value that does not come back (another's negative, when guidance is off by default) is not thereby known to be
    taken by nothing. Where the prompt is given again, nothing is; so too where the call takes pictures and fails
    without the prompt (LongCat-Image-Edit asks for its length, GLM-Image draws a sketch of it).
    """
    cls = find_class(adapter.pipeline)
    if gives_prompt_again(cls):
        return list(adapter.encode_outputs)
    names = _names(list(adapter.encode_outputs), returned_text(adapter))
    if not any(names) or not pictures_of_call(cls):
        return names
    tried = copy.copy(adapter)
    object.__setattr__(tried, "encode_outputs", names)
    if samples_from(tried, make_scheduler(tried), given=True):
        return names
    return [None] * len(names) if samples_from(tried, make_scheduler(tried), given=False) else names


def _names(read: list[str | None], found: list[Returned] | None) -> list[str | None]:
    names = [one.name for one in found or ()]
    if len(names) == len(read):
        return [name or (None if own in names else own) for name, own in zip(names, read, strict=True)]
    return names if "prompt_embeds" in names else read

"""Which arguments of a pipeline's call take what `encode_prompt` returns: measured on made-up embeddings."""

from __future__ import annotations

from typing import Any

from viditq.models.guess import gives_prompt_again
from viditq.models.registry import find_class
from viditq.models.trial import returned_text


def measured_outputs(adapter: Any) -> list[str | None]:
    """`encode_outputs`: what was measured, before what was read from source; that alone where nothing can be measured.

    A value that does not come back (another's negative, when guidance is off by default) is not thereby known to be
    taken by nothing. Where the prompt is given again, nothing is.
    """
    if gives_prompt_again(find_class(adapter.pipeline)):
        return list(adapter.encode_outputs)
    read, found = list(adapter.encode_outputs), returned_text(adapter)
    names = [one.name for one in found or ()]
    if len(names) == len(read):
        return [name or (None if own in names else own) for name, own in zip(names, read, strict=True)]
    return names if "prompt_embeds" in names else read

"""The negative prompt that a pipeline encodes by a second call of `encode_prompt`, while it samples."""

from typing import Any

from viditq.models.schedulers import make_scheduler
from viditq.models.trial import encoded_texts


def own_negative_prompt(adapter: Any) -> str | None:
    """Its text, as the pipeline's call chooses it by default; None where the call encodes its prompts alone."""
    if any(name and name.startswith("negative") for name in adapter.encode_outputs):
        return None
    texts = encoded_texts(adapter, make_scheduler(adapter))
    if len(texts) < 2:
        return None
    text = texts[1][0] if isinstance(texts[1], list) and texts[1] else texts[1]
    return str(text or "")

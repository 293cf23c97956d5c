"""The negative prompt that a pipeline's call chooses and encodes while it samples."""

import inspect
from typing import Any

from viditq.models.registry import find_class
from viditq.models.schedulers import make_scheduler
from viditq.models.trial import encoded_texts


def own_negative_prompt(adapter: Any) -> dict[str, Any]:
    """Field of ModelAdapter -> what says which text that is, as the pipeline's call chooses it by default.

    `negative_prompt` where it encodes it by a second call; `encode` where the first one is told it, and told by default
    would take another (Motif-Video); nothing otherwise, and where the call is given the prompt again (`replay.py`).
    """
    if adapter.replays:
        return {}
    with_prompt = any(name and name.startswith("negative") for name in adapter.encode_outputs)
    calls = encoded_texts(adapter, make_scheduler(adapter))
    if with_prompt:
        told = calls[0].get("negative_prompt") if calls else None
        default = inspect.signature(find_class(adapter.pipeline).__call__).parameters.get("negative_prompt")
        return {} if told is None or (default and told == default.default) else {"encode": {"negative_prompt": told}}
    if len(calls) < 2:
        return {}
    text = calls[1].get("prompt")
    text = text[0] if isinstance(text, list) and text else text
    return {"negative_prompt": str(text or "")}

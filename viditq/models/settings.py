"""What every call of a model's pipeline is given, whatever the prompt."""

import inspect
from typing import Any

from viditq.models.checks import FRAMES
from viditq.models.particular import steps_setting


def call_settings(adapter: Any, pipeline: Any) -> dict[str, Any]:
    """Arguments of the pipeline's call that do not depend on the prompt."""
    return {**adapter.call, **_own_settings(adapter, pipeline)}


def _own_settings(adapter: Any, pipeline: Any) -> dict[str, Any]:
    """Those that the model has fields for: steps, guidance, sizes."""
    name = getattr(pipeline, "__name__", type(pipeline).__name__)  # of a class, or of one of its objects
    given = steps_setting(name, adapter.num_steps, adapter.call)
    given |= {adapter.guidance_argument: adapter.guidance_scale}
    given |= {"height": adapter.height, "width": adapter.width}
    if adapter.modality == "video":
        given |= dict.fromkeys(FRAMES, adapter.num_frames)
    known = inspect.signature(pipeline.__call__).parameters  # a size that is not among them is the model's own
    return {k: v for k, v in given.items() if v is not None and k in known}


def text_settings(adapter: Any, pipeline: Any) -> dict[str, Any]:
    """Arguments of the call of a pipeline (or of its class) that is given a text, but for the text."""
    of_call = inspect.signature(pipeline.__call__).parameters
    encodes = adapter.conditioning == "text" and hasattr(pipeline, "encode_prompt")
    of_text = inspect.signature(pipeline.encode_prompt).parameters if encodes else {}
    settings = {k: v for k, v in adapter.call.items() if k not in of_text}
    settings |= _own_settings(adapter, pipeline)  # also what both are told, as FIBO is its guidance
    settings |= {k: v for k, v in adapter.encode.items() if k in of_call}
    own = adapter.negative_prompt is not None and "negative_prompt" in of_call  # else it is the pipeline's own choice
    return settings | ({"negative_prompt": adapter.negative_prompt} if own else {})

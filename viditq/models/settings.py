"""What every call of a model's pipeline is given, whatever the prompt."""

import inspect
from typing import Any

from viditq.models.checks import FRAMES


def call_settings(adapter: Any, pipeline: Any) -> dict[str, Any]:
    """Arguments of the pipeline's call that do not depend on the prompt."""
    given: dict[str, Any] = {
        "num_inference_steps": adapter.num_steps,
        adapter.guidance_argument: adapter.guidance_scale,
    }
    given |= {"height": adapter.height, "width": adapter.width}
    if adapter.modality == "video":
        given |= dict.fromkeys(FRAMES, adapter.num_frames)
    known = inspect.signature(pipeline.__call__).parameters  # a size that is not among them is the model's own
    return {**adapter.call, **{k: v for k, v in given.items() if v is not None and k in known}}

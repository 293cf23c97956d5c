"""Pictures that sampling starts from: kept with the embeddings of their prompt, given to the call as they are.

The pipeline's own call turns them into latents (and, where it has an image encoder, embeddings) at every sample, as it
has no call of its own for that. What `encode_prompt` makes of them is kept with the text.

Legend: F frames, H, W pixels, C = 3.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from viditq.errors import UserError
from viditq.models.checks import TAKES_IMAGE, given_to_call, needed_arguments
from viditq.models.registry import find_class
from viditq.prompt import Prompt, conditions_of

MARK = "condition:"
LISTS = ("input_images",)  # arguments that take a list also of one picture (OmniGen)
WITH_PICTURES = "encode_prompt_multiple_images"
"""What JoyImage-Edit encodes a prompt by, in place of `encode_prompt`, where it comes with a picture."""


def stored(prompt: str) -> dict[str, Tensor]:
    """The pictures of a prompt as tensors among its embeddings: uint8 [1, H, W, C] or [1, F, H, W, C]."""
    pixels = prompt.pixels() if isinstance(prompt, Prompt) else {}
    return {MARK + name: torch.from_numpy(value)[None] for name, value in pixels.items()}


def are_among(embeds: Mapping[str, Tensor]) -> bool:
    """Whether a prompt has pictures."""
    return any(name.startswith(MARK) for name in embeds)


def without(embeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The embeddings alone."""
    return {name: value for name, value in embeds.items() if not name.startswith(MARK)}


def given(embeds: Mapping[str, Tensor]) -> dict[str, Any]:
    """Argument of the call -> its picture, or list of frames; of a batch of one."""
    found = {name.removeprefix(MARK): value for name, value in embeds.items() if name.startswith(MARK)}
    return {name: _as_pictures(name, value[0].cpu()) for name, value in found.items()}


def _as_pictures(name: str, pixels: Tensor) -> Any:
    frames = [Image.fromarray(frame.numpy()) for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    frames = [frame.convert("L") for frame in frames] if "mask" in name else frames
    return frames if pixels.ndim == 4 or name in LISTS else frames[0]


def encoders_of(pipeline: Any) -> list[str]:
    """The names of the methods that a pipeline's call encodes prompts by."""
    return [name for name in ("encode_prompt", WITH_PICTURES) if hasattr(pipeline, name)]


def encoded_with_text(pipeline: Any) -> bool:
    """Whether `encode_prompt`, or what stands in its place, looks at pictures."""
    return hasattr(pipeline, WITH_PICTURES) or any(
        re.fullmatch(TAKES_IMAGE, name) for name in inspect.signature(pipeline.encode_prompt).parameters
    )


def made_up(adapter: Any) -> dict[str, Any]:
    """Grey pictures for what the pipeline does not sample without."""
    pipeline = find_class(adapter.pipeline)
    needed = needed_arguments(pipeline, given_to_call(adapter) - {*adapter.conditions})
    grey = Image.new("RGB", (adapter.width or 64, adapter.height or 64), (127, 127, 127))
    return {name: [grey] * 5 if "video" in name else _masked(name, grey) for name in needed}


def _masked(name: str, picture: Image.Image) -> Image.Image:
    return picture.convert("L") if "mask" in name else picture


def check_conditions(adapter: Any, prompts: list[str]) -> None:
    """Raises UserError for the first prompt without the pictures that the pipeline needs, or with others."""
    needed = needed_arguments(find_class(adapter.pipeline), given_to_call(adapter) - {*adapter.conditions})
    for prompt in prompts:
        given = conditions_of(prompt)
        if absent := [name for name in needed if name not in given]:
            raise UserError(
                f"{adapter.pipeline} samples from a picture: {absent[0]}, and the prompt {prompt[:60]!r} has none. "
                "Give data.images=FOLDER (one picture for each prompt) or FILE, or data=image_prompts."
            )
        if odd := [name for name in given if name not in adapter.conditions]:
            takes = ", ".join(adapter.conditions) or "none"
            raise UserError(
                f"The prompt {prompt[:60]!r} comes with {odd[0]}; {adapter.pipeline} takes these pictures: {takes} "
                "(data.conditions of data=image_prompts names them)."
            )

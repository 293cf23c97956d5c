"""Pictures that sampling starts from: kept with the embeddings of their prompt, given to the call as they are.

The pipeline's own call turns them into latents (and, where it has an image encoder, embeddings) at every sample, as it
has no call of its own for that. What `encode_prompt` makes of them is kept with the text.

Legend: F frames, H, W pixels, C = 3 (of a mask 1).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from viditq.errors import UserError
from viditq.models.checks import CLIPS, TAKES_IMAGE, given_to_call, needed_arguments
from viditq.models.particular import BROKEN_PICTURES, TENSORS
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


def given(adapter: Any, embeds: Mapping[str, Tensor]) -> dict[str, Any]:
    """Argument of the call -> its picture, or list of frames, or tensor, as it takes them; of a batch of one."""
    found = {name.removeprefix(MARK): value for name, value in embeds.items() if name.startswith(MARK)}
    return {name: _as_taken(adapter.pipeline, name, value[0].cpu()) for name, value in found.items()}


def _as_taken(pipeline: str, name: str, pixels: Tensor) -> Any:
    frames = [Image.fromarray(frame.numpy()) for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    frames = [frame.convert("L") for frame in frames] if "mask" in name else frames
    if axes := TENSORS.get(pipeline, {}).get(name):
        return _as_tensor(frames, axes)
    return frames if pixels.ndim == 4 or name in LISTS or re.search(CLIPS, name) else frames[0]


def _as_tensor(frames: list[Image.Image], axes: str) -> Tensor:
    values_FHWC = torch.stack([torch.from_numpy(np.array(frame)).float() for frame in frames])
    values_FHWC = values_FHWC[..., None] if values_FHWC.ndim == 3 else values_FHWC / 255
    return values_FHWC[None].permute([*map("BFHWC".index, axes)])


def encoders_of(pipeline: Any) -> list[str]:
    """The names of the methods that a pipeline's call encodes prompts by."""
    return [name for name in ("encode_prompt", WITH_PICTURES) if hasattr(pipeline, name)]


def encoded_with_text(pipeline: Any) -> bool:
    """Whether `encode_prompt`, or what stands in its place, looks at pictures."""
    return hasattr(pipeline, WITH_PICTURES) or any(
        re.fullmatch(TAKES_IMAGE, name) for name in inspect.signature(pipeline.encode_prompt).parameters
    )


def made_up(adapter: Any, every: bool = False) -> dict[str, Any]:
    """Grey pictures for what the pipeline does not sample without; every: for all that it takes."""
    pipeline = find_class(adapter.pipeline)
    needed = needed_arguments(pipeline, given_to_call(adapter) - {*adapter.conditions})
    names = adapter.conditions if every else needed
    grey = torch.full((adapter.height or 64, adapter.width or 64, 3), 127, dtype=torch.uint8)
    lengths = {name: _made_up_length(adapter, pipeline, name) for name in names if re.search(CLIPS, name)}
    clips = {name: grey.expand(lengths[name], -1, -1, -1) if name in lengths else grey for name in names}
    return {name: _as_taken(adapter.pipeline, name, value) for name, value in clips.items()}


def _made_up_length(adapter: Any, pipeline: Any, name: str) -> int:
    """Frames: as many as the sample's where the two are laid side by side as tensors."""
    if name not in TENSORS.get(adapter.pipeline, {}):
        return 5
    default = inspect.signature(pipeline.__call__).parameters["num_frames"].default
    return int(adapter.num_frames or default)


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
            why = f"; {broken}" if (broken := BROKEN_PICTURES.get(adapter.pipeline)) else ""
            raise UserError(
                f"The prompt {prompt[:60]!r} comes with {odd[0]}; {adapter.pipeline} takes these pictures: {takes} "
                f"(data.conditions of data=image_prompts names them{why})."
            )

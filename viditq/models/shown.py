"""The picture that a prompt comes with, as the pipeline resizes and crops it before it encodes it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from viditq.models.conditions import MARK, stored
from viditq.models.schedulers import make_scheduler
from viditq.models.trial import TrialError, shown_pictures


def as_shown(adapter: Any, prompts: Sequence[str]) -> list[Tensor]:
    """Of each prompt's `image`, uint8 [C, H, W]: measured in a dry call of the pipeline; as it is where that fails."""
    try:
        found = shown_pictures(adapter, make_scheduler(adapter), prompts)
    except TrialError:
        found = [None] * len(prompts)
    return [_as_given(prompt) if one is None else _pixels(one) for one, prompt in zip(found, prompts, strict=True)]


def _pixels(picture_CHW: Tensor) -> Tensor:
    return (picture_CHW.clamp(0, 1) * 255).round().to(torch.uint8)


def _as_given(prompt: str) -> Tensor:
    return stored(prompt)[MARK + "image"][0].movedim(-1, 0)

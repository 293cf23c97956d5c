"""Where prompts come from: our own captions, or a text file with one prompt a line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from viditq.data.moving_shapes import SCENES, Scene, render
from viditq.errors import UserError


class PromptData(Protocol):
    """Prompts to evaluate on, prompts to calibrate on, and real clips where there are any."""

    prompts: list[str]
    calibration_prompts: list[str]

    def real_clips(self, indices: Sequence[int]) -> Tensor | None:
        """Clips of the training distribution, uint8 [B, F, C, H, W], one per index; None where there are none."""


def _check_counts(num_prompts: int, num_calibration_prompts: int) -> None:
    for name, count in (("num_prompts", num_prompts), ("num_calibration_prompts", num_calibration_prompts)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"data.{name}={count!r} must be a whole number of at least 1.")


@dataclass
class MovingShapes:
    """Captions of the procedural clips, the same for every seed; evaluation and calibration scenes are disjoint.

    Image captions leave the motion out, so as captions (not as noise) they recur: there are only 136 of them.
    """

    modality: str
    num_prompts: int
    num_calibration_prompts: int
    prompt_seed: int = 0

    def __post_init__(self) -> None:
        _check_counts(self.num_prompts, self.num_calibration_prompts)
        generator = torch.Generator().manual_seed(self.prompt_seed)
        order = torch.randperm(len(SCENES), generator=generator).tolist()
        held_out, evaluation = order[:136], order[136:]
        video = self.modality == "video"
        self.scenes = [SCENES[evaluation[i % len(evaluation)]] for i in range(self.num_prompts)]
        calibration = [SCENES[held_out[i % len(held_out)]] for i in range(self.num_calibration_prompts)]
        self.prompts = [s.caption(video) for s in self.scenes]
        self.calibration_prompts = [s.caption(video) for s in calibration]

    def real_clips(self, indices: Sequence[int]) -> Tensor:
        """One drawn clip (or frame) per prompt index, of that prompt's scene."""
        return torch.stack([self._real_clip(self.scenes[i], i) for i in indices])

    def _real_clip(self, scene: Scene, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(7_000_003 + index)
        clip = render([scene], generator)[0]
        if self.modality == "image":
            clip = clip[torch.randint(len(clip), (1,), generator=generator)]
        return (clip * 255).round().to(torch.uint8)


@dataclass
class PromptFile:
    """One prompt a line, empty lines ignored; calibration takes another file, or the last prompts of this one."""

    path: str
    num_prompts: int
    num_calibration_prompts: int
    calibration_path: str | None = None

    def __post_init__(self) -> None:
        _check_counts(self.num_prompts, self.num_calibration_prompts)
        prompts = read_prompts(self.path)
        rest = read_prompts(self.calibration_path) if self.calibration_path else prompts[self.num_prompts :] or prompts
        self.prompts = prompts[: self.num_prompts]
        self.calibration_prompts = rest[: self.num_calibration_prompts]

    def real_clips(self, indices: Sequence[int]) -> None:
        """A text file has no clips."""


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file; raises UserError if it is missing, not UTF-8 text or holds none."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"Prompt file {path!r} does not exist. Give a text file with one prompt a line.")
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"Prompt file {path!r} is not UTF-8 text: {error}.") from error
    if not prompts:
        raise UserError(f"Prompt file {path!r} holds no prompt. Write one prompt a line.")
    return prompts

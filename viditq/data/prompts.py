"""Where prompts come from: our own captions, a file of prompts, COCO's captions, or the classes of a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from viditq.data.counts import MOST, check_counts
from viditq.data.images import pictures_of, with_images
from viditq.data.moving_shapes import SCENES, Scene, render
from viditq.data.prompt_files import has_ink, prompt_file, read_prompts
from viditq.data.samples import is_intact, save_sample
from viditq.data.text_embeds import digest, read_text_embeds
from viditq.errors import UserError
from viditq.prompt import Prompt


class PromptData(Protocol):
    """Prompts to evaluate on, prompts to calibrate on, and real clips where there are any.

    Prompts that come with pictures are `viditq.prompt.Prompt`.
    ready_embeds: what stands in for the text encoder's output, for the prompts that have it; ready_digest: its hash.
    files: all that these were read from.
    """

    files: Sequence[Path]
    prompts: list[str]
    calibration_prompts: list[str]
    ready_embeds: Mapping[str, dict[str, Tensor]]
    ready_digest: str | None

    def real_clips(self, indices: Sequence[int]) -> Tensor | None:
        """Clips of the training distribution, uint8 [B, F, C, H, W], one per index; None where there are none."""


@dataclass
class MovingShapes:
    """Captions of the procedural clips, the same for every seed; evaluation and calibration scenes are disjoint.

    Image captions leave the motion out, so as captions (not as noise) they recur: there are only 136 of them.
    first_frames: a folder; each caption comes with the first frame of its clip (`real_clips`), drawn there.
    """

    modality: str
    num_prompts: int
    num_calibration_prompts: int
    prompt_seed: int = 0
    images: str | None = None
    first_frames: str | None = None

    def __post_init__(self) -> None:
        check_counts(self.num_prompts, self.num_calibration_prompts)
        if self.images is not None and self.first_frames is not None:
            raise UserError("data.images and data.first_frames both give the first picture. Set one of them to null.")
        self.ready_embeds: Mapping[str, dict[str, Tensor]] = {}
        self.ready_digest: str | None = None
        generator = torch.Generator().manual_seed(self.prompt_seed)
        order = torch.randperm(len(SCENES), generator=generator).tolist()
        held_out, evaluation = order[:136], order[136:]
        video = self.modality == "video"
        self.scenes = [SCENES[evaluation[i % len(evaluation)]] for i in range(self.num_prompts)]
        calibration = [SCENES[held_out[i % len(held_out)]] for i in range(self.num_calibration_prompts)]
        captions, others = ([s.caption(video) for s in scenes] for scenes in (self.scenes, calibration))
        self.prompts, self.calibration_prompts = with_images(captions, others, self.images)
        if self.first_frames is not None:
            self.prompts = self._with_first_frames(self.scenes, 0)
            self.calibration_prompts = self._with_first_frames(calibration, MOST)
        self.files: Sequence[Path] = pictures_of([*self.prompts, *self.calibration_prompts])

    def real_clips(self, indices: Sequence[int]) -> Tensor:
        """One drawn clip (or frame) per prompt index, of that prompt's scene."""
        return torch.stack([self._real_clip(self.scenes[i], i) for i in indices])

    def _with_first_frames(self, scenes: Sequence[Scene], first: int) -> list[str]:
        folder, video = Path(str(self.first_frames)).expanduser(), self.modality == "video"
        prompts: list[str] = []
        for index, scene in enumerate(scenes, first):
            file = folder / f"{index:07d}_{SCENES.index(scene):03d}.png"
            if not is_intact(file, renew=True):
                save_sample(file, self._real_clip(scene, index)[:1])
            prompts.append(Prompt(scene.caption(video), {"image": file}))
        return prompts

    def _real_clip(self, scene: Scene, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(7_000_003 + index)
        clip = render([scene], generator)[0]
        if self.modality == "image":
            clip = clip[torch.randint(len(clip), (1,), generator=generator)]
        return (clip * 255).round().to(torch.uint8)


@dataclass
class PromptFile:
    """The prompts of a file (`read_prompts`); calibration takes another file, or the last prompts of this one.

    path: a text file, a table, or shipped:prompts/NAME; column: of a table, and of that of calibration_path. embeds:
    Open-Sora's text_embeds.pth of all prompts of the file, in its order, which saves the text encoder.
    """

    path: str
    num_prompts: int
    num_calibration_prompts: int
    calibration_path: str | None = None
    embeds: str | None = None
    column: str | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        check_counts(self.num_prompts, self.num_calibration_prompts)
        prompts, other = read_prompts(self.path, self.column), self.calibration_path
        rest = read_prompts(other, self.column) if other else prompts[self.num_prompts :] or prompts
        texts = prompts[: self.num_prompts], rest[: self.num_calibration_prompts]
        self.prompts, self.calibration_prompts = with_images(*texts, self.images)
        self.ready_embeds: Mapping[str, dict[str, Tensor]] = {}
        self.ready_digest = None if self.embeds is None else digest(self.embeds)
        if self.embeds is not None:
            embeds = read_text_embeds(self.embeds)
            if len(embeds) != len(prompts):
                raise UserError(
                    f"{self.embeds} holds {len(embeds)} prompts, {self.path} {len(prompts)}; they must match."
                )
            self.ready_embeds = dict(zip(prompts, embeds, strict=True))
        named = [prompt_file(path) for path in (self.path, other) if path]
        named += [Path(self.embeds).expanduser()] if self.embeds else []
        self.files: Sequence[Path] = [*named, *pictures_of([*self.prompts, *self.calibration_prompts])]

    def real_clips(self, indices: Sequence[int]) -> None:
        """A text file has no clips."""


@dataclass
class CocoCaptions:
    """COCO's captions, one per image: that of the lowest annotation id, images in the order of their ids.

    path: captions_val2014.json, captions_val2017.json, or another file laid out so. Calibration takes the images
    after the first num_prompts. Raises UserError if the file is something else or holds too few.
    """

    path: str
    num_prompts: int
    num_calibration_prompts: int
    images: str | None = None

    def __post_init__(self) -> None:
        check_counts(self.num_prompts, self.num_calibration_prompts)
        captions = read_coco(self.path)
        wanted = self.num_prompts + self.num_calibration_prompts
        if len(captions) < wanted:
            raise UserError(f"{self.path} has captions of {len(captions)} images; {wanted} are asked for.")
        texts = captions[: self.num_prompts], captions[self.num_prompts : wanted]
        self.prompts, self.calibration_prompts = with_images(*texts, self.images)
        self.ready_embeds: Mapping[str, dict[str, Tensor]] = {}
        self.ready_digest: str | None = None
        pictures = pictures_of([*self.prompts, *self.calibration_prompts])
        self.files: Sequence[Path] = [Path(self.path).expanduser(), *pictures]

    def real_clips(self, indices: Sequence[int]) -> None:
        """The captions come without their images."""


def read_coco(path: str) -> list[str]:
    """One caption per image; raises UserError if the file is missing or no COCO caption file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"Caption file {path!r} does not exist. Give COCO's captions_val2014.json or captions_val2017.json."
        )
    try:
        annotations = json.loads(file.read_text(encoding="utf-8-sig"))["annotations"]
        first = {a["image_id"]: a["caption"] for a in sorted(annotations, key=lambda a: a["id"], reverse=True)}
        captions = [" ".join(first[image].split()) for image in sorted(first)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no COCO caption file ({type(error).__name__}: {error}); it must hold annotations "
            "with image_id, id and caption."
        ) from error
    return [caption for caption in captions if has_ink(caption)]


@dataclass
class ClassLabels:
    """Numbers of classes for class-conditional models, drawn at random, without repetition while there are enough.

    Calibration draws from the same classes, in another order.
    """

    num_classes: int
    num_prompts: int
    num_calibration_prompts: int
    prompt_seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self.num_prompts, self.num_calibration_prompts)
        if self.num_classes < 1:
            raise UserError(f"data.num_classes={self.num_classes} must be a whole number of at least 1.")
        self.ready_embeds: Mapping[str, dict[str, Tensor]] = {}
        self.ready_digest: str | None = None
        self.files: Sequence[Path] = ()
        generator = torch.Generator().manual_seed(self.prompt_seed)
        self.prompts = self._draw(generator, self.num_prompts)
        self.calibration_prompts = self._draw(generator, self.num_calibration_prompts)

    def _draw(self, generator: torch.Generator, count: int) -> list[str]:
        order = torch.randperm(self.num_classes, generator=generator).tolist()
        return [str(order[i % self.num_classes]) for i in range(count)]

    def real_clips(self, indices: Sequence[int]) -> None:
        """Numbers have no clips."""

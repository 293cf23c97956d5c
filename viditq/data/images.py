"""Pictures beside prompts (`data.images`), and tables or folders that hold both (`data=image_prompts`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from viditq.data.counts import check_counts
from viditq.data.prompt_files import prompt_file, read_column, read_prompts
from viditq.errors import UserError
from viditq.prompt import PICTURES, Prompt, conditions_of, frames_of

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")


def with_images(prompts: list[str], calibration: list[str], images: str | None) -> tuple[list[str], list[str]]:
    """Prompts to evaluate and to calibrate on, each with the picture that sampling starts from.

    images: None = none; a file = it is everyone's; a folder = a picture for each prompt to evaluate on, by name, and
    those after them for calibration, or all of them where there are no more, in turn. Raises UserError for too few.
    """
    if images is None:
        return prompts, calibration
    path = Path(images).expanduser()
    found = frames_of(path)
    if not path.is_dir():
        found *= len(prompts)
    if len(found) < len(prompts):
        raise UserError(
            f"data.images={images} holds {len(found)} pictures for {len(prompts)} prompts. Give one for each, or "
            f"data.num_prompts={len(found)}."
        )
    rest = found[len(prompts) :] or found
    given = [*zip(prompts, found, strict=False), *((p, rest[i % len(rest)]) for i, p in enumerate(calibration))]
    both: list[str] = [Prompt(prompt, {"image": file}) for prompt, file in given]
    return both[: len(prompts)], both[len(prompts) :]


@dataclass
class ImagePrompts:
    """Prompts with pictures: a table, or a folder in which NAME.txt holds the prompt of NAME.png.

    path: a csv, tsv, json or jsonl, whose files are named from its own folder, or a folder. column: where the table
    has the prompts. conditions: argument of the pipeline's call -> column that names its picture (or a folder of
    frames), such as {image: first_frame, last_image: last_frame, mask_image: mask}; an empty field is no picture.
    Calibration takes the prompts after the first num_prompts, or all. Raises UserError for what cannot be meant so.
    """

    path: str
    num_prompts: int
    num_calibration_prompts: int
    column: str = "prompt"
    conditions: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        check_counts(self.num_prompts, self.num_calibration_prompts)
        source = prompt_file(self.path)
        if source.is_dir():
            rows = _of_folder(source)
        elif source.suffix.lower() in TABLES:
            rows = self._of_table(source)
        else:
            raise UserError(f"data.path={self.path!r} must be a folder or a table ({', '.join(TABLES)}).")
        rest = rows[self.num_prompts :] or rows
        self.prompts = [_prompt(*row) for row in rows[: self.num_prompts]]
        self.calibration_prompts = [_prompt(*row) for row in rest[: self.num_calibration_prompts]]
        self.ready_embeds: Mapping[str, dict[str, Tensor]] = {}
        self.ready_digest: str | None = None
        self.files: Sequence[Path] = files_of(source, [*self.prompts, *self.calibration_prompts])

    def _of_table(self, source: Path) -> list[tuple[str, dict[str, Path]]]:
        columns = dict(self.conditions or {"image": "image"})
        texts = read_prompts(self.path, self.column)
        named: dict[str, list[Any]] = {name: read_column(self.path, column) for name, column in columns.items()}
        rows = []
        for i, text in enumerate(texts):
            values = {name: values[i] for name, values in named.items() if values[i] not in (None, "")}
            rows.append((text, {name: source.parent / Path(str(value)).expanduser() for name, value in values.items()}))
        return rows

    def real_clips(self, indices: Sequence[int]) -> None:
        """The pictures are where sampling starts, not what it should make."""


def files_of(source: Path, prompts: Sequence[str]) -> list[Path]:
    """All that these prompts were read from."""
    return [*(sorted(source.glob("*.txt")) if source.is_dir() else [source]), *pictures_of(prompts)]


def pictures_of(prompts: Sequence[str]) -> list[Path]:
    """The files of all their pictures."""
    return sorted({file for p in prompts for path in conditions_of(p).values() for file in frames_of(path)})


def _of_folder(folder: Path) -> list[tuple[str, dict[str, Path]]]:
    pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not pictures:
        raise UserError(f"data.path={folder} holds no pictures ({', '.join(PICTURES)}).")
    if alone := [file.name for file in pictures if not file.with_suffix(".txt").is_file()]:
        text = Path(alone[0]).with_suffix(".txt")
        raise UserError(f"{folder / alone[0]} has no prompt: write it into {text} beside it.")
    texts = {file: read_prompts(str(file.with_suffix(".txt"))) for file in pictures}
    if several := [file for file, found in texts.items() if len(found) > 1]:
        raise UserError(f"{several[0].with_suffix('.txt')} holds several prompts; a picture has one, on one line.")
    return [(found[0], {"image": file}) for file, found in texts.items()]


def _prompt(text: str, conditions: dict[str, Path]) -> str:
    return Prompt(text, conditions) if conditions else text

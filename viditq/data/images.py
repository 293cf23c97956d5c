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
CAPTIONS = ("before", "after")
Row = tuple[str, dict[str, Path], dict[str, str]]
"""A prompt, its pictures, its captions."""


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
    captions: {before: COLUMN, after: COLUMN} of a table, what the picture shows and what its edit should show, where
    the prompt is an instruction (`metric=edit_direction`). Calibration takes the prompts after the first num_prompts,
    or all. Raises UserError for what cannot be meant so.
    """

    path: str
    num_prompts: int
    num_calibration_prompts: int
    column: str = "prompt"
    conditions: Mapping[str, str] | None = None
    captions: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        check_counts(self.num_prompts, self.num_calibration_prompts)
        source = prompt_file(self.path)
        if unknown := [key for key in self.captions or {} if key not in CAPTIONS]:
            raise UserError(f"data.captions has {unknown[0]!r}; it names columns for {' and '.join(CAPTIONS)}.")
        if self.captions and source.is_dir():
            raise UserError("data.captions names columns of a table, and data.path is a folder. Give a table.")
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

    def _of_table(self, source: Path) -> list[Row]:
        columns = dict(self.conditions or {"image": "image"})
        texts = read_prompts(self.path, self.column)
        named: dict[str, list[Any]] = {name: read_column(self.path, column) for name, column in columns.items()}
        told = {key: read_column(self.path, column) for key, column in (self.captions or {}).items()}
        rows = []
        for i, text in enumerate(texts):
            values, captions = (
                {name: str(values[i]) for name, values in columns.items() if values[i] not in (None, "")}
                for columns in (named, told)
            )
            files = {name: source.parent / Path(value).expanduser() for name, value in values.items()}
            rows.append((text, files, captions))
        return rows

    def real_clips(self, indices: Sequence[int]) -> None:
        """The pictures are where sampling starts, not what it should make."""


def files_of(source: Path, prompts: Sequence[str]) -> list[Path]:
    """All that these prompts were read from."""
    return [*(sorted(source.glob("*.txt")) if source.is_dir() else [source]), *pictures_of(prompts)]


def pictures_of(prompts: Sequence[str]) -> list[Path]:
    """The files of all their pictures."""
    return sorted({file for p in prompts for path in conditions_of(p).values() for file in frames_of(path)})


def _of_folder(folder: Path) -> list[Row]:
    pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not pictures:
        raise UserError(f"data.path={folder} holds no pictures ({', '.join(PICTURES)}).")
    if alone := [file.name for file in pictures if not file.with_suffix(".txt").is_file()]:
        text = Path(alone[0]).with_suffix(".txt")
        raise UserError(f"{folder / alone[0]} has no prompt: write it into {text} beside it.")
    texts = {file: read_prompts(str(file.with_suffix(".txt"))) for file in pictures}
    if several := [file for file, found in texts.items() if len(found) > 1]:
        raise UserError(f"{several[0].with_suffix('.txt')} holds several prompts; a picture has one, on one line.")
    return [(found[0], {"image": file}, {}) for file, found in texts.items()]


def _prompt(text: str, conditions: dict[str, Path], captions: dict[str, str]) -> str:
    return Prompt(text, conditions, captions) if conditions else text

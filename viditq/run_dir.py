"""What is on disk already: fingerprints, entries of the shared cache, and the folder of one run."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from viditq.errors import UserError
from viditq.files import LOCK, lock, read_json, write_json

CHOICE = "hydra.run.dir=FOLDER"  # what chooses the folder of a run of run.py
CONFIG = "run.json"
OVERRIDES = "overrides"  # its key for the words of the command line, which are no part of the configuration
BEFORE_CONFIG = ("hydra", "viditq.log", LOCK, "*.tmp")  # what a run may have written when it writes CONFIG


def check_place(place: str | Path, choice: str = CHOICE) -> Path:
    """The folder of a run that `place` names, `~` expanded; nothing is written.

    Raises UserError for one that no run may take: empty or the root, not to be written to, or with files of others.
    """
    folder = check_folder(str(place), choice)
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(
            f"{folder} cannot be written to: no permission, or a read-only disk. Choose another with {choice}."
        )
    if (folder / CONFIG).is_file() or not folder.is_dir():
        return folder
    foreign = [p.name for p in sorted(folder.iterdir()) if not any(map(p.match, BEFORE_CONFIG))]
    if foreign:
        raise UserError(
            f"{folder} holds files that are of no run, such as {foreign[0]}: a run deletes and replaces what lies in "
            f"its folder. Choose a new or an empty one with {choice}."
        )
    return folder


def check_folder(place: str, choice: str) -> Path:
    """The folder that `place` names, `~` expanded; raises UserError for none, the root, or one where a file is."""
    folder = Path(os.path.expanduser(place))  # which leaves an unknown ~user as it is
    if not place.strip() or folder.resolve() == Path(folder.resolve().anchor):
        raise UserError(f"{place!r} is no folder to write to. Choose one with {choice}.")
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f"{folder}: a file is where a folder has to be ({existing}). Choose another with {choice}.")
    return folder


def fingerprint(key: Mapping[str, Any]) -> str:
    """Hash of plain values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"a.b": leaf}."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def without_modules(value: Any) -> Any:
    """The same configuration with each `_target_` as its class alone: a class that moved is still the same choice."""
    if isinstance(value, Mapping):
        return {k: str(v).rpartition(".")[2] if k == "_target_" else without_modules(v) for k, v in value.items()}
    return [without_modules(one) for one in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Entry:
    """One output that experiments share, <kind folder>/<hash of key>; `key.json` beside it holds the key."""

    kind: Path
    key: Mapping[str, Any]

    @cached_property
    def path(self) -> Path:
        return self.kind / fingerprint(self.key)

    @property
    def key_file(self) -> Path:
        return self.path / "key.json"


@dataclass(frozen=True)
class RunDir:
    """The folder of one run and what lies in it; `choice` is what chooses another on the command line.

    overrides: the words of the command line that made it.
    """

    path: Path
    config: Mapping[str, Any]
    choice: str = CHOICE
    overrides: Sequence[str] = ()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no other process work on this run; raises UserError if one does, or if the folder cannot be written."""

        def on_wait() -> None:
            raise UserError(
                f"Another process is working on {self.path}. Wait for it, stop it, or choose another folder with "
                f"{self.choice}."
            )

        check_place(self.path, self.choice)
        with lock(self.path, on_wait):
            yield

    def claim(self) -> None:
        """Write run.json, or raise UserError if the folder was made by another configuration."""
        file = self.path / CONFIG
        if not file.is_file():
            write_json(file, {**self.config, **({OVERRIDES: [*self.overrides]} if self.overrides else {})})
            return
        remedy = f"Delete the folder or choose another with {self.choice}."
        old, new = (flatten(without_modules(config)) for config in (_alone(read_json(file, remedy)), self.config))
        absent = "(absent)"
        changed = [k for k in sorted({*old, *new}) if old.get(k, absent) != new.get(k, absent)]
        if changed:
            lines = [f"  {k}: {old.get(k, absent)} there, {new.get(k, absent)} now" for k in changed]
            raise UserError(
                f"{self.path} was made by another configuration. It differs in\n" + "\n".join(lines) + "\n"
                f"Choose another folder with {self.choice}, undo the change, or delete the folder."
            )

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.config)

    @property
    def artifact(self) -> Path:
        return self.path / "quantized"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def per_prompt(self) -> Path:
        return self.path / "per_prompt.json"

    @property
    def picture(self) -> Path:
        return self.path / "comparison.png"

    @property
    def errors(self) -> Path:
        return self.path / "errors.json"

    @property
    def embedding_errors(self) -> Path:
        """How far the embeddings of quantized text encoders are from the float ones'."""
        return self.path / "text_encoder.json"

    @property
    def incoherence(self) -> Path:
        """How far the largest values of each layer stick out, before and after scaling and rotation."""
        return self.path / "incoherence.json"

    @property
    def incoherence_picture(self) -> Path:
        return self.incoherence.with_suffix(".png")

    @property
    def executed(self) -> Path:
        """Which backend computed how many of the quantized Linears while samples were generated."""
        return self.path / "executed.json"

    @property
    def external(self) -> Path:
        """What another library has quantized, with how many bits and bytes."""
        return self.path / "external.json"

    @property
    def speed(self) -> Path:
        """Time and memory of a step of the denoiser, in float and quantized."""
        return self.path / "speed.json"

    @property
    def reconstruction(self) -> Path:
        """What learning by block did for each block."""
        return self.path / "reconstruction.json"

    @property
    def learned_blocks(self) -> Path:
        """What was learned so far, until the artifact is there."""
        return self.path / "blocks"

    @property
    def plan(self) -> Path:
        """The plan that a search has found."""
        return self.path / "plan.json"

    @property
    def search(self) -> Path:
        """What a search has measured and decided."""
        return self.path / "search.json"

    @property
    def treatments(self) -> Path:
        """What a search of treatments has measured and decided."""
        return self.path / "treatments.json"

    @property
    def treatments_picture(self) -> Path:
        return self.path / "treatments.png"

    @property
    def heat_map(self) -> Path:
        return self.path / "sensitivity.png"

    @property
    def budget_curve(self) -> Path:
        return self.path / "budget_curve.png"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def logged(self) -> Path:
        return self.path / "logged.json"

    def forget_evaluation(self) -> None:
        """Remove what was computed from samples that have changed."""
        for path in (self.metrics, self.per_prompt, self.picture, self.picture.with_suffix(".gif")):
            path.unlink(missing_ok=True)
        self.forget_report()

    def forget_report(self) -> None:
        """Remove what tells of files that have changed."""
        for path in (self.page, self.logged):
            path.unlink(missing_ok=True)


def _alone(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != OVERRIDES}


def overrides_of(folder: Path) -> list[str]:
    """The command line's words that made the run in `folder`: as run.json has them, in earlier versions Hydra's file.

    Empty where neither is there, or has any.
    """
    if words := read_json(folder / CONFIG).get(OVERRIDES):
        return [str(word) for word in words]
    file = folder / "hydra" / "overrides.yaml"
    found = yaml.safe_load(file.read_text()) if file.is_file() else None
    return [str(word) for word in found or []]

"""README.md beside a quantized model: written with it, anew when the verdict comes, and never over a changed one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from viditq.export.comfy_file import COST
from viditq.files import atomic, is_whole, read_json, stored_metadata
from viditq.interop.folder import CHANGED, DESCRIPTION
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import text_settings
from viditq.models.registry import find_class
from viditq.quant.artifact import CARD, PICTURES, PLAN, denoiser_bytes, read_meta, size_bytes
from viditq.report.model_card import ModelCard, mark_of


def artifact_card(artifact: Path, command: str, adapter: ModelAdapter) -> Card:
    """That of an artifact. command: that made it, where the card that is there does not say."""
    return Card(artifact, artifact, None, command, adapter)


def export_card(artifact: Path, place: Path, target: str) -> Card:
    """That of an export: in its folder, or beside its file."""
    return Card(artifact, place, target, None, ModelAdapter.from_dict(read_meta(artifact)["model"]))


class Card:
    """A card and its pictures, in the folder `place` or beside that file."""

    def __init__(
        self, artifact: Path, place: Path, target: str | None, command: str | None, adapter: ModelAdapter
    ) -> None:
        self.path = place / CARD if place.is_dir() else place.with_name(f"{place.stem}.{CARD}")
        self.files = [place] if place.is_dir() else _files(place, adapter.denoiser_names)
        """What the card is of: a folder, or a file for each denoiser."""
        run = artifact.parent
        mine, theirs = (_mark(path) for path in (self.path, artifact / CARD))
        self.is_ours = not self.path.exists() or bool(mine and mine["ours"])
        metrics = read_json(run / "metrics.json") if is_whole(run / "metrics.json") else None
        found = [run / name for name in PICTURES if is_whole(run / name)] if metrics is not None else []
        before = "" if place.is_dir() else f"{place.stem}."  # a folder of files has pictures of others too
        self.pictures = {self.path.with_name(f"{before}{path.name}"): path for path in found}
        place_of_base = adapter.source if adapter.denoiser_path is None else adapter.denoiser_source
        self.text = ModelCard(
            base=place_of_base.path if place_of_base.of_hub else adapter.name,
            of_hub=place_of_base.of_hub,
            pipeline=adapter.pipeline,
            modality=adapter.modality,
            by_class=adapter.conditioning == "class",
            dtype=adapter.dtype,
            plan=read_json(artifact / PLAN),
            meta=read_meta(artifact),
            settings=text_settings(adapter, find_class(adapter.pipeline)),
            size=denoiser_bytes(artifact),
            metrics=metrics,
            pictures=[path.name for path in self.pictures],
            command=next((mark["command"] for mark in (mine, theirs) if mark and mark.get("command")), command),
            target=target,
            component_dtypes=adapter.component_dtypes,
            exported_size=None if target is None else _size(self.files),
            changed=None if target is None else _changed(self.files[0]),
        ).text()

    def is_there(self) -> bool:
        """Whether there is nothing to write, or somebody has changed it."""
        same = self.is_ours and self.path.exists() and self.path.read_text(encoding="utf-8") == self.text
        copied = all(is_whole(mine) and mine.stat().st_size == p.stat().st_size for mine, p in self.pictures.items())
        return not self.is_ours or (same and copied)

    def write(self) -> None:
        """Unless `is_there`."""
        if self.is_there():
            return
        for mine, path in self.pictures.items():
            with atomic(mine) as temporary:
                shutil.copyfile(path, temporary)
        with atomic(self.path) as temporary:
            temporary.write_text(self.text, encoding="utf-8")


def _mark(path: Path) -> dict[str, Any] | None:
    return mark_of(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None


def _files(place: Path, denoisers: Sequence[str]) -> list[Path]:
    """The names of several denoisers stand before the ending."""
    several = len(denoisers) > 1
    return [place.with_name(f"{place.stem}.{name}{place.suffix}") for name in denoisers] if several else [place]


def _changed(place: Path) -> str:
    """What an export says of itself that is other than in the artifact."""
    if place.is_dir():
        told = read_json(place / DESCRIPTION) if is_whole(place / DESCRIPTION) else {}
        return str(told.get(CHANGED, ""))
    return str(json.loads(stored_metadata(place).get(COST, "{}")).get(CHANGED, ""))


def _size(places: Sequence[Path]) -> int:
    return sum(size_bytes(place) if place.is_dir() else place.stat().st_size for place in places)

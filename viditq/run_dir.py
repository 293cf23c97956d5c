"""What is on disk already: fingerprints, the shared cache, and the folder of one run."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from viditq.errors import UserError
from viditq.files import read_json, write_json


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


class Cache:
    """Outputs that experiments share; each entry lies beside `key.json`, the values its fingerprint was made from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entry(self, kind: str, key: Mapping[str, Any]) -> Path:
        """The folder of this entry, made if it is new."""
        path = self.folder / kind / fingerprint(key)
        if not (path / "key.json").is_file():
            write_json(path / "key.json", key)
        return path


class RunDir:
    """The folder of one run: refuses another configuration, remembers how long each stage took."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, config
        self._check_same(path / "run.json")

    def _check_same(self, file: Path) -> None:
        if not file.is_file():
            if self.path.is_file() or (self.path.is_dir() and not os.access(self.path, os.W_OK)):
                raise UserError(f"{self.path} cannot be written to. Choose another with hydra.run.dir=FOLDER.")
            write_json(file, self.config)
            return
        remedy = "Delete the folder or choose another with hydra.run.dir=FOLDER."
        old, new = flatten(read_json(file, remedy)), flatten(self.config)
        absent = "(absent)"
        changed = [k for k in sorted({*old, *new}) if old.get(k, absent) != new.get(k, absent)]
        if changed:
            lines = [f"  {k}: {old.get(k, absent)} there, {new.get(k, absent)} now" for k in changed]
            raise UserError(
                f"{self.path} was made by another configuration. It differs in\n" + "\n".join(lines) + "\n"
                "Choose another folder with hydra.run.dir=FOLDER, undo the change, or delete the folder."
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

    def forget_evaluation(self) -> None:
        """Remove what was computed from samples that have changed."""
        for path in (self.metrics, self.per_prompt, self.picture, self.picture.with_suffix(".gif")):
            path.unlink(missing_ok=True)


@contextmanager
def timed(folder: Path, stage: str) -> Iterator[None]:
    """Add the seconds of the enclosed work to <folder>/seconds.json (an interrupted stage counts what it got to)."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = read_seconds(folder)
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 2)
        write_json(folder / "seconds.json", seconds)


def read_seconds(folder: Path) -> dict[str, float]:
    """Stage -> seconds, as recorded in `folder`."""
    file = folder / "seconds.json"
    return read_json(file) if file.is_file() else {}

"""What W&B wrote of an offline run. W&B has no Python reader of its own any more (its service reads the file)."""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768  # LevelDB's log format: records are cut at blocks
HEADER = struct.Struct("<IHB")  # checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last part
WHOLE, LAST = 1, 4


def records(path: Path) -> Iterator[Record]:
    """All records of a .wandb file."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + HEADER.size <= len(data):
        if BLOCK - position % BLOCK < HEADER.size:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, position)
        position += HEADER.size
        parts += data[position : position + length]
        assert WHOLE <= kind <= LAST
        position += length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@dataclass
class OfflineRun:
    """The records of one run, put together; keys are joined by dots."""

    folder: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    kinds: set[str] = field(default_factory=set)

    def table(self, key: str) -> list[dict[str, Any]]:
        """The rows of a logged table."""
        assert self.summary[f"{key}._type"] == "table-file"
        content = json.loads((self.folder / "files" / self.summary[f"{key}.path"]).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    def file(self, key: str) -> Path:
        """The file of a logged image, video or page."""
        return self.folder / "files" / self.summary[f"{key}.path"]

    def plot(self, key: str) -> dict[str, Any]:
        """How W&B draws a plot: its panel's configuration."""
        return self.config[f"_wandb.visualize.{key}"]["panel_config"]


def away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine counts from now on, and W&B writes no log outside of `home`."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("HOME", str(home))


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The offline runs below <folder>/wandb. The service writes after `finish` has returned: it is ended first."""
    wandb.teardown()
    return [_read(path) for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))]


def _read(path: Path) -> OfflineRun:
    found = OfflineRun(path.parent)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        value = getattr(record, kind)
        found.kinds.add(kind)
        if kind == "run":
            found.run = value
        elif kind in ("config", "summary"):
            getattr(found, kind).update(_items(value.update))
        elif kind == "history":
            found.history.append(_items(value.item))
        elif kind == "artifact":
            found.artifacts[value.name] = value
        elif kind == "exit":
            found.exit_code = value.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

"""What a finished run sends to its logger."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from hydra.utils import instantiate
from PIL import Image

from viditq.engine.logging import log_run
from viditq.run_dir import RunDir

METRICS: dict[str, Any] = {
    "metrics": {"psnr": 31.5, "fid": None},
    "standard_errors": {"psnr": 0.5, "fid": None},
    "float_metrics": {"fid": 12.0},
    "seconds": {"generate": 3.0},
    "average_weight_bits": 4.5,
    "average_activation_bits": 8.5,
    "size_bytes": 1000,
    "float_size_bytes": 3000,
}
CONFIG = {"name": "w4a8", "quant": {"weight": {"bits": 4}}}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    directory = RunDir(tmp_path / "run", CONFIG)
    directory.claim()
    Image.new("RGB", (8, 8)).save(directory.picture)
    return directory


def make_logger(configure: Callable, name: str, run_dir: RunDir) -> Any:
    """The logger that a run would use."""
    make = instantiate(configure(f"logger={name}", "name=x").logger, _partial_=True)
    return make(run_dir.path, "w4a8", "experiment=w4a8 seed=0,1", run_dir.fingerprint)


def written_by_wandb(run_dir: RunDir) -> bytes:
    """The offline records of the one run. W&B's service writes them after `finish` has returned: end it first."""
    wandb.teardown()
    (file,) = (run_dir.path / "wandb").glob(f"offline-run-*/run-{run_dir.fingerprint}.wandb")
    return file.read_bytes()


def test_csv(configure: Callable, run_dir: RunDir) -> None:
    log_run(make_logger(configure, "csv", run_dir), CONFIG, run_dir, METRICS)
    with (run_dir.path / "csv" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["metrics/psnr"]) == 31.5 and float(row["standard_errors/psnr"]) == 0.5
    assert float(row["seconds/generate"]) == 3.0 and float(row["size_bytes"]) == 1000
    assert float(row["float_metrics/fid"]) == 12.0 and "metrics/fid" not in row


def test_none(configure: Callable, run_dir: RunDir) -> None:
    before = set(run_dir.path.iterdir())
    log_run(make_logger(configure, "none", run_dir), CONFIG, run_dir, METRICS)
    assert set(run_dir.path.iterdir()) == before


def test_wandb_offline_without_picture(configure: Callable, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run_dir.picture.unlink()
    log_run(make_logger(configure, "wandb", run_dir), CONFIG, run_dir, METRICS)
    assert b"31.5" in written_by_wandb(run_dir)


def test_wandb_offline(configure: Callable, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_DIR", str(run_dir.path))
    logger = make_logger(configure, "wandb", run_dir)
    run = logger.experiment
    assert (run.id, run.group, run.name) == (run_dir.fingerprint, "experiment=w4a8 seed=0,1", "w4a8")
    assert run.settings.mode == "offline"
    log_run(logger, CONFIG, run_dir, METRICS)
    assert run.config["quant.weight.bits"] == 4
    records = written_by_wandb(run_dir)
    for text in (b"metrics/psnr", b"31.5", b"quant.weight.bits", b"experiment=w4a8 seed=0,1", b"comparison"):
        assert text in records, text
    assert list((run_dir.path / "wandb").glob("offline-run-*/files/media/images/comparison*.png"))
    assert json.loads((run_dir.path / "run.json").read_text()) == CONFIG

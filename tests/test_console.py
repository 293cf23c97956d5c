"""The end of a run as printed, with verdicts and, for older runs, without."""

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from viditq.console import print_summary
from viditq.metrics.verdict import verdicts

LABELS = {
    "psnr": {"label": "PSNR", "unit": "dB", "higher_is_better": True},
    "fvd": {"label": "FVD [shapes]", "unit": "", "higher_is_better": False},
}
OLD = {
    "metrics": {"psnr": 35.5, "fvd": 2.9},
    "standard_errors": {"psnr": 0.54, "fvd": None},
    "float_metrics": {},
    "labels": LABELS,
    "model": "tiny_video",
    "experiment": "w4a8",
    "average_weight_bits": 4.98,
    "average_activation_bits": 8.5,
    "size_bytes": 5_321_585,
    "float_size_bytes": 9_058_240,
    "prompts": 16,
    "seconds": {"generate": 31.43},
}


def with_verdicts() -> dict[str, Any]:
    """Metrics of 16 prompts, floors of 8."""

    def results(psnr: float, count: int) -> dict[str, Any]:
        scores = psnr + torch.randn(count, generator=torch.Generator().manual_seed(int(psnr)), dtype=torch.float64)
        error = torch.tensor(0.5).double()
        fvd = {"value": torch.tensor(2.9).double(), "standard_error": error, "num_features": torch.tensor(64)}
        pairs = {"value": scores.mean(), "standard_error": error, "index": torch.arange(count), "per_sample": scores}
        return {"psnr": pairs, "fvd": fvd}

    floors = {"seed": results(17, 8), "bfloat16": results(60, 8)}
    floor = {"num_prompts": 8, "seed": 1, "dtype": "bfloat16"}
    return {**OLD, "verdict": verdicts(results(35.5, 16), results(35.5, 8), floors, LABELS), "noise_floor": floor}


def printed(metrics: dict[str, Any], folder: Path, width: int = 100) -> str:
    """As the runner prints it."""
    console = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)
    paths = {name: folder / name for name in ("page", "picture", "metrics", "artifact")}
    paths["speed"] = folder / "speed.json"
    (folder / "metrics").touch()
    print_summary(console, metrics, SimpleNamespace(**paths))  # type: ignore[arg-type]
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100])
def test_headline_table_and_warnings(tmp_path, width):
    text = printed(with_verdicts(), tmp_path, width)
    assert (
        "\nquality: equal within noise in 1 of 1 metric; samples: differ from float's in 1 of 1 metric: PSNR\n" in text
    )
    assert text.index("differ from float") < text.index("mean of 16 pairs, noise floors of the first 8")
    assert re.search(r" -2\d\.\d+ vs bf16", text)
    assert "FVD [shapes]*" in text and "…" not in text
    assert "* FVD [shapes]: 16 samples of 64 features, fewer than 320" in text
    assert "1.70x smaller" in text and f"metrics: {tmp_path / 'metrics'}" in text and "picture:" not in text


def test_runs_made_before_there_were_verdicts(tmp_path):
    text = printed(OLD, tmp_path, 80)
    assert "16 pairs, mean ± standard error" in text and "35.50 ± 0.54 dB" in text
    assert "equal within noise" not in text

"""Classes of a user's own: what docs/own_classes.md shows, written out and run."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT, Forked
from viditq.files import read_json


def written(page: str, folder: Path) -> int:
    """The files that a page shows, put where it names them; how many."""
    shown = re.findall(r"`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", page, re.DOTALL)
    for name, text in shown:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return len(shown)


def test_what_the_page_shows_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "own_classes.md").read_text()
    assert written(page, tmp_path) == 6
    words = re.search(r"viditq (--config-dir my_conf experiment=.*)\n", page)[1].replace("'", "").split()
    run = Forked(tmp_path, "own", *words, "logger=none", "hydra.run.dir=run", "cache_dir=cache", here=tmp_path)
    assert run.ended()[0] == 0, run.report()
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert 0 < metrics["metrics"]["worst_pixel"] <= 1
    plan = read_json(tmp_path / "run" / "quantized" / "plan.json")
    assert '"my_flip"' in str(plan).replace("'", '"')
    assert not any(layer.startswith("transformer_blocks.3.") for layer in plan["layers"])
    told = Forked(
        tmp_path, "told", "layers", "--config-dir", "my_conf", "model=mine", "quant/smoothing=flip", here=tmp_path
    )
    status, printed, _ = told.ended()
    assert status == 0 and "20 of 46 Linears" in printed and "my_flip" in printed


def test_a_whole_method_of_ones_own(tmp_path: Path) -> None:
    """docs/add_a_method.md: its preset quantizes with its rounding, which does what it says, and refuses groups."""
    page = (ROOT / "docs" / "add_a_method.md").read_text()
    assert written(page, tmp_path) == 3
    asked = ["--config-dir", "my_conf", "experiment=my_method", "model=tiny_image", "stages=[prompts,quantize]"]
    rest = ["data.num_prompts=1", "logger=none", "cache_dir=cache"]
    run = Forked(tmp_path, "own", *asked, *rest, "hydra.run.dir=run", here=tmp_path)
    assert run.ended()[0] == 0, run.report()
    plan = read_json(tmp_path / "run" / "quantized" / "plan.json")
    schemes = [*plan["schemes"].values()]
    assert {scheme["rounding"]["name"] for scheme in schemes} == {"even_rows"} and "rotate" in str(schemes)
    grouped = Forked(
        tmp_path,
        "grouped",
        *asked,
        *rest,
        "quant/format@quant.weight=int4_group64",
        "hydra.run.dir=grouped",
        here=tmp_path,
    )
    status, _, told = grouped.ended()
    assert status == 2 and "one scale a row" in told


def test_its_rows_are_even(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's errors sum to half a step at most, unless a code is at its grid's end; nearest leaves several."""
    import torch

    from viditq.quant import QuantSpec
    from viditq.quant.description.registry import ROUNDINGS
    from viditq.quant.methods.quantizer import dequantize_weight, min_max_grid, quantize_weight

    written((ROOT / "docs" / "add_a_method.md").read_text(), tmp_path)
    monkeypatch.setattr(ROUNDINGS, "_entries", dict(ROUNDINGS._entries))  # what the page enters is gone afterwards
    names: dict[str, Any] = {"__name__": "my_rounding"}
    exec((tmp_path / "my_rounding.py").read_text(), names)
    rounding = names["EvenRows"]()
    weight, spec = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)), QuantSpec(4, granularity="channel")
    grid = min_max_grid(weight, spec)
    even, nearest = rounding.quantize(weight, spec, grid), quantize_weight(weight, spec, grid)
    sums = [((weight - dequantize_weight(q, spec)) / grid[0]).sum(1).abs() for q in (even, nearest)]
    assert sums[0].quantile(0.9) <= 0.51 and sums[1].mean() > 1.5
    assert (even.codes.int() - nearest.codes.int()).abs().max() == 1

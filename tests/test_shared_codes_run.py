"""quant.smoothing.min_gain through a run: decided when it quantizes, told, and what later stages read."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from viditq.files import read_json
from viditq.loading import load_quantized
from viditq.quant.artifact import size_bytes
from viditq.quant.execution.linear import quant_linears
from viditq.report.model_card import recipe_words

Run = Callable[..., Any]
OPEN = ["quant=w4a8", "quant/smoothing=timestep_aware", "quant.smoothing.min_gain=0.03"]


def test_layers_that_gain_little_share_their_codes(
    run: Run, shared_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, shared_cache, *OPEN, "stages=[prompts,calibrate,quantize]")
    told, folder = capsys.readouterr().out, tmp_path / "quantized"
    plan, meta = (read_json(folder / f"{name}.json") for name in ("plan", "meta"))
    own = [layer for layer, gain in meta["segment_gains"].items() if gain >= 0.03]
    shared = [layer for layer in plan["layers"] if layer not in own]
    assert own and shared and len(meta["segment_gains"]) == len(plan["layers"])
    assert (
        f"{len(own)} of {len(plan['layers'])} Linears have codes for each segment, {len(shared)} share one set" in told
    )
    saved = re.search(r"share one set: (\S+) MB saved", told)
    assert saved and 0 < float(saved[1]) < size_bytes(folder) / 1e6
    words = " / ".join(recipe_words(plan))
    assert f"smooth, for each of 2 ranges of noise levels: {len(own)} layers" in words
    assert f"smooth: {len(shared)} layers" in words
    layers = quant_linears(load_quantized(folder).transformer)
    assert {name for name, layer in layers.items() if len(layer.variants) == 2} == {*own}

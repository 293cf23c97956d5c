"""docs/own_module.md: what it shows, run as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import ROOT


def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantized module is near the float one, and what is loaded gives what was saved."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_module.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(shown[0], names)
    x, timestep = names["batches"][0]
    with torch.no_grad():
        wanted = names["model"](x, timestep=timestep)
        exec(shown[1], names)
        quantized = names["model"](x, timestep=timestep)
        exec(shown[2], names)
        loaded = names["loaded"](x, timestep=timestep)
    error = (quantized - wanted).norm() / (wanted - x).norm()
    assert len(shown) == 3 and 0.01 < error < 0.2
    torch.testing.assert_close(loaded, quantized, rtol=1e-3, atol=1e-3)


def test_its_variations_run() -> None:
    """What the list below the lines says of rules, segments, GPTQ and another clock."""
    from viditq.quant import Calibrator, QuantSpec, Recipe, Rule, SmoothSpec, linear_names, quantize_denoiser

    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.blocks(x) * t
            return out

    model, clock = Other(), {"at_noise": 1.0, "at_clean": 0.0, "argument": "t"}
    names = linear_names(model)
    with Calibrator(model, names, moment_layers=names, timestep_scale=clock) as calibrator, torch.no_grad():
        for seed, level in enumerate((0.9, 0.1)):
            calibrator.set_sample_seeds([seed])
            model(torch.randn(1, 80, 64), t=torch.tensor(level))
    plan = Recipe(
        QuantSpec(4, granularity="channel"),
        smoothing=SmoothSpec(alpha=(0.3, 0.2), per_segment=True),
        rounding="gptq",
        segments=(0, 0.5, 1),
        rules=[Rule("*.0", weight=QuantSpec(8)), Rule("blocks.2", keep_float=True)],
    ).resolve(names)
    quantize_denoiser(model, plan, calibrator.stats, timestep_scale=clock)
    assert [type(layer).__name__ for layer in model.blocks] == ["QuantLinear", "QuantLinear", "Linear"]
    assert {plan.schemes[name].weight.bits for name in plan.layers["blocks.0"]} == {8}

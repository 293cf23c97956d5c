"""The folder of a run: which configuration it belongs to."""

from pathlib import Path
from typing import Any

import pytest

from viditq.errors import UserError
from viditq.run_dir import RunDir


def config(module: str, name: str = "SmoothSpec", alpha: float = 0.5) -> dict[str, Any]:
    return {"quant": {"transforms": [{"_target_": f"{module}.{name}", "alpha": alpha}], "weight": {"_target_": module}}}


def test_a_class_that_moved_is_the_same_configuration(tmp_path: Path) -> None:
    RunDir(tmp_path, config("viditq.quant.transforms.smooth")).claim()
    RunDir(tmp_path, config("viditq.quant.methods.transforms.smooth")).claim()


@pytest.mark.parametrize("other", [{"name": "RotateSpec"}, {"alpha": 0.25}])
def test_another_class_or_value_is_not(other: dict[str, Any], tmp_path: Path) -> None:
    RunDir(tmp_path, config("viditq.quant.transforms.smooth")).claim()
    with pytest.raises(UserError, match="made by another configuration"):
        RunDir(tmp_path, config("viditq.quant.methods.transforms.smooth", **other)).claim()

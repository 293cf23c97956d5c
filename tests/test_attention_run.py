"""quant.attention in a whole run: it changes samples, is part of what the run is, and is refused where it cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from viditq.errors import UserError
from viditq.experiment import build
from viditq.files import read_json


def test_a_run_with_attention_in_8_bits(
    run: Callable[..., Any], finished_run: Path, shared_cache: Path, tmp_path: Path, capsys: Any
) -> None:
    how = ("quant.attention=int8_qk_fp8_pv", "quant.attention_granularity=block")
    metrics = run(tmp_path / "run", shared_cache, *how)
    plain = read_json(finished_run / "metrics.json")["metrics"]
    assert metrics["metrics"]["psnr"] != plain["psnr"]
    told = read_json(tmp_path / "run" / "run.json")["quant"]
    assert (told["attention"], told["attention_granularity"]) == ("int8_qk_fp8_pv", "block")
    younger = {"attention", "attention_granularity"}
    assert not younger & read_json(finished_run / "run.json")["quant"].keys(), "younger than folders of runs"
    assert not (tmp_path / "run" / "speed.json").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quant.attention=sage"], "quant.attention='sage': choose null or one of int8_qk, int8_qk_fp8_pv"),
        (["quant.attention_granularity=warp"], "quant.attention_granularity=warp goes with an attention that is"),
        (["quant.attention=int8_qk", "model.attention=native"], "model.attention=native with quant.attention=int8_qk"),
        (["quant.attention=int8_qk", "model.compile=true"], "model.compile=True with quant.attention=int8_qk"),
    ],
)
def test_what_cannot_be_emulated_is_refused(
    overrides: list[str], words: str, configure: Callable[..., Any], shrunk: list[str]
) -> None:
    with pytest.raises(Exception, match=r"quant\.attention") as error:
        build(configure(*shrunk, *overrides))
    told = error.value if isinstance(error.value, UserError) else error.value.__cause__
    assert isinstance(told, UserError) and words in str(told)

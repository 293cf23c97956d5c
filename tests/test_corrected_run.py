"""quant.correction=ptqd through a whole run: its samples and its artifact are the corrected ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from viditq.errors import UserError
from viditq.experiment import build
from viditq.files import read_json
from viditq.loading import load_quantized


def test_a_run_with_correction(run: Callable[..., Any], shared_cache: Path, tmp_path: Path) -> None:
    overrides = ["quant=w4a4", "quant/smoothing=none", "quant.segments=[0.0,1.0]"]
    plain = run(tmp_path / "plain", shared_cache, *overrides)
    corrected = run(tmp_path / "ptqd", shared_cache, *overrides, "quant.correction=ptqd")
    assert not (tmp_path / "ptqd" / "uncorrected").exists()
    first, second = (read_json(tmp_path / name / "errors.json")["denoiser"] for name in ("plain", "ptqd"))
    pairs = [(a, b) for a, b in zip(first["relative_error"], second["relative_error"], strict=True) if a is not None]
    assert len(pairs) == 2 and all(b < a for a, b in pairs)
    assert plain is not None and corrected is not None and plain != corrected
    transformer = load_quantized(tmp_path / "ptqd").transformer
    assert transformer.output_correction.bias.shape == (20, 4)
    again = run(tmp_path / "ptqd", shared_cache, *overrides, "quant.correction=ptqd")
    assert again == corrected


@pytest.mark.parametrize(("overrides", "word"), [(["quant.correction=x"], "ptqd"), (["quant=none"], "nothing")])
def test_refusals(configure: Callable[..., DictConfig], overrides: list[str], word: str) -> None:
    with pytest.raises(Exception, match=word) as caught:
        build(configure("name=x", "quant.correction=ptqd", *overrides))
    assert isinstance(caught.value.__cause__ or caught.value, UserError)

"""What `load_quantized` returns, in a Python session."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.loading import load_quantized
from viditq.models.generate import noise_generator


def picture(pipeline: Any) -> Tensor:
    images: Tensor = pipeline("a small red circle", generator=[noise_generator(0, 0)], output_type="pt").images
    return images


def through_a_file(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_a_copy_of_the_denoiser_takes_its_place(finished_run: Path, copied: Callable[[Any], Any]) -> None:
    """The run has two segments: what knows no noise level cannot sample."""
    pipeline = load_quantized(finished_run)
    expected = picture(pipeline)
    pipeline.transformer = copied(pipeline.transformer)
    assert torch.equal(picture(pipeline), expected)
    assert torch.equal(picture(copy.deepcopy(pipeline)), expected)


def test_saving_the_pipeline_is_refused_before_anything_is_written(finished_run: Path, tmp_path: Path) -> None:
    pipeline = load_quantized(finished_run)
    for part in (pipeline, pipeline.transformer, copy.deepcopy(pipeline)):
        with pytest.raises(UserError, match=r"save_pretrained writes float models only.* Use "):
            part.save_pretrained(tmp_path / "saved")
    assert not any(tmp_path.iterdir())
    pipeline.vae.save_pretrained(tmp_path / "vae")

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
from viditq.experiment import build
from viditq.job import Job
from viditq.loading import load_quantized, num_bytes
from viditq.models.generate import noise_generator
from viditq.run_dir import RunDir


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


def test_a_budget_changes_no_sample(finished_run: Path) -> None:
    expected = picture(load_quantized(finished_run))
    assert torch.equal(picture(load_quantized(finished_run, memory_budget="4 MB")), expected)
    with pytest.raises(UserError, match=r"memory_budget=10000 is too little for this model"):
        load_quantized(finished_run, memory_budget=10_000)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (7, 7),
        ("800", 800),
        ("1.5GB", 1_500_000_000),
        ("2 GiB", 2**31),
        ("10kb", 10_000),
        (".5 MiB", 2**19),
    ],
)
def test_bytes_are_given_with_or_without_a_unit(given: int | str | None, expected: int | None) -> None:
    assert num_bytes(given) == expected


@pytest.mark.parametrize("given", [0, -5, True, "much", "1 XB", "", "0 GB", "1e9GB"])
def test_what_is_no_number_of_bytes_is_refused(given: int | str) -> None:
    with pytest.raises(UserError, match=r"is no number of bytes: give such as"):
        num_bytes(given)


@pytest.fixture
def job(configure: Callable[..., Any], tmp_path: Path) -> Callable[..., Job]:
    def make(*overrides: str) -> Job:
        experiment = build(configure("model=tiny_image", "name=x", f"cache_dir='{tmp_path / 'cache'}'", *overrides))
        return Job(experiment, RunDir(tmp_path / "run", experiment.tracked))

    return make


def weights(job: Job, dtype: str | None = None) -> Any:
    return job.experiment.adapter.denoiser_of(job.load_float(dtype))


def test_stages_share_the_float_pipeline_until_memory_is_needed(job: Callable[..., Job]) -> None:
    mine = job()
    first = weights(mine)
    assert weights(mine) is first
    assert weights(mine, "bfloat16") is not first and weights(mine).pos_embed.proj.weight.dtype == torch.float32
    second = weights(mine)
    mine.let_go_of_float()
    assert weights(mine) is not second
    compiled = job("model.compile=true")
    assert weights(compiled) is not weights(compiled)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_on_disk_the_denoiser_computes_the_same(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, dtype: str | None
) -> None:
    monkeypatch.setattr("viditq.on_disk.SMALL_BYTES", 1000)
    torch.manual_seed(0)
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([500])}
    inputs["encoder_hidden_states"] = torch.randn(1, 5, weights(job()).config.caption_channels)
    in_memory, on_disk = (
        weights(job(*more), dtype) for more in ([], ["trainer.offload=disk", "trainer.memory_budget=5MB"])
    )
    with torch.no_grad():
        expected, found = (model(**inputs, return_dict=False)[0] for model in (in_memory, on_disk))
    assert torch.equal(found, expected)
    stored = on_disk.transformer_blocks[0].ff.net[2].weight
    assert stored.dtype == torch.float16 and in_memory.transformer_blocks[0].ff.net[2].weight.dtype != torch.float16

"""`fit=`: what is proposed is what the run would be, from least change to most."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from viditq import runner
from viditq.byte_numbers import num_bytes, rounded
from viditq.checks import check_values_alone
from viditq.errors import UserError
from viditq.estimate import estimate
from viditq.estimate.fit import Fit, Row, candidates, propose
from viditq.estimate.fit_table import command, told
from viditq.estimate.from_disk import on_disk
from viditq.estimate.memory import Peak
from viditq.experiment import Experiment, build
from viditq.job import Job
from viditq.models.mapped_weights import map_denoiser
from viditq.models.text_encoders import build_encoder, map_encoder
from viditq.on_disk import leave_on_disk
from viditq.run_dir import RunDir
from viditq.stages.benchmark import weights_side_by_side

Make = Callable[..., Job]


@pytest.fixture
def job(configure: Callable[..., Any], shrunk: list[str], tmp_path: Path) -> Make:
    def make(*overrides: str) -> Job:
        experiment = build(configure(*shrunk, f"cache_dir='{tmp_path / 'cache'}'", *overrides))
        return Job(experiment, RunDir(tmp_path / "run", experiment.tracked))

    return make


@pytest.mark.parametrize("value", [1, 999, 1000, 123_456, 1_234_567_890, 99_999_999_999])
def test_a_rounded_number_reads_as_at_most_or_at_least_that(value: int) -> None:
    down, up = num_bytes(rounded(value)) or 0, num_bytes(rounded(value, up=True)) or 0
    assert down <= value <= up and up - down <= max(value // 100, 1)


# What is proposed -----------------------------------------------------------------------------------------------------


def test_what_is_typed_gives_the_peaks_that_were_told(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every setting, the run that its overrides compose."""
    monkeypatch.setattr("viditq.on_disk.SMALL_BYTES", 1000)
    given = ("batch_size=2", "noise_floor.num_prompts=2")
    fit = propose(job(*given), 10**9)
    base = fit.rows[0].stages["reference"].ram - estimate(job(*given), "meta").peaks["reference"].ram
    keys = [" ".join(word.split("=")[0] for word in row.overrides) for row in fit.rows]
    assert keys[0] == "quant" and keys[-1] == "trainer.offload batch_size trainer.memory_budget"
    assert keys.index("quant/text_encoder") > 0
    for row in fit.rows[1:]:
        found = estimate(job(*given, *row.overrides), "meta")
        expected = {stage: peak.ram + base for stage, peak in found.peaks.items() if stage in row.stages}
        assert {stage: peak.ram for stage, peak in row.stages.items()} == pytest.approx(expected, rel=0.01)
        if row.use_budget is None:
            assert row.use.ram == pytest.approx(found.use.whole.ram + base, rel=0.01)


def test_benchmark_counts_only_where_its_three_denoisers_fit(job: Make) -> None:
    made = job("stages=[reference,quantize,generate,benchmark]")
    adapter = made.experiment.adapter
    limit = weights_side_by_side(sum(p.numel() for p in adapter.build_denoiser().parameters()), adapter)
    assert "benchmark" in propose(made, limit).rows[0].stages
    assert [*propose(made, limit - 1).rows[0].stages] == ["reference", "quantize", "generate"]


# Slow: other widths to start from, of which there are one or two narrower ones as here.
WIDTHS = (
    ["quant=w6a6"],
    ["experiment=q_dit"],
    ["quant=w4"],
    ["experiment=w4a8_ts_smooth"],
    ["quant=none"],
    ["quant=w8a8"],
)


@pytest.mark.parametrize("given", [pytest.param(g, marks=[pytest.mark.slow] * (i > 1)) for i, g in enumerate(WIDTHS)])
def test_other_widths_are_those_of_the_configuration(
    configure: Callable[..., Any], given: list[str], tmp_path: Path
) -> None:
    cfg = ["model=tiny_image", f"cache_dir='{tmp_path}'", "logger=none", "name=x", *given]
    found = [*candidates(build(configure(*cfg)), gpu=False)]
    widths = [c for c in found if c.overrides and c.overrides[-1].startswith(("bits=", "quant=w", "quant.weight"))]
    assert len(widths) == (2 if given in (["quant=none"], ["quant=w6a6"]) else 1)
    for candidate in widths:
        kept = [word for word in cfg if word.split("=")[0] != candidate.overrides[0].split("=")[0]]
        composed = build(configure(*kept, *candidate.overrides))
        assert composed.plan == candidate.experiment.plan, candidate.overrides
        assert composed.encoder_plans == candidate.experiment.encoder_plans


def test_where_the_plan_is_given_only_text_encoders_and_places_are_left(job: Make) -> None:
    e = job().experiment
    searched: Any = replace(e, quant=build_setting(e))
    assert [c.overrides for c in candidates(searched, gpu=False)] == [
        ("quant=none",),
        (),
        ("quant/text_encoder=w8",),
        ("quant/text_encoder=w4",),
        ("trainer.offload=disk",),
    ]
    on_gpu = [c.experiment.offload for c in candidates(replace(searched, batch_size=4), gpu=True)]
    assert on_gpu == [None, None, None, None, "model", "sequential", "sequential"]


def build_setting(e: Experiment) -> Any:
    """The setting with a policy that is no recipe."""
    setting = object.__new__(type(e.quant))
    setting.__dict__ |= {**vars(e.quant), "policy": object()}
    return setting


# What fits ------------------------------------------------------------------------------------------------------------

GB = 10**9


def row(label: str, run: int, use: int, *overrides: str, budget: str | None = None) -> Row:
    return Row(label, overrides, {"generate": Peak(run // 2), "reference": Peak(run)}, Peak(use), budget)


ROWS = [
    row("nothing", 40 * GB, 30 * GB, "quant=none"),
    row("four bits", 39 * GB, 14 * GB, "bits=w4a8"),
    row("on disk", 9 * GB, 8 * GB, "bits=w4a8", "trainer.offload=disk", "trainer.memory_budget=5GB", budget="6GB"),
]


def fitting(limit: int) -> str:
    words = ["experiment=a b", "fit=16GB", "bits=w8a8", "trainer.offload=null", "+model.x=1"]
    return "\n".join(told(Fit("x", "m", 2, limit, False, ROWS), words))


def test_the_first_that_fits_is_told_with_what_to_type() -> None:
    text = fitting(16 * GB)
    assert "The run fits with 3, on disk (at most 9 GB, in stage reference):" in text
    typed = "python run.py 'experiment=a b' +model.x=1 bits=w4a8 trainer.offload=disk trainer.memory_budget=5GB"
    assert f"    {typed}\n" in text
    assert 'with 2, four bits (14 GB); in Python:\n    pipeline = viditq.load_quantized("<folder of the run>")' in text
    assert 'load_quantized("<folder of the run>", memory_budget="6GB")' in fitting(9 * GB)
    assert "nothing need be quantized to use it" in fitting(50 * GB)
    assert command(ROWS[0], ["fit=1", "quant=w4a8"]) == "python run.py quant=none"


def test_where_nothing_fits_it_is_told_by_how_much() -> None:
    text = fitting(2 * GB)
    assert "No run fits 2 GB: 3, on disk, takes least, 9 GB in stage reference, which is 7 GB too much." in text
    assert "No result fits 2 GB: 3, on disk, takes least, 8 GB, which is 6 GB too much." in text


def test_fit_prints_and_writes_nothing(
    configure: Callable[..., Any], shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = configure(*shrunk, f"cache_dir='{tmp_path / 'cache'}'", "fit=64GB")
    assert runner.run(cfg, tmp_path / "run") is None
    text = capsys.readouterr().out
    assert "What fits 64 GB of memory" in text and "load_quantized" in text and "python run.py quant=none" in text
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("value", ["abc", "0", "-5", "'16 parsecs'", "true", "[1]", "''"])
def test_what_is_no_memory_is_refused(value: str, configure: Callable[..., Any], shrunk: list[str]) -> None:
    with pytest.raises(UserError, match=r"fit=.* is no number of bytes"):
        check_values_alone(configure(*shrunk, f"fit={value}"))


def test_fit_and_estimate_exclude_each_other(configure: Callable[..., Any], shrunk: list[str]) -> None:
    with pytest.raises(UserError, match="Leave one of them out"):
        check_values_alone(configure(*shrunk, "fit=1GB", "estimate=meta"))


# Weights on disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bytes_on_disk_are_those_of_a_model_that_lies_there(
    dtype: str, job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viditq.on_disk.SMALL_BYTES", 1000)
    adapter = job(f"model.dtype={dtype}").experiment.adapter
    skeletons: list[nn.Module] = [
        adapter.build_denoiser().to(adapter.torch_dtype),
        build_encoder(adapter, "text_encoder"),
    ]
    for skeleton, (model, runs) in zip(
        skeletons, (map_denoiser(adapter), map_encoder(adapter, "text_encoder")), strict=True
    ):
        stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        always, largest = leave_on_disk(model, runs)
        found = on_disk(skeleton, stored)
        buffers = sum(buffer.nbytes for buffer in skeleton.buffers())
        assert found.always == always + buffers
        assert largest <= found.passing <= 3 * largest


def test_the_peak_of_a_run_on_disk_is_far_below_that_of_whole_models(
    job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viditq.on_disk.SMALL_BYTES", 1000)
    whole, mapped, more = (
        estimate(job(*given), "meta")
        for given in (
            [],
            ["trainer.offload=disk", "trainer.memory_budget=1MB"],
            ["trainer.offload=disk", "trainer.memory_budget=4MB"],
        )
    )
    assert "benchmark" not in mapped.peaks
    grown = {stage for stage, peak in more.peaks.items() if peak.ram > mapped.peaks[stage].ram}
    assert grown == {"generate", "diagnose"}
    assert whole.use.least_budget == mapped.use.least_budget < mapped.use.most_budget
    assert mapped.use.from_disk.ram <= more.use.from_disk.ram


def test_true_is_refused_where_the_model_does_not_fit(job: Make) -> None:
    with pytest.raises(UserError, match="estimate=true loads whole models"):
        estimate(job("trainer.offload=disk"), True)


def test_the_noise_floor_of_a_narrow_model_counts_it_in_float32(job: Make) -> None:
    found = estimate(job("model.dtype=bfloat16", "noise_floor.num_prompts=2"), "meta")
    more = found.peaks["noise_floor"].ram - found.peaks["reference"].ram
    assert more >= found.parts["transformer"][0] * torch.bfloat16.itemsize

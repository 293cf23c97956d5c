"""Estimates against what a run does: bytes of its files, forwards of its denoisers, batches of its stages."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests.forked import Forked
from viditq import runner
from viditq.errors import UserError
from viditq.estimate import Estimate, estimate
from viditq.estimate.table import duration, show, size
from viditq.experiment import build
from viditq.job import Job
from viditq.quant.artifact import size_bytes
from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends import FakeBackend
from viditq.run_dir import RunDir
from viditq.stages import FUNCTIONS

VIDEO = (
    "model=tiny_video",
    "metric=psnr",
    "data.num_prompts=3",
    "batch_size=2",
    "noise_floor.num_prompts=2",
    "quant/smoothing=static",
    "quant.segments=[0,1]",
    "benchmark.max_seconds=null",  # measured on a busy machine too
)


def told(configure: Callable[..., Any], shrunk: list[str], folder: Path, mode: Any, *overrides: str) -> Estimate:
    experiment = build(configure(*shrunk, f"cache_dir='{folder / 'cache'}'", *overrides))
    return estimate(Job(experiment, RunDir(folder / "run", experiment.tracked)), mode)


@pytest.fixture(scope="module")
def counted_run(
    run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Counter[str], dict[str, int]]:
    """A run of tiny_video whose captions differ in length: its folder, forwards by stage, bytes of its caches."""
    from diffusers import LatteTransformer3DModel

    folder = tmp_path_factory.mktemp("counted")
    forwards: Counter[str] = Counter()
    stage, forward = [""], LatteTransformer3DModel.forward

    @functools.wraps(forward)
    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forwards[stage[0]] += 1
        return forward(self, *args, **kwargs)

    def named(name: str, function: Callable[[Job], str]) -> Callable[[Job], str]:
        def work(job: Job) -> str:
            stage[0] = name
            return function(job)

        return work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatteTransformer3DModel, "forward", counting)
        for name, function in FUNCTIONS.items():
            patch.setitem(FUNCTIONS, name, named(name, function))
        run(folder / "run", folder / "cache", *VIDEO)
    on_disk = {
        kind: sum(f.stat().st_size for f in (folder / "cache" / kind).rglob("*.safetensors"))
        for kind in ("stats", "prompts", "reference")
    }
    return folder, forwards, on_disk


@pytest.mark.parametrize("mode", ["meta", pytest.param(True, marks=pytest.mark.slow)])  # slow: from the loaded model
def test_forwards_and_files_are_those_of_the_run(
    mode: Any, counted_run: Any, configure: Callable[..., Any], shrunk: list[str], tmp_path: Path
) -> None:
    folder, forwards, on_disk = counted_run
    e = told(configure, shrunk, tmp_path, mode, *VIDEO)
    assert {stage: work.forwards for stage, work in e.works.items() if work.forwards} == forwards
    assert e.disk["artifact"] == pytest.approx(size_bytes(folder / "run" / "quantized"), rel=0.01)
    assert e.stats == e.disk["statistics"] == pytest.approx(on_disk["stats"], rel=1e-5)
    assert e.disk["embeddings of prompts"] == pytest.approx(on_disk["prompts"], rel=0.3)  # lengths differ
    samples = on_disk["reference"] + sum(f.stat().st_size for f in (folder / "run" / "samples").glob("*.safetensors"))
    assert e.disk["samples"] == pytest.approx(samples, rel=0.01)
    assert (e.works["reference"].seconds is not None) == (mode is True)
    assert not list(tmp_path.rglob("*"))


def test_what_is_there_already_is_not_counted(
    counted_run: Any, configure: Callable[..., Any], shrunk: list[str], tmp_path: Path
) -> None:
    e = told(configure, shrunk, counted_run[0], "meta", *VIDEO)
    assert sum(work.forwards for work in e.works.values()) == 0
    assert e.works["reference"].note == e.works["prompts"].note == "nothing left to do"


def counted_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[number of forwards of the denoiser from now on]"""
    from diffusers import PixArtTransformer2DModel

    count, forward = [0], PixArtTransformer2DModel.forward

    @functools.wraps(forward)
    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PixArtTransformer2DModel, "forward", counting)
    return count


def test_the_fit_of_a_correction_is_counted(
    run: Callable[..., Any],
    configure: Callable[..., Any],
    shrunk: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = ("quant/smoothing=none", "quant.segments=[0,1]", "quant.correction=ptqd", "stages=[prompts,quantize]")
    e = told(configure, shrunk, tmp_path, True, *overrides)
    plain = told(configure, shrunk, tmp_path, True, *overrides[:2], overrides[3])
    count = counted_forwards(monkeypatch)
    run(tmp_path / "run", tmp_path / "cache", *overrides)
    assert (e.works["quantize"].samples, e.works["quantize"].forwards) == (2, count[0])
    assert e.works["quantize"].seconds > plain.works["quantize"].seconds
    assert e.peaks["quantize"].ram == max(plain.peaks["quantize"].ram, e.peaks["diagnose"].ram)
    assert told(configure, shrunk, tmp_path, "meta", *overrides).works["quantize"].note == "nothing left to do"


def test_a_search_is_counted(
    run: Callable[..., Any],
    configure: Callable[..., Any],
    shrunk: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every candidate generated, none left out: forwards are those of the run but for the proxies' few."""
    overrides = ["quant/policy=sensitivity", "quant.policy.measure=all", "quant.policy.weight_choices=[4,8]"]
    overrides += ["quant.policy.num_prompts=1", "quant/smoothing=none", "stages=[prompts,calibrate,search]"]
    overrides += ["quant.policy.metrics.cross_attention=${quant.policy.metrics.default}"]
    e = told(configure, shrunk, tmp_path, True, *overrides)
    count = counted_forwards(monkeypatch)
    run(tmp_path / "run", tmp_path / "cache", *overrides)
    search = e.works["search"]
    assert search.forwards == pytest.approx(count[0] - e.works["calibrate"].forwards, rel=0.25)
    assert search.seconds > 0 and "candidates" in search.note
    assert told(configure, shrunk, tmp_path, "meta", *overrides).works["search"].note == "nothing left to do"


@pytest.mark.parametrize("model", ["tiny_image", pytest.param("tiny_video", marks=pytest.mark.slow)])  # slow: clips
def test_activations_on_meta_are_those_of_the_real_model(
    model: str, configure: Callable[..., Any], shrunk: list[str], tmp_path: Path
) -> None:
    real, meta = (told(configure, shrunk, tmp_path, mode, f"model={model}") for mode in (True, "meta"))
    assert real.probe.forward_bytes == meta.probe.forward_bytes
    assert real.probe.decode_bytes == pytest.approx(meta.probe.decode_bytes, rel=0.15)
    assert real.weights == meta.weights
    assert real.artifact == meta.artifact
    assert {stage: peak.ram for stage, peak in real.peaks.items()} == pytest.approx(
        {stage: peak.ram for stage, peak in meta.peaks.items()}, rel=0.05
    )


def test_peaks_grow_with_what_they_hold(configure: Callable[..., Any], shrunk: list[str], tmp_path: Path) -> None:
    few, many = (told(configure, shrunk, tmp_path, "meta", f"calibration.num_buckets={n}") for n in (5, 40))
    assert many.stats == pytest.approx(8 * few.stats, rel=0.05)
    assert many.peaks["calibrate"].ram > few.peaks["calibrate"].ram
    assert many.peaks["reference"].ram == few.peaks["reference"].ram


def test_every_backend_is_told(
    counted_run: Any, configure: Callable[..., Any], shrunk: list[str], tmp_path: Path
) -> None:
    """In bytes those that the run's own benchmark found; timed where the model is loaded."""
    measured = json.loads((counted_run[0] / "run" / "speed.json").read_text())["candidates"]
    for mode in (True, "meta"):
        held = told(configure, shrunk, tmp_path, mode, *VIDEO).held
        assert {*held} == {"float", *BACKENDS.names()}
        assert held["float"].nbytes == pytest.approx(measured["float"]["weights_bytes"], rel=0.01)
        assert held["auto"].nbytes == pytest.approx(measured["quantized"]["weights_bytes"], rel=0.03)
        assert held["fake"].nbytes > held["float"].nbytes
        assert all((held[name].seconds is not None) == (mode is True) for name in ("fake", "auto"))


def test_a_backend_that_cannot_honour_a_scheme_is_told_with_the_layer_and_field(
    configure: Callable[..., Any], shrunk: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bytes(FakeBackend):
        name = "bytes"

        def unsupported_field(self, scheme: LayerScheme) -> str | None:
            return "weight.bits" if scheme.weight and scheme.weight.bits != 8 else None

    monkeypatch.setitem(BACKENDS._entries, "bytes", Bytes)
    held = told(configure, shrunk, tmp_path, "meta").held["bytes"]
    assert held.why.startswith("backend bytes cannot run transformer_blocks.") and "weight.bits=4" in held.why
    console = Console(width=200, record=True)
    show(console, "smoke", "tiny_image", told(configure, shrunk, tmp_path, "meta"))
    text = console.export_text()
    assert "Denoiser in memory, by backend" in text and "does not support weight.bits=4" in text


def test_a_benchmark_that_would_be_left_out_is_not_counted(
    configure: Callable[..., Any], shrunk: list[str], tmp_path: Path
) -> None:
    whole, none = (told(configure, shrunk, tmp_path, True, f"benchmark.max_seconds={n}") for n in ("null", "0"))
    assert whole.works["benchmark"].forwards == 3 * (2 + 10) and whole.works["benchmark"].seconds
    assert none.works["benchmark"].forwards == 0 and "left out" in none.works["benchmark"].note


def test_unquantized_and_unknown_stages(configure: Callable[..., Any], shrunk: list[str], tmp_path: Path) -> None:
    e = told(configure, shrunk, tmp_path, True, "experiment=fp16", "model=tiny_image", "batch_size=2")
    assert e.weights.codes == e.weights.dense == 0
    assert e.works["evaluate"].note == "not estimated"


def test_the_tables_say_it_all(configure: Callable[..., Any], shrunk: list[str], tmp_path: Path) -> None:
    console = Console(width=100, record=True)
    e = told(configure, shrunk, tmp_path, "meta")
    show(console, "smoke", "tiny_image", e)
    text = console.export_text()
    for words in ("2,745,040", "codes, packed", "calibrate", "statistics", "no durations", "Not counted"):
        assert words in text
    assert size(e.artifact) in text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (2_440_000_000, "2.44 GB"), (999_700, "1000 kB"), (None, "-")]
)
def test_sizes_in_words(value: float | None, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5 s"), (38, "38 s"), (600, "10 min"), (18_800, "5.2 h")])
def test_durations_in_words(value: float, text: str) -> None:
    assert duration(value) == text


def test_an_unknown_mode_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"estimate='often' is unknown: true .* meta"):
        run(tmp_path / "run", tmp_path / "cache", "estimate=often")


def test_the_command_leaves_nothing_behind(tmp_path: Path, shrunk: list[str]) -> None:
    here = tmp_path / "here"
    here.mkdir()
    command = Forked(tmp_path, "said", *shrunk, "estimate=meta", here=here)
    code, out, _ = command.ended()
    assert code == 0, command.report()
    assert "Estimate of smoke on tiny_image" in out
    assert not list(here.iterdir())


def test_a_model_whose_shapes_depend_on_values_is_told_of(
    configure: Callable[..., Any], shrunk: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import PixArtTransformer2DModel

    forward = PixArtTransformer2DModel.forward

    def packing(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if bool((hidden_states > 1e9).any()):
            raise AssertionError
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(PixArtTransformer2DModel, "forward", functools.wraps(forward)(packing))
    with pytest.raises(UserError, match=r"depend on values .* Use estimate=true"):
        told(configure, shrunk, tmp_path, "meta")


def test_a_run_does_not_know_of_the_key(configure: Callable[..., Any], shrunk: list[str]) -> None:
    assert "estimate" not in build(configure(*shrunk)).tracked
    assert runner.tell.__doc__
    assert torch.is_grad_enabled()


def test_a_plan_that_has_yet_to_be_searched(configure: Callable[..., Any], shrunk: list[str], tmp_path: Path) -> None:
    e = told(configure, shrunk, tmp_path, "meta", "quant/policy=sensitivity", "quant/smoothing=none")
    assert e.works["search"].note == "at most, 24 candidates"
    assert e.works["calibrate"].forwards and e.stats
    assert any("search" in remark for remark in e.remarks)


def test_inputs_of_blocks_are_counted(configure: Callable[..., Any], shrunk: list[str], tmp_path: Path) -> None:
    plain, learned = (
        told(configure, shrunk, tmp_path, "meta", "quant/smoothing=none", f"quant/rounding={rounding}")
        for rounding in ("nearest", "block_adaround")
    )
    assert learned.disk["inputs of blocks, at most"] == 2**30 and learned.stats
    assert learned.peaks["quantize"].ram > plain.peaks["quantize"].ram


def test_passes_by_the_budget_of_second_moments_are_counted(
    configure: Callable[..., Any], shrunk: list[str], tmp_path: Path
) -> None:
    rounded = ["quant/smoothing=none", "quant/rounding=gptq", "model=tiny_video"]
    one, nearest, many = (
        told(configure, shrunk, tmp_path, "meta", *overrides)
        for overrides in (rounded, rounded[:1] + rounded[2:], [*rounded, "calibration.moment_bytes=4_000_000"])
    )
    passes = many.works["calibrate"].forwards // one.works["calibrate"].forwards
    assert many.works["calibrate"].note == f"in {passes} passes, by calibration.moment_bytes"
    assert passes >= 3 and many.works["calibrate"].samples == passes * one.works["calibrate"].samples
    assert one.stats == many.stats and one.stats > many.stats - 10 * 4_000_000 / 2
    assert nearest.peaks["calibrate"].ram < many.peaks["calibrate"].ram < one.peaks["calibrate"].ram

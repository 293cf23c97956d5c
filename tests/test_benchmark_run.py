"""Stage `benchmark` in a run: what speed.json holds, when it is left out, and who is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from viditq.engine.capture import first_call
from viditq.errors import UserError
from viditq.experiment import build
from viditq.job import Job
from viditq.loading import load_artifact
from viditq.quant.execution.linear import backend_counts
from viditq.run_dir import RunDir
from viditq.seconds import read_seconds
from viditq.stages import benchmark

Run = Callable[..., dict[str, Any] | None]


@pytest.fixture
def job(configure: Callable[..., Any], shrunk: list[str], shared_cache: Path) -> Callable[..., Job]:
    """(folder, *overrides) -> the job of the shrunk run in it."""

    def make(folder: Path, *overrides: str) -> Job:
        experiment = build(configure(*shrunk, f"cache_dir='{shared_cache}'", *overrides))
        return Job(experiment, RunDir(folder, experiment.tracked))

    return make


def test_speed_json(finished_run: Path) -> None:
    speed = json.loads((finished_run / "speed.json").read_text())
    assert speed["backend"]["requested"] == "auto" and sum(speed["backend"]["layers"].values()) == 40
    assert speed["batch_size"] == 1 and 5 <= speed["rounds"] <= 10
    machine = speed["machine"]
    assert machine["threads"] == torch.get_num_threads() and machine["torch"] == torch.__version__
    assert machine["gpu"] is None and machine["cores"] >= 1 and machine["cpu"]
    candidates = speed["candidates"]
    assert {name: c["dtype"] for name, c in candidates.items()} == {
        "float": "float32",
        "bfloat16": "bfloat16",
        "quantized": "float32",
    }
    for c in candidates.values():
        assert 0 < c["seconds"]["low"] <= c["seconds"]["median"] <= c["seconds"]["high"]
        assert c["step_bytes"] is None or c["step_bytes"] >= 0
        assert c["compiled"] is False
    weights = {name: c["weights_bytes"] for name, c in candidates.items()}
    assert weights["bfloat16"] == pytest.approx(weights["float"] / 2, rel=0.02)


@pytest.fixture(scope="module")
def emulated_run(run: Run, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of backend=fake."""
    folder = tmp_path_factory.mktemp("emulated") / "run"
    run(folder, shared_cache, "backend=fake", "benchmark.max_seconds=null")
    return folder


def test_the_report_and_the_console_tell_that_it_was_emulated(
    run: Run, emulated_run: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(emulated_run, shared_cache, "backend=fake")
    words = "Emulated: the quantized Linears ran in floating point"
    assert words in capsys.readouterr().out
    page = (emulated_run / "report.html").read_text()
    assert words in page and 'id="step"' in page and "quantized (fake)" in page
    speed = json.loads((emulated_run / "speed.json").read_text())
    assert speed["backend"] == {"requested": "fake", "layers": {"fake": 40}}
    weights = {name: one["weights_bytes"] for name, one in speed["candidates"].items()}
    assert weights["quantized"] > weights["float"]  # the dense weights of an emulation, and the codes


def test_it_is_measured_again_where_it_is_gone_and_the_page_follows(
    run: Run, run_copy: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_copy / "speed.json").unlink()
    run(run_copy, shared_cache, "benchmark.rounds=5", "benchmark.max_seconds=null")
    assert json.loads((run_copy / "speed.json").read_text())["rounds"] == 5
    assert "5 rounds in random order" in (run_copy / "report.html").read_text()
    out = capsys.readouterr().out
    assert "benchmark: a step of 1 prompts: float" in out and "report: picture and page" in out


def test_slow_steps_leave_it_out(
    run: Run, run_copy: Path, shared_cache: Path, job: Callable[..., Job], capsys: pytest.CaptureFixture[str]
) -> None:
    """As the recorded stages say: 2 prompts of 2 steps each; the floor's bfloat16 pass has its own record."""
    (run_copy / "speed.json").unlink()
    work = job(run_copy)
    known = {entry.path: read_seconds(entry.path) for entry in (work.reference, *work.floors.values())}
    seconds = read_seconds(run_copy)
    steps = [known[e.path]["reference"] / 4 for e in (work.reference, work.floors["bfloat16"])]
    expected = 7 * (sum(steps) + seconds["generate"] / 4)
    assert benchmark.expected_seconds(work) == pytest.approx(expected)
    limit = expected * 0.9
    run(run_copy, shared_cache, f"benchmark.max_seconds={limit}")
    assert not (run_copy / "speed.json").exists()
    out = capsys.readouterr().out
    assert f"left out: it would take about {expected:.0f} s" in out and "benchmark.max_seconds=null" in out
    assert benchmark.why_not(job(run_copy, "benchmark.max_seconds=null")) is None


def test_without_records_of_a_dtype_the_slowest_stands_for_it(
    run_copy: Path, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "read_seconds", lambda folder: {"generate": 8.0} if folder == run_copy else {})
    assert benchmark.expected_seconds(job(run_copy)) == pytest.approx(7 * 3 * 8.0 / 4)
    monkeypatch.setattr(benchmark, "read_seconds", lambda _: {})
    assert benchmark.expected_seconds(job(run_copy)) is None


def test_too_little_memory_leaves_it_out(
    run_copy: Path, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "free_bytes", lambda _: 10_000_000)
    assert "and 0.0 are free" in (benchmark.why_not(job(run_copy, "benchmark.max_seconds=null")) or "")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("benchmark.rounds=4", "benchmark.rounds=4 must be a whole number of at least 5"),
        ("benchmark.max_seconds=-1", "benchmark.max_seconds=-1.0 must be null or a number of at least 0"),
        ("+benchmark.seconds=3", "Unknown key benchmark.seconds"),
    ],
)
def test_bad_settings_are_refused(override: str, words: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        run(tmp_path / "run", tmp_path / "cache", override)
    assert not (tmp_path / "run").exists()


def test_the_call_is_that_of_the_sampling_loop(
    finished_run: Path, shared_cache: Path, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arguments give what the loop's own first call gives; the model is left as it was."""
    work = job(finished_run)
    adapter, embeds = work.experiment.adapter, work.load_embeds(work.experiment.data.prompts)
    pipeline = adapter.load()
    call = first_call(adapter, pipeline, [embeds(0), embeds(1)], [0, 1], seed=0)
    assert (call.part, call.num_prompts) == ("transformer", 2)
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0])

    denoiser = adapter.denoiser_of(pipeline)
    assert not denoiser._forward_pre_hooks
    denoiser.register_forward_hook(keep)
    from viditq.models.generate import denoise

    denoise(adapter, pipeline, [embeds(0), embeds(1)], [0, 1], seed=0)
    assert len(outputs) == 2
    assert torch.equal(call.on(denoiser)[0], outputs[0])


def test_backends_are_counted(finished_run: Path) -> None:
    pipeline = load_artifact(finished_run / "quantized", "fake", complete=False)
    assert backend_counts(pipeline.transformer) == {"fake": 40}
    assert backend_counts(nn.Sequential(nn.Linear(2, 2))) == {}


def test_samples_of_an_earlier_version_have_no_count(run: Run, emulated_run: Path, shared_cache: Path) -> None:
    """The backend was recorded in run.json alone; the report says emulated all the same."""
    for name in ("executed.json", "metrics.json", "report.html", "speed.json"):
        (emulated_run / name).unlink()
    metrics = run(emulated_run, shared_cache, "stages=[evaluate,report]", "backend=fake") or {}
    assert metrics["backend"] == {"requested": "fake", "layers": None}
    page = (emulated_run / "report.html").read_text()
    assert "Emulated: the quantized Linears" in page and 'id="step"' not in page

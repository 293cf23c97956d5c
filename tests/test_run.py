"""A whole run: what it leaves, that repeating it does only what is missing, and that its artifact stands alone."""

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from PIL import Image
from safetensors.torch import load_file

from viditq.cli import guarded_run
from viditq.engine import sampling
from viditq.errors import UserError
from viditq.job import Job
from viditq.models.adapter import ModelAdapter
from viditq.stages import calibrate, samples

ROOT = Path(__file__).parents[1]
MODULES = ("prompts", "samples", "calibrate", "quantize", "diagnose", "benchmark", "evaluate", "report")
STABLE_KEYS = {
    "metrics": dict,
    "model": str,
    "experiment": str,
    "average_weight_bits": float,
    "average_activation_bits": float,
    "size_bytes": int,
    "float_size_bytes": int,
    "seconds": dict,
    "prompts": int,
    "fingerprint": str,
}
STAGES = [sys.modules[f"viditq.stages.{name}"] for name in MODULES]
SLOW = ("run_batches", "ArtifactWriter", "measure", "encode_prompt", "write_page")
Run = Callable[..., dict[str, Any] | None]


class Killed(Exception):
    """Stands for whatever ends a run early."""


def strict_json(file: Path) -> Any:
    """The file's values; NaN and infinity, which JSON does not know, fail."""
    return json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{file} holds {word}"))


def without_seconds(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key != "seconds"}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> time of the last change and bytes; but for the log, which grows whenever the command is given."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "viditq.log")
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def refuse_work(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make every slow function that a stage calls fail, or those named."""
    for name in names or SLOW:
        for stage in (s for s in STAGES if hasattr(s, name)):
            monkeypatch.setattr(stage, name, lambda *_, **__: pytest.fail("work was done twice"))
    for name in () if names else ("load", "load_text_part", "load_complete"):
        monkeypatch.setattr(ModelAdapter, name, lambda *_, **__: pytest.fail("a model was loaded"))
    for name in () if names else ("load_float", "load_quantized"):
        monkeypatch.setattr(Job, name, lambda *_, **__: pytest.fail("a model was loaded"))


def count_samples(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[Path]:
    """The samples written from now on; the one numbered `fail_at` raises instead."""
    written: list[Path] = []
    save = samples.save_sample

    def spy(path: Path, clip: torch.Tensor) -> None:
        if len(written) == fail_at:
            raise Killed
        written.append(path)
        save(path, clip)

    monkeypatch.setattr(samples, "save_sample", spy)
    return written


# What a run leaves ----------------------------------------------------------------------------------------------------


def test_every_file_is_there(finished_run: Path, shared_cache: Path) -> None:
    files = {".lock", "run.json", "metrics.json", "per_prompt.json", "seconds.json", "seconds_on.json"}
    files |= {
        "comparison.png",
        "errors.json",
        "incoherence.json",
        "incoherence.png",
        "report.html",
        "executed.json",
        "speed.json",
    }
    files |= {"finished.json"}
    files |= {f"quantized/{name}" for name in ("plan.json", "meta.json", "model.safetensors")}
    files |= {f"quantized/{name}" for name in ("README.md", "comparison.png")}
    files |= {"samples/000000.png", "samples/000001.png"}
    files |= {"samples/.000000.png.sha256", "samples/.000001.png.sha256"}
    assert set(contents(finished_run)) == files
    log = (finished_run / "viditq.log").read_text()
    assert log.startswith("== 20") and "[11/11] report: " in log and "PSNR" in log and "\x1b" not in log
    for kind in ("prompts", "stats"):
        for entry in (shared_cache / kind).iterdir():
            assert strict_json(entry / "key.json")["model"]["pipeline"] == "PixArtAlphaPipeline"


def test_metrics_json(finished_run: Path) -> None:
    metrics = strict_json(finished_run / "metrics.json")
    for key, kind in STABLE_KEYS.items():
        assert isinstance(metrics[key], kind), key
    assert set(metrics["metrics"]) == {"psnr", "ssim", "relative_l2", "fid", "fid_data", "clipsim"}
    assert all(math.isfinite(value) for value in metrics["metrics"].values())
    timed = {"prompts", "reference", "noise_floor", "calibrate", "quantize", "generate", "diagnose", "benchmark"}
    assert set(metrics["seconds"]) == {*timed, "evaluate"}
    assert metrics["backend"]["requested"] == "auto" and sum(metrics["backend"]["layers"].values()) == 40
    assert set(metrics["verdict"]) == set(metrics["metrics"])
    assert metrics["noise_floor"] == {"num_prompts": 2, "seed": 1, "dtype": "bfloat16", "latents": 0}
    assert all(value >= 0 for value in metrics["seconds"].values())
    assert (metrics["model"], metrics["experiment"], metrics["prompts"]) == ("tiny_image", "smoke", 2)
    assert 4 < metrics["average_weight_bits"] < 16 and 8 < metrics["average_activation_bits"] < 16
    assert strict_json(finished_run / "per_prompt.json")["prompts"]


def test_size_is_that_of_the_files(finished_run: Path) -> None:
    metrics = strict_json(finished_run / "metrics.json")
    card = ("README.md", "comparison.png")
    files = [file for file in (finished_run / "quantized").iterdir() if file.name not in card]
    assert metrics["size_bytes"] == sum(file.stat().st_size for file in files)
    assert metrics["size_bytes"] < metrics["float_size_bytes"]


def test_one_prompt(run: Run, tmp_path: Path, shared_cache: Path) -> None:
    """Nothing can be told from it, but it runs."""
    metrics = run(tmp_path / "one", shared_cache, "data.num_prompts=1", "metric=[psnr,clipsim]") or {}
    assert metrics["prompts"] == 1 and math.isfinite(metrics["metrics"]["psnr"])
    assert metrics["standard_errors"]["psnr"] is None
    assert all("1 prompt" in entry["reason"] for entry in metrics["verdict"].values())


# Repeating ------------------------------------------------------------------------------------------------------------


def test_second_run_only_prints(
    run: Run,
    finished_run: Path,
    shared_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(finished_run), contents(shared_cache)
    refuse_work(monkeypatch)
    assert run(finished_run, shared_cache, "benchmark.max_seconds=null") == strict_json(finished_run / "metrics.json")
    assert (contents(finished_run), contents(shared_cache)) == before
    out = capsys.readouterr().out
    assert out.count("already") == 11 and "PSNR" in out and str(finished_run / "comparison.png") in out


def test_next_to_no_noise_on_the_latents_is_a_third_floor(run: Run, shared_cache: Path, tmp_path: Path) -> None:
    stages = "stages=[prompts,reference,noise_floor,calibrate,quantize,generate,evaluate]"
    metrics = run(tmp_path / "run", shared_cache, "noise_floor.latents=1e-3", stages, "metric=[psnr,clipsim]")
    assert metrics and metrics["noise_floor"]["latents"] == 1e-3
    psnr, clipsim = metrics["verdict"]["psnr"], metrics["verdict"]["clipsim"]
    assert psnr["floors"]["latents"] > psnr["floors"]["seed"] and psnr["latents_worst"] <= psnr["floors"]["latents"]
    assert clipsim["floors"]["latents"] is None  # of what is judged by itself it says nothing


def test_settings_that_change_no_result_continue_a_run(
    run: Run, run_copy: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_work(monkeypatch)
    run(run_copy, shared_cache, "batch_size=2", "logger=csv", "debug=true", "stages=[prompts,reference,generate]")


def test_deleted_samples_are_made_again(
    run: Run, run_copy: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run_copy)
    (run_copy / "samples" / "000001.png").unlink()
    written = count_samples(monkeypatch)
    refuse_work(monkeypatch, "ArtifactWriter", "encode_prompt")
    metrics = run(run_copy, shared_cache)
    after = contents(run_copy)
    assert [path.name for path in written] == ["000001.png"]
    assert after["samples/000000.png"] == before["samples/000000.png"]
    assert after["samples/000001.png"][1] == before["samples/000001.png"][1]
    assert after["comparison.png"][1] == before["comparison.png"][1]
    assert without_seconds(metrics or {}) == without_seconds(json.loads(before["metrics.json"][1]))


def test_exchanged_and_altered_samples_are_made_again(
    run: Run, run_copy: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another prompt's sample, and a reference of another size."""
    before, cache = contents(run_copy), Path(shutil.copytree(shared_cache, tmp_path / "cache"))
    shutil.copy2(run_copy / "samples" / "000000.png", run_copy / "samples" / "000001.png")
    reference = cache / "reference" / Path(strict_json(run_copy / "per_prompt.json")["reference"]).name
    Image.new("RGB", (8, 8)).save(reference / "000000.png")
    written = count_samples(monkeypatch)
    metrics = run(run_copy, cache)
    assert sorted(path.relative_to(tmp_path) for path in written) == sorted(
        [(reference / "000000.png").relative_to(tmp_path), Path("run/samples/000001.png")]
    )
    assert contents(run_copy)["samples/000001.png"][1] == before["samples/000001.png"][1]
    assert without_seconds(metrics or {}) == without_seconds(json.loads(before["metrics.json"][1]))


def test_samples_without_checksums_are_adopted(
    run: Run, run_copy: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier version has left them: taken, and said so, once."""
    for file in (run_copy / "samples").glob(".*.sha256"):
        file.unlink()
    refuse_work(monkeypatch)
    for said in (1, 0):
        run(run_copy, shared_cache)
        assert capsys.readouterr().out.count("2 samples without checksums are taken as they are") == said


def test_killed_and_repeated_run_equals_an_undisturbed_one(
    run: Run, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "run", tmp_path / "cache"
    with monkeypatch.context() as patch:  # after the first float sample
        count_samples(patch, fail_at=1)
        with pytest.raises(Killed):
            run(folder, cache)
    batches: list[list[int]] = []
    denoise = sampling.denoise

    def spy(adapter: Any, pipeline: Any, embeds: Any, indices: list[int], seed: int) -> None:
        if batches and not (folder / "tried").exists():
            raise Killed
        batches.append(indices)
        denoise(adapter, pipeline, embeds, indices, seed)

    monkeypatch.setattr(sampling, "denoise", spy)
    with pytest.raises(Killed):  # after the first batch of the calibration
        run(folder, cache)
    assert len(batches) == 1 and len(list(cache.rglob("*.png"))) == 6
    (folder / "tried").touch()
    with monkeypatch.context() as patch:  # after the first quantized sample
        count_samples(patch, fail_at=1)
        with pytest.raises(Killed):
            run(folder, cache)
    assert len(batches) == 2 and batches[0] != batches[1]
    metrics = run(folder, cache)
    assert without_seconds(metrics or {}) == without_seconds(strict_json(finished_run / "metrics.json"))
    assert not list(tmp_path.rglob("*.tmp")) and not list(cache.rglob("partial-*"))


# Slow: the same between other files of the two last stages.
@pytest.mark.parametrize(
    "dying",
    ["write_page", *(pytest.param(d, marks=pytest.mark.slow) for d in ("summarize", "comparison_picture", "sizes_of"))],
)
def test_killed_while_writing(
    dying: str, run: Run, finished_run: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage,) = (s for s in STAGES if dying in vars(s))
    real = getattr(stage, dying)

    def fail(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stage, dying, fail)
        with pytest.raises(Killed):
            run(tmp_path / "run", shared_cache)
    metrics = run(tmp_path / "run", shared_cache)
    assert without_seconds(metrics or {}) == without_seconds(strict_json(finished_run / "metrics.json"))


def test_run_killed_before_logging_logs_when_repeated(run: Run, run_copy: Path, shared_cache: Path) -> None:
    (run_copy / "report.html").unlink()
    run(run_copy, shared_cache, "logger=csv", "stages=[evaluate]")
    assert not (run_copy / "csv").exists()
    run(run_copy, shared_cache, "logger=csv")
    logged = (run_copy / "csv" / "metrics.csv").read_text()
    run(run_copy, shared_cache, "logger=csv")
    assert (run_copy / "csv" / "metrics.csv").read_text() == logged, "logged twice"


def test_gate_decides_the_exit_status(
    configure: Callable[..., Any],
    shrunk: list[str],
    run_copy: Path,
    shared_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a finished run too: conditions may change, results may not."""
    overrides = [*shrunk, f"cache_dir='{shared_cache}'"]
    guarded_run(configure(*overrides, 'gate={psnr: ">= 1", size_bytes: "> 0"}'), run_copy)
    with pytest.raises(SystemExit) as status:
        guarded_run(configure(*overrides, 'gate={psnr: ">= 90", clipsim_drop: "<= 9"}'), run_copy)
    assert status.value.code == 3
    err = capsys.readouterr().err
    assert (
        "gate failed" in err and "psnr: wanted >= 90, found" in err and "clipsim" not in err and "Traceback" not in err
    )


# Other configurations -------------------------------------------------------------------------------------------------


def test_changed_configuration_is_refused(run: Run, run_copy: Path, shared_cache: Path) -> None:
    before = contents(run_copy)
    with pytest.raises(UserError) as error:
        run(run_copy, shared_cache, "seed=1", "quant.smoothing.alpha=[0.4,0.2]")
    message = str(error.value)
    assert "seed: 0 there, 1 now" in message
    assert "quant.smoothing.alpha: 0.3 there, [0.4, 0.2] now" in message
    assert "model" not in message.split("differs in")[1] and "hydra.run.dir=FOLDER" in message
    assert contents(run_copy) == before


def test_changed_files_are_refused(
    run: Run, run_copy: Path, model_copy: Path, shared_cache: Path, tmp_path: Path
) -> None:
    """The configuration only names them, so their content counts too."""
    prompts = tmp_path / "prompts.txt"
    overrides = ("data=prompt_file", f"data.path={prompts}", f"model.path={model_copy}", "stages=[prompts]")
    prompts.write_text("a small red circle on a white background\n")
    run(tmp_path / "own", tmp_path / "cache", *overrides)
    prompts.write_text("a small blue circle on a white background\n")
    with pytest.raises(UserError, match=r"inputs\.prompts: "):
        run(tmp_path / "own", tmp_path / "cache", *overrides)
    prompts.write_text("a small red circle on a white background\n")
    (model_copy / "README.md").write_text("another model")
    with pytest.raises(UserError, match=r"inputs\.weights: "):
        run(tmp_path / "own", tmp_path / "cache", *overrides)


def test_experiments_share_reference_and_statistics(
    run: Run, finished_run: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(shared_cache)
    written = count_samples(monkeypatch)
    monkeypatch.setattr(calibrate, "run_batches", lambda *_: pytest.fail("calibrated again"))
    changes = ("quant.weight.bits=8", "quant.smoothing.alpha=0.3", "quant.segments=[0.0,0.7,1.0]")
    metrics = run(tmp_path / "other bits", shared_cache, *changes)
    assert contents(shared_cache) == before
    assert {path.parent.name for path in written} == {"samples"}
    assert metrics and metrics["size_bytes"] > strict_json(finished_run / "metrics.json")["size_bytes"]
    assert metrics["fingerprint"] != strict_json(finished_run / "metrics.json")["fingerprint"]


@pytest.mark.parametrize(
    ("model", "quant", "dtype"),
    [
        ("tiny_image", "none", "float16"),
        # Slow: clips, and the same with integers.
        pytest.param("tiny_video", "none", "bfloat16", marks=pytest.mark.slow),
        pytest.param("tiny_video", "w8a8_naive", "float16", marks=pytest.mark.slow),
    ],
)
def test_half_precision(model: str, quant: str, dtype: str, run: Run, shared_cache: Path, tmp_path: Path) -> None:
    """The denoiser runs in half precision inside a float32 pipeline, close to its float self."""
    changes = (f"model={model}", f"quant={quant}", "quant/smoothing=none", f"quant.float_dtype={dtype}")
    metrics = run(tmp_path / "half", shared_cache, *changes)
    assert metrics and metrics["model"] == model
    if quant == "none":
        assert metrics["metrics"]["psnr"] > 20
        assert metrics["average_weight_bits"] == metrics["average_activation_bits"] == 16
        assert abs(metrics["size_bytes"] / metrics["float_size_bytes"] - 1) < 0.05


# The artifact ---------------------------------------------------------------------------------------------------------

USE_ARTIFACT = """
import json, sys, torch, viditq
from pathlib import Path
from safetensors.torch import save_file
from viditq.job import Job
from viditq.models.adapter import ModelAdapter
from viditq.stages import calibrate, samples
from viditq.models.generate import generate
from viditq.models.text import encode_prompt

folder, prompts, out = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
pipeline = viditq.load_quantized(folder)
adapter = ModelAdapter(**json.loads((folder / "quantized" / "meta.json").read_text())["model"])
embeds = [encode_prompt(adapter, pipeline, prompt) for prompt in prompts]
samples = torch.cat([generate(adapter, pipeline, [e], [i], seed=0) for i, e in enumerate(embeds)])
picture = pipeline("a small red circle on a white background", output_type="pt").images
save_file({"samples": samples, "picture": picture}, out)
"""


def test_artifact_alone_gives_the_same_samples(finished_run: Path, tmp_path: Path) -> None:
    """A process that has seen neither statistics nor cache nor run, only the artifact's folder."""
    shutil.copytree(finished_run / "quantized", tmp_path / "alone" / "quantized")
    prompts = strict_json(finished_run / "per_prompt.json")["prompts"]
    arguments = [str(tmp_path / "alone"), json.dumps(prompts), str(tmp_path / "out.safetensors")]
    process = Forked(tmp_path, "alone", *arguments, here=tmp_path, code=USE_ARTIFACT)
    assert process.ended()[0] == 0, process.report()
    out = load_file(tmp_path / "out.safetensors")
    assert out["picture"].shape == (1, 3, 32, 32) and out["picture"].isfinite().all()
    for index in range(2):
        stored = np.array(Image.open(finished_run / "samples" / f"{index:06d}.png"))
        assert (out["samples"][index, 0].permute(1, 2, 0).numpy() == stored).all()


def test_sigterm_stops_between_batches_and_the_same_command_resumes(
    run: Run, shared_cache: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning notes SIGTERM in `predict` and goes on; what `kill` or a scheduler sends must stop a run."""
    folder, save = tmp_path / "run", samples.save_sample

    def save_and_terminate(path: Path, clip: torch.Tensor) -> None:
        save(path, clip)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "save_sample", save_and_terminate)
        with pytest.raises(SystemExit) as stopped:
            run(folder, shared_cache)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [p.name for p in (folder / "samples").glob("*.png")] == ["000000.png"]
    metrics = run(folder, shared_cache)
    assert without_seconds(metrics or {}) == without_seconds(strict_json(finished_run / "metrics.json"))

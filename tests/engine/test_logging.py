"""What a finished run sends to its logger, read back from the files it left."""

import base64
import csv
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from hydra.utils import instantiate
from PIL import Image
from wandb_records import OfflineRun, away, offline_runs

from viditq.data.samples import sample_path, save_sample, save_sound, sound_path
from viditq.engine import wandb_objects
from viditq.engine.logged_run import logged
from viditq.files import write_json
from viditq.report.pictures import save_gif
from viditq.run_dir import RunDir
from viditq.wav import read_wav

METRICS: dict[str, Any] = {
    "metrics": {"psnr": 31.5, "clipsim": 90.0, "fid": None},
    "standard_errors": {"psnr": 0.5, "clipsim": 0.25, "fid": None},
    "float_metrics": {"clipsim": 91.0, "fid": 12.0},
    "labels": {
        "psnr": {"label": "PSNR", "unit": "dB", "higher_is_better": True},
        "clipsim": {"label": "CLIPSIM", "unit": "", "higher_is_better": True},
        "fid": {"label": "FID", "unit": "", "higher_is_better": False},
    },
    "model": "tiny video",
    "experiment": "w4a8/odd",
    "seed": 0,
    "fingerprint": "abc",
    "seconds": {"generate": 3.0},
    "average_weight_bits": 4.5,
    "average_activation_bits": 8.5,
    "size_bytes": 1000,
    "float_size_bytes": 3000,
}
VERDICT = {
    "psnr": {
        "verdict": "worse",
        "kind": "fidelity",
        "value": 31.5,
        "interval": [30.5, 32.5],
        "float": None,
        "difference": -10.0,
        "difference_interval": [-11.0, -9.0],
        "noise": 0.5,
        "floors": {"seed": 12.0, "bfloat16": 41.5},
        "reason": "10 dB below the floor",
    },
    "clipsim": {
        "verdict": "equal within noise",
        "kind": "quality",
        "value": 90.0,
        "interval": None,
        "float": 91.0,
        "difference": -1.0,
        "difference_interval": None,
        "noise": None,
        "floors": {"seed": None, "bfloat16": None},
        "reason": "within 1",
    },
}
CONFIG = {"name": "w4a8", "quant": {"weight": {"bits": 4}}}
NUM_PROMPTS = 26
ERRORS: dict[str, Any] = {
    "num_prompts": 4,
    "bucket_edges": [0, 0.5, 0.75, 1],
    "denoiser": {"relative_error": [None, 0.2, 0.1]},
    "layers": {
        "blocks.0.fc1": {
            "role": "mlp",
            "weight_bits": [4, 8],
            "activation_bits": [8, 16],
            "relative_error": [None, 0.04, 0.02],
            "total": 0.03,
            "minimum": [None, -3.0, -1.0],
            "maximum": [None, 1.0, 2.0],
            "amax": [None, 3.0, 2.0],
        },
        "blocks.0.fc2": {
            "role": "mlp",
            "weight_bits": [4, 4],
            "activation_bits": [8, 8],
            "relative_error": [None, 0.08, 0.06],
            "total": 0.07,
            "minimum": [None, -1.0, -1.0],
            "maximum": [None, 1.0, 8.0],
            "amax": [None, 1.0, 8.0],
        },
    },
}
REPORT = "<!DOCTYPE html><html><head><title>w4a8</title></head><body>worse</body></html>"


@pytest.fixture(autouse=True)
def away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's logs go to the test's folder; no setting of the machine counts."""
    away(tmp_path / "home", monkeypatch)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run that has measured nothing per prompt."""
    directory = RunDir(tmp_path / "a run", CONFIG)
    directory.claim()
    Image.new("RGB", (8, 8)).save(directory.picture)
    return directory


@pytest.fixture(params=["image", "video"])
def full_run(request: pytest.FixtureRequest, run_dir: RunDir) -> RunDir:
    """A run with all its files: prompt i has a quantized sample in red and a float one in green, of 9 i."""
    reference, num_frames = run_dir.path.parent / "cache" / "reference", 1 if request.param == "image" else 3
    for index in range(NUM_PROMPTS):
        for channel, folder in enumerate((run_dir.samples, reference)):
            clip_FCHW = torch.zeros(num_frames, 3, 32, 32, dtype=torch.uint8)
            clip_FCHW[:, channel] = 9 * index
            for frame in range(1, num_frames):
                clip_FCHW[frame] = 100 * frame
            save_sample(sample_path(folder, index, request.param), clip_FCHW)
            if request.param == "video with sound":
                save_sound(sound_path(folder, index), torch.full((1, 80), channel + index).short(), 8000)
    psnr = [40.0 - index for index in range(NUM_PROMPTS)]
    write_json(
        run_dir.per_prompt,
        {
            "prompts": [f"<b>prompt {index}</b>" for index in range(NUM_PROMPTS)],
            "reference": str(reference),
            "metrics": {"psnr": psnr, "clipsim": psnr, "clipsim_float": psnr},
            "differences": {"clipsim": [0.5] * NUM_PROMPTS},
        },
    )
    write_json(run_dir.path / "errors.json", ERRORS)
    (run_dir.path / "report.html").write_text(REPORT)
    if num_frames > 1:
        save_gif(clip_FCHW, run_dir.picture.with_suffix(".gif"))
    run_dir.artifact.mkdir()
    for name in ("plan.json", "meta.json", "model.safetensors"):
        (run_dir.artifact / name).write_text(name * 10)
    return run_dir


def make_logger(configure: Callable, name: str, run_dir: RunDir) -> Any:
    """The logger that a run would use."""
    make = instantiate(configure(f"logger={name}", "name=x").logger, _partial_=True)
    return make(run_dir.path, "w4a8", "experiment=w4a8 seed=0,1", run_dir.fingerprint)


def send(logger: Any, run_dir: RunDir, metrics: dict[str, Any], tags: Sequence[str] = ()) -> None:
    """As a run does at its end."""
    with logged(logger, CONFIG, tags) as run:
        if run is not None:
            run.send(run_dir, metrics)


def offline(configure: Callable, run_dir: RunDir, metrics: dict[str, Any]) -> OfflineRun:
    """The one offline run after logging."""
    send(make_logger(configure, "wandb", run_dir), run_dir, metrics)
    (run,) = offline_runs(run_dir.path)
    return run


def test_csv(configure: Callable, run_dir: RunDir) -> None:
    send(make_logger(configure, "csv", run_dir), run_dir, METRICS | {"verdict": VERDICT})
    with (run_dir.path / "csv" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["psnr/value"]) == 31.5 and float(row["psnr/standard_error"]) == 0.5
    assert float(row["seconds/generate"]) == 3.0 and float(row["denoiser/size_bytes"]) == 1000
    assert float(row["fid/float"]) == 12.0 and "fid/value" not in row
    assert (float(row["psnr/verdict"]), float(row["clipsim/verdict"])) == (-1, 0)
    assert (float(row["psnr/interval_low"]), float(row["psnr/interval_high"])) == (30.5, 32.5)
    assert float(row["clipsim/difference"]) == -1 and float(row["psnr/noise"]) == 0.5
    assert "clipsim/interval_low" not in row and "clipsim/noise" not in row


def test_the_measured_step_and_the_backends_are_logged(configure: Callable, run_dir: RunDir) -> None:
    took = {"seconds": {"median": 0.03, "low": 0.02, "high": 0.04}, "weights_bytes": 1000, "step_bytes": None}
    write_json(run_dir.speed, {"candidates": {"quantized": took}})
    ran = {"backend": {"requested": "auto", "layers": {"native": 36, "fake": 4}}}
    run = offline(configure, run_dir, METRICS | ran)
    assert (run.summary["speed/quantized/median"], run.summary["speed/quantized/weights_bytes"]) == (0.03, 1000)
    assert "speed/quantized/step_bytes" not in run.summary
    assert (run.summary["backend/native"], run.summary["backend/fake"]) == (36, 4)


def test_none(configure: Callable, run_dir: RunDir) -> None:
    before = set(run_dir.path.iterdir())
    send(make_logger(configure, "none", run_dir), run_dir, METRICS)
    assert set(run_dir.path.iterdir()) == before


def test_wandb_without_files_or_verdict(configure: Callable, run_dir: RunDir) -> None:
    """As after the stage evaluate, without the report's."""
    run_dir.picture.unlink()
    run = offline(configure, run_dir, METRICS)
    assert run.summary["psnr/value"] == 31.5 and run.exit_code == 0
    assert not run.artifacts and not any(key.endswith("._type") for key in run.summary), "no media, no tables"


def test_wandb_run(configure: Callable, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(run_dir.path.parent))
    logger = make_logger(configure, "wandb", run_dir)
    assert logger.experiment.settings.mode == "offline"
    send(logger, run_dir, METRICS | {"verdict": VERDICT})
    (run,) = offline_runs(run_dir.path)
    kept = (run_dir.path / "wandb/id").read_text()
    assert (run.run.run_id, run.run.run_group) == (kept, "experiment=w4a8 seed=0,1")
    assert kept.startswith(run_dir.fingerprint[:8]) and len(kept) == 16
    assert (run.run.display_name, run.run.project, run.exit_code) == ("w4a8", "viditq", 0)
    assert run.config["quant"] == {"weight": {"bits": 4}}
    for source in (run.summary, run.history[0]):
        assert source["psnr/value"] == 31.5 and source["clipsim/standard_error"] == 0.25
        assert (source["psnr/interval_low"], source["psnr/interval_high"]) == (30.5, 32.5)
        assert (source["psnr/difference_interval_low"], source["psnr/verdict"]) == (-11, -1)
        assert source["denoiser/average_weight_bits"] == 4.5 and "fid/value" not in source
    assert run.summary["clipsim/verdict_text"] == "equal within noise"
    rows = run.table("verdicts")
    assert [row["metric"] for row in rows] == ["psnr", "clipsim"]
    assert (rows[0]["verdict"], rows[0]["interval_low"], rows[0]["interval_high"]) == ("worse", 30.5, 32.5)
    assert (rows[0]["floor_seed"], rows[0]["floor_bfloat16"], rows[0]["reason"]) == (12, 41.5, "10 dB below the floor")
    assert (rows[1]["float"], rows[1]["interval_low"], rows[1]["noise"]) == (91, None, None)
    assert json.loads((run_dir.path / "run.json").read_text()) == CONFIG


@pytest.mark.parametrize("full_run", ["image", "video", "video with sound"], indirect=True)
def test_wandb_pairs(configure: Callable, full_run: RunDir) -> None:
    run = offline(configure, full_run, METRICS)
    rows = run.table("pairs")
    assert [row["index"] for row in rows] == list(range(25, 1, -1)), "at most 24, worst first"
    scores = {name: rows[0][name] for name in ("psnr", "clipsim", "clipsim_float", "clipsim_difference")}
    assert rows[0]["prompt"] == "<b>prompt 25</b>"
    assert scores == {"psnr": 15, "clipsim": 15, "clipsim_float": 15, "clipsim_difference": 0.5}
    (artifact,) = [a for name, a in run.artifacts.items() if name.endswith("-pairs")]
    staged = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert all(path.is_relative_to(full_run.path) for path in staged.values()), "the run's folder holds what it needs"
    media = [path for name, path in staged.items() if name.startswith("media/")]
    video = sample_path(full_run.samples, 0, "video").is_file()
    sounds = [name for name in json.loads(staged["pairs.table.json"].read_text())["columns"] if "sound" in name]
    assert sounds == ["float sound", "quantized sound"] * sound_path(full_run.samples, 0).is_file()
    assert len(media) == (2 + len(sounds)) * 24 and all(path.stat().st_size for path in media)
    table = json.loads(staged["pairs.table.json"].read_text())
    for what, channel in (("float", 1), ("quantized", 0)):
        cell = table["data"][0][table["columns"].index(what)]
        assert cell["_type"] == ("video-file" if video else "image-file")
        picture = Image.open(staged[cell["path"]])
        assert getattr(picture, "n_frames", 1) == (3 if video else 1)
        wanted = [0, 0, 0]
        wanted[channel] = 225
        assert picture.convert("RGB").getpixel((5, 5)) == tuple(wanted)
        for name in (name for name in sounds if name.startswith(what)):
            heard = staged[table["data"][0][table["columns"].index(name)]["path"]]
            assert read_wav(heard)[0][0, 0] == 25 + channel
    assert not list(Path(os.environ["HOME"]).rglob("*staging*"))


def test_wandb_errors(configure: Callable, run_dir: RunDir) -> None:
    write_json(run_dir.path / "errors.json", ERRORS)
    run = offline(configure, run_dir, METRICS)
    layer = run.table("errors/layers")[0]
    assert layer == {
        "layer": "blocks.0.fc1",
        "role": "mlp",
        "weight_bits": "4/8",
        "activation_bits": "8/16",
        "relative_error": 0.03,
        "minimum": -3,
        "maximum": 2,
        "amax": 3,
    }
    rows = run.table("errors/layers_by_noise_level")
    assert [(row["layer"], row["noise_level"], row["relative_error"], row["amax"]) for row in rows] == [
        ("blocks.0.fc1", 0.625, 0.04, 3),
        ("blocks.0.fc1", 0.875, 0.02, 2),
        ("blocks.0.fc2", 0.625, 0.08, 1),
        ("blocks.0.fc2", 0.875, 0.06, 8),
    ]
    assert run.plot("errors/by_noise_level")["panelDefId"] == "wandb/lineseries/v0"
    points = [tuple(row.values()) for row in run.table("errors/by_noise_level_table")]
    mean = "mlp, mean of layers"
    assert points == [
        (0.625, "denoiser", 0.2),
        (0.875, "denoiser", 0.1),
        (0.625, mean, pytest.approx(0.06)),
        (0.875, mean, pytest.approx(0.04)),
    ]
    assert run.plot("errors/by_layer")["panelDefId"] == "wandb/bar/v0"
    bars = [tuple(row.values()) for row in run.table("errors/by_layer_table")]
    assert bars == [("blocks.0.fc2", 0.07), ("blocks.0.fc1", 0.03)], "worst first"
    assert run.plot("errors/activation_ranges")["stringSettings"]["xname"] == "noise level"
    ranges = [tuple(row.values()) for row in run.table("errors/activation_ranges_table")]
    assert ranges[:2] == [(0.625, "blocks.0.fc2", 1), (0.875, "blocks.0.fc2", 8)], "the most varying first"


def test_wandb_incoherence(configure: Callable, run_dir: RunDir) -> None:
    """A table of all layers, and lines of those that have values."""
    values = {"raw": 40.8, "scaled": 17.8, "rotated": 12.8, "both": 5.0}
    layers = {
        "blocks.0.fc1": {"role": "mlp", "activation": values, "weight": {k: v / 2 for k, v in values.items()}},
        "blocks.0.fc2": {"role": "mlp", "activation": None, "weight": None},
        "blocks.1.fc1": {"role": "mlp", "activation": dict.fromkeys(values, 6.0), "weight": values},
    }
    write_json(run_dir.incoherence, {"layers": layers})
    Image.new("RGB", (4, 4)).save(run_dir.incoherence_picture)
    run = offline(configure, run_dir, METRICS)
    rows = run.table("incoherence/layers")
    assert [(row["number"], row["layer"], row["role"]) for row in rows] == [
        (number, name, "mlp") for number, name in enumerate(layers)
    ]
    assert rows[0]["activation_raw"] == 40.8 and rows[0]["weight_both"] == 2.5 and rows[1]["weight_raw"] is None
    assert run.plot("incoherence/activations")["stringSettings"]["xname"] == "number of the layer"
    points = [tuple(row.values()) for row in run.table("incoherence/activations_table")]
    assert points[:4] == [(0, "raw", 40.8), (2, "raw", 6.0), (0, "scaled", 17.8), (2, "scaled", 6.0)]
    assert run.file("incoherence/picture").read_bytes() == run_dir.incoherence_picture.read_bytes()


def test_errors_of_a_plan_without_layers() -> None:
    found = wandb_objects.error_objects(ERRORS | {"layers": {}})
    assert found["errors/layers"].data == [] and "errors/by_layer" not in found


def test_candidates_of_a_search() -> None:
    candidate = {"group": "b.0/mlp", "side": "weight", "proxy": 0.1, "output": 0.2, "metric": 0.3, "measured": True}
    search = {
        "edges": [0.0, 0.7, 1.0],
        "groups": [{"name": "b.0/mlp", "block": "b.0", "role": "mlp"}],
        "candidates": [candidate | {"segment": s, "bits": b} for s in (0, 1) for b in (4, 8)],
        "bits": [["b.0/mlp", 0, 8, 16], ["b.0/mlp", 1, 4, 16]],
    }
    table = wandb_objects.candidate_table(search)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.data]
    assert [(r["noise_level_low"], r["bits"], r["chosen"]) for r in rows] == [
        (0.0, 4, False),
        (0.0, 8, True),
        (0.7, 4, True),
        (0.7, 8, False),
    ]
    assert rows[0] | {"chosen": False} == rows[0] and rows[0]["block"] == "b.0" and rows[0]["output"] == 0.2


def test_wandb_report_pictures_and_artifact(configure: Callable, full_run: RunDir) -> None:
    run = offline(configure, full_run, METRICS)
    assert run.file("report").read_text() == REPORT, "not a byte is injected"
    assert run.file("comparison").read_bytes() == full_run.picture.read_bytes()
    gif = full_run.picture.with_suffix(".gif")
    assert ("comparison_video.path" in run.summary) == gif.is_file()
    artifact = run.artifacts["tiny-video-w4a8-odd"]
    assert (artifact.type, json.loads(artifact.metadata)["fingerprint"]) == ("model", "abc")
    entries = {entry.path: entry for entry in artifact.manifest.contents}
    assert set(entries) == {path.name for path in full_run.artifact.iterdir()}
    for name, entry in entries.items():
        file = full_run.artifact / name
        assert entry.ref == file.resolve().as_uri() and not entry.local_path, "a reference, no copy"
        assert entry.digest == base64.b64encode(hashlib.md5(file.read_bytes()).digest()).decode()
        assert entry.size == file.stat().st_size


def test_logging_again_continues_the_run(
    configure: Callable, run_dir: RunDir, capfd: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """As after a kill just before the end of the program. Nothing is printed, not on `anonymous` nor on `resume`."""
    for value in (31.5, 32.5):
        send(make_logger(configure, "wandb", run_dir), run_dir, METRICS | {"metrics": {"psnr": value}})
        wandb.teardown()  # as the end of the process would
    runs = offline_runs(run_dir.path)
    assert len({run.run.run_id for run in runs}) == 1 and all(run.run.resume for run in runs)
    assert runs[-1].summary["psnr/value"] == 32.5
    assert capfd.readouterr() == ("", "")
    assert not [warning for warning in recwarn if "wandb" in str(warning.filename)]


def test_an_error_finishes_the_run_as_failed(configure: Callable, run_dir: RunDir) -> None:
    (run_dir.path / "errors.json").write_text("{}")
    with pytest.raises(KeyError):
        send(make_logger(configure, "wandb", run_dir), run_dir, METRICS)
    assert wandb.run is None
    (run,) = offline_runs(run_dir.path)
    assert run.exit_code == 1
    assert "WANDB_DATA_DIR" not in os.environ


def test_disabled_wandb_logs_nothing(configure: Callable, full_run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    send(make_logger(configure, "wandb", full_run), full_run, METRICS)
    assert not offline_runs(full_run.path)

"""incoherence.json of whole runs: from the calibration, or from the diagnosis where nothing is calibrated."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

from viditq.assets import SHIPPED
from viditq.files import read_json
from viditq.job import Job
from viditq.quant import CalibrationStats
from viditq.quant.calibration.observers import REDUCTIONS, Observer
from viditq.stages import diagnose, quantize
from viditq.stages.incoherence import write_incoherence

Run = Callable[..., dict[str, Any] | None]
NONE = ["quant=w4a8", "quant/smoothing=none", "quant.segments=[0.0,1.0]"]


def ratio(x: np.ndarray) -> float:
    return float(np.abs(x).max() / np.abs(x).mean())


def statistics(folder: Path, cache: Path) -> CalibrationStats:
    """Those that the run was made with."""
    entry = read_json(folder / "quantized" / "meta.json")["stats"]
    return CalibrationStats.load(cache / "stats" / entry / "stats.safetensors")


def read(folder: Path) -> Any:
    return read_json(folder / "incoherence.json")


def test_values_from_the_calibration(finished_run: Path, shared_cache: Path) -> None:
    """Raw and scaled from the file of statistics by numpy alone; every quantized layer has its eight values."""
    found = read(finished_run)
    plan = read_json(finished_run / "quantized" / "plan.json")
    assert list(found["layers"]) == list(plan["layers"])
    for layer in found["layers"].values():
        for side in ("activation", "weight"):
            assert set(layer[side]) == {"raw", "scaled", "rotated", "both"}
            assert all(np.isfinite(v) and v >= 1 for v in layer[side].values())
    assert (found["stage"], found["alpha"]) == ("calibrate", 0.5)
    stats = statistics(finished_run, shared_cache)
    model = PixArtTransformer2DModel.from_pretrained(SHIPPED / "tiny_image" / "transformer").float()
    for name in list(plan["layers"])[::7]:
        observer = stats.layers[name]
        kept = observer.keys != torch.iinfo(torch.int64).max
        x, w = observer.rows[kept].double().numpy(), model.get_submodule(name).weight.detach().double().numpy()
        assert found["max_rows"] >= len(x) > 0
        seen = observer.count > 0
        amax = np.maximum(-observer.minimum[seen].amin(0), observer.maximum[seen].amax(0)).double().numpy()
        s = np.sqrt(amax / np.abs(w).max(0))
        values = found["layers"][name]
        assert values["activation"]["raw"] == pytest.approx(ratio(x), rel=1e-4)
        assert values["activation"]["scaled"] == pytest.approx(ratio(x / s), rel=1e-4)
        assert values["weight"]["scaled"] == pytest.approx(ratio(w * s), rel=1e-4)


def test_without_calibration_it_comes_from_the_diagnosis(
    run: Run, finished_run: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same layers and weights; made again when lost, alike; not there when the diagnosis is switched off."""
    folder = tmp_path / "run"
    run(folder, shared_cache, *NONE)
    found, calibrated, errors = read(folder), read(finished_run), read_json(folder / "errors.json")
    assert found["stage"] == "diagnose" and found["num_prompts"] == errors["num_prompts"] == 2
    assert found["layers"].keys() == calibrated["layers"].keys()
    for name, layer in found["layers"].items():
        assert layer["weight"]["raw"] == calibrated["layers"][name]["weight"]["raw"]
        assert layer["role"] == errors["layers"][name]["role"]
    assert 'id="incoherence"' in (folder / "report.html").read_text()
    (folder / "incoherence.json").unlink()
    run(folder, shared_cache, *NONE)
    assert read(folder) == found and read_json(folder / "errors.json") == errors
    assert not list(folder.glob("partial-*"))
    for module, work in ((diagnose, "run_batches"), (quantize, "ArtifactWriter")):
        monkeypatch.setattr(module, work, lambda *_, **__: pytest.fail("work was done twice"))
    run(folder, shared_cache, *NONE)
    monkeypatch.undo()
    run(tmp_path / "off", shared_cache, *NONE, "diagnosis.num_prompts=0")
    assert not (tmp_path / "off" / "incoherence.json").exists()
    assert 'id="incoherence"' not in (tmp_path / "off" / "report.html").read_text()


def test_a_calibrated_run_has_it_without_diagnosis_and_restores_it(
    run: Run, run_copy: Path, finished_run: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "off", shared_cache, "diagnosis.num_prompts=0")
    assert read(tmp_path / "off") == read(finished_run)
    (run_copy / "incoherence.json").unlink()
    monkeypatch.setattr(quantize, "ArtifactWriter", lambda *_: pytest.fail("work was done twice"))
    monkeypatch.setattr(diagnose, "run_batches", lambda *_: pytest.fail("work was done twice"))
    run(run_copy, shared_cache)
    assert read(run_copy) == read(finished_run)


def test_a_layer_that_was_never_called_is_said_to_have_no_values(
    finished_run: Path, shared_cache: Path, tmp_path: Path
) -> None:
    stats = statistics(finished_run, shared_cache)
    first, second = list(read(finished_run)["layers"])[:2]
    stats.layers[second] = Observer({field: getattr(stats.layers[second], field).clone() for field in REDUCTIONS})
    stats.layers[second].keys.fill_(torch.iinfo(torch.int64).max)
    stats.layers[second].count.zero_()
    width = stats.layers[first].minimum.shape[1]
    run_dir = SimpleNamespace(incoherence=tmp_path / "incoherence.json")
    job: Job | Any = SimpleNamespace(run_dir=run_dir, experiment=SimpleNamespace(roles={first: "mlp", second: "mlp"}))
    weights = {name: torch.randn(4, width, generator=torch.Generator().manual_seed(0)) for name in (first, second)}
    write_incoherence(job, weights, stats, "calibrate", 3)
    layers = read(tmp_path)["layers"]
    assert list(layers) == [first, second] and layers[second] == {"role": "mlp", "activation": None, "weight": None}
    for variant in ("raw", "rotated"):  # the others depend on the weights
        assert layers[first]["activation"][variant] == read(finished_run)["layers"][first]["activation"][variant]

"""The tools beside run.py, on real runs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def load(path: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compare_runs_draws_rows_and_pairs_prompts(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = Path("outputs/comparison.png")  # nothing is written beside the runs
    arguments = [str(finished_run), str(finished_run), "--prompts", "1", "0", "--labels", "a", "b"]
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *arguments])
    load("scripts/compare_runs.py").main()
    assert out.read_bytes().startswith(b"\x89PNG") and "+0.0000 ± 0.0000" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(finished_run), "--prompts", "99", "--out", str(out)])
    with pytest.raises(SystemExit, match="no sample of prompt 99"):
        load("scripts/compare_runs.py").main()
    out.unlink()
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(finished_run), "--out", str(out)])
    load("scripts/compare_runs.py").main()
    assert out.is_file(), "the first three prompts, of a run that has two"


def test_compare_runs_of_one_prompt_or_of_what_is_undefined_prints_no_nan(capsys):
    one = {"prompts": ["a"], "metrics": {"psnr": [30.0], "odd": [None]}}
    load("scripts/compare_runs.py").print_differences(["a", "b"], [one, one])
    said = capsys.readouterr().out
    assert "+0.0000 ± unknown" in said and "undefined" in said and "nan" not in said


def test_compare_runs_refuses_what_cannot_be_paired(finished_run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    values = json.loads((finished_run / "per_prompt.json").read_text())
    (other / "taken.png").mkdir()
    (other / "per_prompt.json").write_text(json.dumps({**values, "reference": "/elsewhere/another_hash"}))
    for arguments, message in (
        ([str(finished_run), str(other)], "different float samples"),
        ([str(finished_run), str(finished_run), "--labels", "a"], "1 labels for 2 runs"),
        ([str(finished_run), "--out", str(other / "per_prompt.json" / "a.png")], "a file is where a folder has to be"),
        ([str(finished_run), "--out", "picture.svg"], "ends with .png or .gif"),
        ([str(finished_run), "--out", str(other / "taken.png")], "a folder is where a file has to be.* --out FILE"),
        ([str(tmp_path)], "holds no run .no run.json.. A finished run is needed"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", *arguments])
        with pytest.raises(SystemExit, match=message):
            load("scripts/compare_runs.py").main()


def test_kurtosis_of_known_distributions():
    kurtosis = load("scripts/plot_difficulty.py").kurtosis
    generator = torch.Generator().manual_seed(0)
    assert kurtosis(torch.randn(200_000, generator=generator)) == pytest.approx(0.0, abs=0.05)
    assert kurtosis(torch.rand(200_000, generator=generator)) == pytest.approx(-1.2, abs=0.02)


def test_a_channel_that_changes_with_the_noise_is_told_from_one_that_does_not():
    ratio = load("scripts/plot_difficulty.py").channel_level_ratio
    amax_KC = torch.ones(3, 20)
    amax_KC[:, :8] = 10.0
    assert ratio(amax_KC) == 1
    amax_KC[:, :8] = torch.tensor([10.0, 4.0, 2.0])[:, None]
    assert ratio(amax_KC) == 5
    amax_KC[:, 3] = 100.0  # of the eight largest the median
    assert ratio(amax_KC) == 5


def test_plot_difficulty_measures_every_quantized_linear(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    overrides = ["model=tiny_image", "model.num_steps=2", "data.num_calibration_prompts=1", "data.num_prompts=1"]
    load("scripts/plot_difficulty.py").main(overrides)
    folder = tmp_path / "outputs" / "difficulty" / "tiny_image"
    rows = json.loads((folder / "difficulty.json").read_text())
    assert (folder / "difficulty.png").is_file() and "kurtosis" in capsys.readouterr().out
    ratios = ("incoherence", "channel_ratio", "noise_level_ratio", "channel_level_ratio")
    assert len(rows) == 40 and all(row[key] >= 1 for row in rows for key in ratios)


def test_the_gate_reads_real_clips_and_notices_wrong_ones():
    script = load("scripts/judge_tiny.py")
    from viditq.data.moving_shapes import draw_scenes, render

    generator = torch.Generator().manual_seed(1)
    scenes = draw_scenes(128, generator)
    clips = (render(scenes, generator) * 255).round().to(torch.uint8)
    judge = script.load_judge("shipped:judge")
    right = script.accuracies(judge, clips, scenes, video=True)
    assert len(right) == 9 and min(right.values()) > 0.99
    frozen = clips[:, :1].expand_as(clips)
    still = script.accuracies(judge, frozen, scenes, video=True)
    assert still["motion left"] < 0.2 and still["motion still"] > 0.9 and still["color"] > 0.9


def test_plot_exports_draws_the_rows_that_there_are_and_says_how_near_they_are(tmp_path):
    script = load("scripts/plot_exports.py")
    own = np.full((3, 8, 4, 4, 3), 0.5)
    assert script.psnr(own, own) == "equal to the bit" and script.psnr(own + 0.1, own) == "20.0 dB"
    found = {i: own for i, row in enumerate(script.ROWS) if row[2] in ("viditq", "float")}
    script.draw(found, tmp_path / "out" / "deploy.png")
    assert (tmp_path / "out" / "deploy.png").read_bytes().startswith(b"\x89PNG")
    assert script.has(sys.executable, "numpy") and not script.has(sys.executable, "no_such_package")

"""`viditq which` on runs written here: five rows, and intervals that decide what is called better."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from viditq import program
from viditq.errors import UserError
from viditq.files import lock
from viditq.sweeps.unfinished import command_of
from viditq.sweeps.which import which

W8 = {"quant": {side: {"bits": 8} for side in ("weight", "activation")}}
Write = Callable[..., Path]


def exact(artifact: Path) -> list[str]:
    """What the run was written to be exact for."""
    found: list[str] = json.loads((artifact / "meta.json").read_text())
    return found


def answers(text: str) -> dict[str, list[str]]:
    """First cell -> the others, of one model's table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return {
        cells[0].strip(): [c.strip() for c in cells[1:]] for cells in (line.strip("|").split(" | ") for line in lines)
    }


def test_five_rows(write: Write, tmp_path: Path) -> None:
    write("fine", 60, 5.2, W8, exact=[])
    write("plain", 50, 5.0, W8, exact=["torchao", "sdnq"], ratio=2.0)
    write("large", 70, 7.0, W8)  # a branch beside 8 bits: not of their bytes
    write("small", 40, 2.5, exact=["comfyui"], ratio=1.5)
    write("smaller", 30, 2.4, ratio=9.0, backend="fake")
    write("poor", 25, 2.6)
    rows = answers(which([str(tmp_path / "runs")], None, exact))
    assert [*rows] == [
        *("best at 8 bits", "best at half the bytes of that", "fastest", "best exportable", "what not to use")
    ]
    assert rows["best at 8 bits"][0] == "fine" and "certainly better than 4 others" in rows["best at 8 bits"][-1]
    half = rows["best at half the bytes of that"]
    assert half[0] == "small" and half[2] == "2.50" and half[-1].startswith("48 % of its bytes; certainly better")
    assert rows["fastest"][0] == "plain" and "of 2 of 6 runs" in rows["fastest"][-1]
    assert "different conditions" not in rows["fastest"][-1]
    write("two threads", 45, 2.5, ratio=2.5, threads=2)
    rows = answers(which([str(tmp_path / "runs")], None, exact))
    assert (
        rows["fastest"][0] == "two threads"
        and "different conditions (8 prompts at once, 1 thread" in rows["fastest"][-1]
    )
    shutil.rmtree(tmp_path / "runs" / "two threads")
    rows = answers(which([str(tmp_path / "runs")], None, exact))
    assert rows["best exportable"][0] == "plain" and "exact for torchao, sdnq" in rows["best exportable"][-1]
    worse = rows["what not to use"][-1]
    assert worse.startswith("poor: small is better by +15") and "smaller" not in worse and "plain" not in worse


def test_of_many_not_to_use_the_worst_are_named(write: Write, tmp_path: Path) -> None:
    write("good", 60, 2.0)
    for value in range(20, 30):
        write(f"poor{value}", value, 2.5)
    worse = answers(which([str(tmp_path / "runs")], None, exact))["what not to use"][-1]
    assert worse.startswith("poor20: good is better by +40") and worse.count("is better") == 3
    assert "poor22" in worse and worse.endswith("; and 7 more")


def test_nothing_is_called_better_that_an_interval_cannot_tell(write: Write, tmp_path: Path) -> None:
    write("one", 51, 5.0, W8, noise=6.0)
    write("other", 50, 5.0, W8)
    write("behind", 20, 4.8, W8, noise=3.0)
    rows = answers(which([str(tmp_path / "runs/*")], None, exact))
    assert rows["best at 8 bits"][0] == "one" and rows["best at 8 bits"][-1] == "not certainly better than other"
    assert rows["what not to use"][-1] == "no run is certainly worse than another of no more bytes"
    assert rows["best at half the bytes of that"][0] == "-"


def test_what_no_run_has_is_said(write: Write, tmp_path: Path) -> None:
    write("small", 40, 2.5, exact=[], ratio=3.0, backend="fake")
    rows = answers(which([str(tmp_path / "runs/small")], None, exact))
    assert rows["best at 8 bits"][-1] == rows["best at half the bytes of that"][-1] == "no run has 8 bits on both sides"
    assert rows["fastest"][-1].startswith("not measured") and "--requantize" in rows["best exportable"][-1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="None of these folders holds a finished run"):
        which([str(tmp_path / "empty")], None, exact)


def test_each_answer_has_its_folder_and_what_was_looked_at_is_said(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("w8a8", 50, 5.0, W8)
    write("small", 40, 2.5)
    write("poor", 20, 2.6)
    write("middling", 30, 2.55)
    monkeypatch.chdir(tmp_path)
    told = which(["."], None, exact)  # a folder of folders of runs, as `outputs` is
    assert "\nOf 4 finished runs in runs; the folders of those named:\n" in told
    named = [line for line in told.splitlines() if line.startswith("- ")]
    assert sorted(named) == [f"- {name}: runs/{name}" for name in ("middling", "poor", "small", "w8a8")]
    assert told == which([".", "runs", str(tmp_path / "runs/*")], None, exact), "looked at once"


def test_a_run_that_works_now_is_told_from_one_that_was_stopped(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: tmp_path / "outputs" / "m" / name for name in ("working", "stopped", "sampled", "no run")}
    write("w8a8", 50, 5.0, W8, folder="outputs/m")
    for name, place in places.items():
        place.mkdir()
        words = ["model=m", "gate={psnr: 3}", *["stages=[prompts,generate]"] * (name == "sampled")]
        if name != "no run":
            (place / "run.json").write_text(json.dumps({"name": name, "seed": 0, "overrides": words}))
    monkeypatch.chdir(tmp_path)
    with lock(places["working"], lambda: None):
        assert "Of 1 finished run in outputs/m" in which(["outputs"], None, exact)
        working, stopped = (str(places[name]) for name in ("working", "stopped"))
        told = {line.split()[2]: line for line in capsys.readouterr().err.splitlines()}
        assert [*told] == ["outputs/m/sampled", "outputs/m/stopped", "outputs/m/working"]
        assert "is running now, and counts when it is through" in told["outputs/m/working"]
        assert told["outputs/m/stopped"].endswith("Go on with: python run.py model=m 'gate={psnr: 3}'")
        assert "measured nothing: its command has stages=[prompts,generate]" in told["outputs/m/sampled"]
        monkeypatch.chdir("/")
        with pytest.raises(UserError, match="None of these folders"):
            which([working, stopped, str(places["no run"])], None, exact)
    told_elsewhere = capsys.readouterr().err
    assert "working is running now" in told_elsewhere and f"'gate={{psnr: 3}}' (in {tmp_path})\n" in told_elsewhere
    assert "no run holds no run (no run.json)" in told_elsewhere


def test_a_run_in_a_folder_of_its_own_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "my run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"overrides": ["seed=1"]}')
    monkeypatch.chdir(tmp_path)
    assert command_of(Path("mine")) == "python run.py seed=1 hydra.run.dir=mine"
    assert command_of(tmp_path / "my run") == """python run.py seed=1 'hydra.run.dir="my run"'"""


def test_a_run_goes_on_where_it_was_put_with_the_latest_stages_and_not_as_a_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Hydra kept of the command tells: `outputs/m/x` may have been chosen by hand, and a trial is one run."""
    folder = tmp_path / "outputs" / "m" / "x"
    (folder / "hydra").mkdir(parents=True)
    (folder / "run.json").write_text('{"overrides": ["seed=1", "stages=[prompts]"]}')
    monkeypatch.chdir(tmp_path)

    def told(place: list[str], words: list[str], **sweeper: Any) -> str:
        hydra = {"overrides": {"hydra": place, "task": words}, "sweeper": sweeper}
        (folder / "hydra" / "hydra.yaml").write_text(json.dumps({"hydra": hydra}))
        return command_of(Path("outputs/m/x"))

    assert told(["hydra.mode=RUN"], ["seed=1"], params=None) == "python run.py seed=1"
    assert told(["hydra.run.dir=outputs/m/x"], ["seed=1"]) == "python run.py seed=1 hydra.run.dir=outputs/m/x"
    assert told([], ["seed=1"], params={"edge": {"low": 0}}) == "python run.py seed=1 hydra.mode=RUN"
    assert told([], ["seed=2"]) == "python run.py seed=1 'stages=[prompts]'", "a command that the folder refused"
    (folder / "hydra" / "hydra.yaml").write_text("hydra: 3")
    assert command_of(Path("outputs/m/x")) == "python run.py seed=1 'stages=[prompts]'"


def test_models_have_tables_of_their_own_and_sweeps_name_their_runs(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write("w8a8", 50, 5.0, W8, model=model, folder=model) for model in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert program.main(["which"]) == 2
    assert "outputs does not exist" in capsys.readouterr().err
    (tmp_path / "sweep").mkdir()
    for num, run in enumerate(runs):
        record = {"num": num, "overrides": [], "folder": str(run), "status": "done"}
        (tmp_path / "sweep" / f"{num:04d}.json").write_text(json.dumps(record))
    assert program.main(["which", str(tmp_path / "sweep")]) == 0
    told = capsys.readouterr().out
    assert "### a: which to use, by PSNR dB" in told and "### b: which to use" in told
    (tmp_path / "sweep").rename(tmp_path / "outputs")
    assert program.main(["which"]) == 0
    assert "### a: which to use" in capsys.readouterr().out
    assert program.main(["which", str(tmp_path / "outputs"), "--metric", "fvd"]) == 2
    assert "no metric that ranks runs" in capsys.readouterr().err

"""What every script says to arguments that it cannot work with: a message, never a traceback."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from viditq.cli import user_message
from viditq.sweeps.records import SWEEP_VARIABLE

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
READERS = {  # what reads runs or files -> its arguments, {} being a folder
    "compare_runs.py": ["{}", "{}", "--out", "out.png"],
    "leaderboard.py": ["{}", "--out", "out"],
    "import_official.py": ["opensora_v1", "{}/run.json", "--parts", "{}", "--out", "out"],
    "import_plan.py": ["--weight", "{}/run.json", "--out", "out"],
}
REFUSED = {  # arguments that name nothing -> words of the message
    ("judge_tiny.py", "--models", "nope"): "invalid choice: 'nope'",
    ("judge_tiny.py", "--count", "0"): "--count 0: give 1 or more",
    ("train_tiny.py", "--max-steps", "0"): "--max-steps 0: give 1 or more",
    ("train_lora.py", "--rank", "0"): "--rank 0: give 1 or more",
    ("measure_lora.py", "--schemes", "nope"): "invalid choice: 'nope'",
    ("plot_difficulty.py", "model=nope"): "Could not find 'model/nope'",
}


class Done(NamedTuple):
    """How a script ended, and what it has printed."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """(script, *arguments) -> how it ended, as if started in tmp_path; what would be a traceback is raised."""
    monkeypatch.chdir(tmp_path)
    for variable in ("VIDITQ_COMMAND", "HYDRA_FULL_ERROR", SWEEP_VARIABLE):
        monkeypatch.setenv(variable, "")  # so that what a script sets is undone

    def started(script: str, *arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        code, printed = end.value.code, capfd.readouterr()
        told = code if isinstance(code, str) else ""  # Python prints it
        return Done(code if isinstance(code, int) else int(bool(code)), printed.out, printed.err + told)

    return started


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, run: Run) -> None:
    done = run(script, "--help")
    assert done.status == 0 and f"usage: {script}" in done.out


@pytest.mark.parametrize("script", READERS)
@pytest.mark.parametrize("content", ["missing", "empty", '{"a": ', "[]"])
def test_folders_that_hold_no_run(script: str, content: str, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if content != "missing":
        folder.mkdir()
    for name in ("run.json", "metrics.json", "per_prompt.json") if content[0] in "{[" else ():
        (folder / name).write_text(content)
    done = run(script, *(text.format(folder) for text in READERS[script]))
    assert done.status != 0 and "error: " in done.err and str(folder) in done.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("arguments", REFUSED)
def test_arguments_that_name_nothing(arguments: tuple[str, ...], run: Run) -> None:
    done = run(*arguments)
    assert done.status == 2 and REFUSED[arguments] in done.err


def test_samples_that_are_gone(finished_run: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "per_prompt.json").write_text((finished_run / "per_prompt.json").read_text())
    done = run("compare_runs.py", str(tmp_path), "--prompts", "0")
    assert done.status == 1 and f"error: {tmp_path}/samples is missing" in done.err


def test_a_configuration_that_is_no_yaml() -> None:
    with pytest.raises(yaml.YAMLError) as error:
        yaml.safe_load("a: [1\nb: 2\n")
    assert (user_message(error.value) or "").startswith("A configuration file is no yaml:\n")


def test_a_lora_that_is_not_there(run: Run) -> None:
    done = run("measure_lora.py")
    assert done.status == 1 and "error: outputs/lora/pytorch_lora_weights.safetensors does not exist" in done.err

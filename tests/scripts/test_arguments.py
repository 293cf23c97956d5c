"""What every script says to arguments that it cannot work with: a message, never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from viditq.cli import user_message

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
READERS = {  # what reads runs or files -> its arguments, {} being a folder
    "compare_runs.py": ["{}", "{}", "--out", "out"],
    "leaderboard.py": ["{}", "--out", "out"],
    "import_official.py": ["opensora_v1", "{}/run.json", "--parts", "{}", "--out", "out"],
    "import_plan.py": ["--weight", "{}/run.json", "--out", "out"],
}
REFUSED = {  # arguments that name nothing -> words of the message
    ("judge_tiny.py", "--models", "nope"): "invalid choice: 'nope'",
    ("judge_tiny.py", "--count", "0"): "--count 0: give 1 or more",
    ("train_tiny.py", "--max-steps", "0"): "--max-steps 0: give 1 or more",
    ("plot_difficulty.py", "model=nope"): "Could not find 'model/nope'",
}


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own that works in `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, tmp_path: Path) -> None:
    done = run(tmp_path, script, "--help")
    assert done.returncode == 0 and f"usage: {script}" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", READERS)
@pytest.mark.parametrize("content", ["missing", "empty", '{"a": ', "[]"])
def test_folders_that_hold_no_run(script: str, content: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if content != "missing":
        folder.mkdir()
    for name in ("run.json", "metrics.json", "per_prompt.json") if content[0] in "{[" else ():
        (folder / name).write_text(content)
    done = run(tmp_path, script, *(text.format(folder) for text in READERS[script]))
    assert done.returncode != 0 and "error: " in done.stderr and str(folder) in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("arguments", REFUSED)
def test_arguments_that_name_nothing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2 and REFUSED[arguments] in done.stderr and "Traceback" not in done.stderr


def test_samples_that_are_gone(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "per_prompt.json").write_text((finished_run / "per_prompt.json").read_text())
    done = run(tmp_path, "compare_runs.py", str(tmp_path), "--prompts", "0")
    assert done.returncode == 1 and f"error: {tmp_path}/samples is missing" in done.stderr


def test_a_configuration_that_is_no_yaml() -> None:
    with pytest.raises(yaml.YAMLError) as error:
        yaml.safe_load("a: [1\nb: 2\n")
    assert (user_message(error.value) or "").startswith("A configuration file is no yaml:\n")

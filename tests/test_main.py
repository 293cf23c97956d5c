"""`viditq`: what is wrong with a command line is said at once, in one message, with status 2."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from viditq.commands import judging
from viditq.export.targets import TARGETS
from viditq.program import main


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """As far as what is checked first looks at it."""
    folder = tmp_path / "run" / "quantized"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    return folder


def test_bad_words_are_refused_without_torch(tmp_path: Path) -> None:
    lines = f"""
import sys
from viditq.program import main
assert main(["export", {str(tmp_path)!r}, "--to", "comfyui"]) == 2
assert main(["export", {str(tmp_path)!r}, "--to", "comfy"]) == 2
assert not {{"torch", "diffusers", "transformers"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert "holds no quantized model" in done.stderr and "close names: comfyui" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "comfyu"], "close names: comfyui"),
        (["--to", "gguf"], "--to gguf is unknown; known names: comfyui, diffusers"),
        (["--to", "comfyui", "--out", "x.gguf"], "whose name ends in .safetensors"),
        (["--to", "comfyui", "--out", "x"], "whose name ends in .safetensors"),
        (["--to", "diffusers", "--requantize"], "--requantize changes nothing"),
        (["--to", "comfyui", "--out", "HERE/quantized/x.safetensors"], "lies in the artifact"),
        (["--to", "diffusers", "--out", "HERE/quantized"], "lies in the artifact"),
        (["--to", "diffusers", "--out", "."], "--out . has no name of its own"),
        (["--to", "diffusers", "--out", ".."], "--out .. has no name of its own"),
        (["--to", "diffusers", "--out", "HERE/quantized/meta.json"], "writes a folder, and this is a file"),
    ],
)
def test_each_wrong_word_has_its_message(words, message, artifact: Path, capsys) -> None:
    words = [word.replace("HERE", str(artifact.parent)) for word in words]
    assert main(["export", str(artifact), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_what_is_no_run_is_refused(name: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(["export", str(tmp_path / name), "--to", "comfyui"]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_name_that_is_nearly_right_is_told_the_runs_that_are_there(artifact: Path, capsys) -> None:
    assert main(["export", str(artifact.parents[1] / "runs"), "--to", "diffusers"]) == 2
    assert f"In {artifact.parents[1]} such runs: close names: run" in capsys.readouterr().err


def test_a_damaged_artifact_has_the_artifact_s_message(artifact: Path, capsys) -> None:
    assert main(["export", str(artifact.parent), "--to", "comfyui"]) == 2
    assert "plan.json is missing" in capsys.readouterr().err


def test_the_help_tells_every_target(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_its_function(name: str) -> None:
    assert callable(TARGETS[name].load().export)


def test_verify_reads_every_byte(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run / "quantized", run / "quantized")
    assert main(["verify", str(run), str(run / "quantized")]) == 0
    assert capsys.readouterr().out.count("all as written") == 2
    file = run / "quantized" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(run)]) == 2
    assert re.search(r"model.safetensors was altered \(the sha256 of", capsys.readouterr().err)


def test_judge_is_a_run_that_takes_what_lies_there_as_it_is(artifact: Path, tmp_path: Path, capsys) -> None:
    named = f'quant.policy.path="{artifact}"'
    assert judging(str(artifact)) == ["quant/policy=artifact", named]
    assert judging(str(artifact.parent))[0] == "quant/policy=artifact"
    (tmp_path / "x.gguf").write_text("")
    assert judging(str(tmp_path / "x.gguf"))[0] == "quant=external/gguf"
    (tmp_path / "saved").mkdir()
    assert judging(str(tmp_path / "saved"))[0] == "quant=external/folder"
    (tmp_path / "x.safetensors").write_text("")
    assert main(["judge", str(tmp_path / "x.safetensors"), "model=flux_dev"]) == 2
    assert "import it first" in capsys.readouterr().err
    assert main(["judge", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_command_that_there_is_not_is_told_with_those_near(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wich", "outputs/tiny_video"]) == 2
    error = capsys.readouterr().err
    assert "no command 'wich'; close names: which" in error and "KEY=VALUE" in error and "quotes" not in error

"""scripts/import_plan.py: the original project's files, and files that no plan can be made of."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests" / "data" / "golden" / "open_sora"
LAYER = "model.blocks.0.attn.q"


def import_plan(monkeypatch: pytest.MonkeyPatch, *arguments: Path | str) -> int | str | None:
    """The exit status of the script."""
    spec = importlib.util.spec_from_file_location("import_plan", ROOT / "scripts" / "import_plan.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["import_plan.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        script.main()
    return done.value.code


def test_the_published_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = ["--weight", FILES / "t20_weight_4_mp.yaml", "--activation", FILES / "t20_act_8_mp.yaml"]
    assert import_plan(monkeypatch, *sides, "--out", tmp_path / "plan.json") == 0
    assert "364 Linears in 4 segments with w4a8, w8a8" in capsys.readouterr().out
    assert (tmp_path / "plan.json").is_file()


@pytest.mark.parametrize("bits", ["3.5", "4.0", "a", "'4'", "0", "1", "9", "15", "16", "-4", "null", "true", "[4]"])
def test_odd_bits(
    bits: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were tracebacks, or rounded in silence."""
    file = tmp_path / "weight.yaml"
    file.write_text(f"19-0:\n  {LAYER}: {bits}\n")
    assert import_plan(monkeypatch, "--weight", file, "--out", tmp_path / "plan.json") == 2
    error = capsys.readouterr().err
    assert f"error: {file}: '19-0' gives {LAYER} the bits " in error and "a whole number from 2 to 8;" in error
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "do not follow each other"),
        ("[1]", "must be a mapping of step ranges"),
        ("19-0: {", "cannot be read as yaml"),
        ("19-0:", "'19-0' is no range of sampling steps such as '19-15' with bits of layers"),
        ("19-0: {}", "'19-0' is no range of sampling steps such as '19-15' with bits of layers"),
        (f"{{fp_layers: 3, 19-0: {{{LAYER}: 4}}}}", "fp_layers must be a mapping"),
        (f"{{fp_layers: {{19-0: q}}, 19-0: {{{LAYER}: 4}}}}", "fp_layers must be a mapping"),
        (f"{{fp_layers: {{9-0: [q]}}, 19-0: {{{LAYER}: 4}}}}", "fp_layers names the steps '9-0'"),
    ],
)
def test_files_that_hold_no_plan(
    text: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weight.yaml"
    file.write_text(text)
    assert import_plan(monkeypatch, "--weight", file, "--out", tmp_path / "plan.json") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weight", "nowhere.yaml"], "nowhere.yaml cannot be read as yaml"),
        ([], "give a weight file, an activation file, or both"),
        (["--weight", "weight.yaml", "--recipe", "quant=nope"], "nope"),
        (["--weight", "weight.yaml", "--recipe", "quant=["], "input '['"),
        (["--weight", "weight.yaml", "--recipe", "quant=none"], "quantize something"),
        (["--weight", "weight.yaml", "--recipe", "quant.weight.bits=foo"], "bits='foo' is not possible"),
        (
            ["--weight", "weight.yaml", "--out", "folder"],
            "a folder is where a file has to be. Choose another with --out",
        ),
        (["--weight", "weight.yaml", "--out", "weight.yaml/x"], "a file is where a folder has to be"),
    ],
)
def test_arguments_that_cannot_work(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("weight.yaml").write_text(f"19-0: {{{LAYER}: 4}}\n")
    assert import_plan(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err

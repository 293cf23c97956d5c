"""examples/quickstart.ipynb: its cells in their order, without IPython."""

import ast
import base64
import io
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.forked import ROOT, Forked

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def execute(source: str, names: dict[str, Any], folder: Path) -> Any:
    """A cell as a notebook runs it: a command line, or Python whose last expression is the result."""
    if source.startswith("%%sh\nviditq "):
        run = Forked(folder, "cell", *shlex.split(source.replace("\\\n", " "))[2:], here=folder)
        assert run.ended()[0] == 0, run.report()
        return None
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The last one shows float beside quantized, which is near it."""
    display = ModuleType("IPython.display")
    display.Image = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict[str, Any] = {}
    results = [execute("".join(cell["source"]), names, tmp_path) for cell in cells if cell["cell_type"] == "code"]
    with Image.open(io.BytesIO(results[-1].data)) as moving:
        assert (moving.size, moving.n_frames, moving.format) == ((384, 192), 8, "GIF")
    assert 20 < names["psnr"] < 60 and f"{names['psnr']:.1f} dB" in capsys.readouterr().out


def test_what_is_committed_names_no_place() -> None:
    """Outputs hold the picture and the figure, small, and no path of a machine."""
    text = NOTEBOOK.read_text()
    assert len(text) < 100_000 and not re.search(r"/(home|root|tmp|work|Users)/", text)
    shown = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    (picture,) = [output["data"]["image/gif"] for output in shown if "data" in output]
    with Image.open(io.BytesIO(base64.b64decode(picture))) as moving:
        assert moving.n_frames == 8

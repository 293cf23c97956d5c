"""What `pip install` brings: the package with its configuration, away from the clone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.forked import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel holds, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("viditq-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_everything_that_a_run_reads_is_inside(installed: Path) -> None:
    conf = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert {path.relative_to(installed / "viditq/conf") for path in (installed / "viditq/conf").rglob("*.yaml")} == conf
    # Beside Python: kernels' sources, the page's templates, the tiny models, the marker of types.
    kinds = (".cpp", ".h", ".jinja", ".html", ".css", ".js", ".json", ".safetensors", ".typed")
    there = {path.relative_to(ROOT) for path in (ROOT / "viditq").rglob("*") if path.suffix in kinds}
    assert len(there) > 30 and all((installed / path).is_file() for path in there)
    assert {path.name for path in (installed / "hydra_plugins").glob("*.py")} == {"viditq_grid.py", "viditq_tuner.py"}
    (entry,) = installed.glob("viditq-*.dist-info/entry_points.txt")
    assert "viditq = viditq.program:command" in entry.read_text()


def test_it_composes_a_run_from_another_folder(installed: Path, tmp_path: Path) -> None:
    lines = f"""
import os, sys
sys.path = [{str(installed)!r}, *(path for path in sys.path if path != {str(ROOT)!r})]
sys.argv = ["viditq", "experiment=w4a8_ts_smooth", "--cfg", "job"]
from viditq.program import main
import viditq
print(viditq.__file__, file=sys.stderr)
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", lines], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stderr
    assert "name: w4a8_ts_smooth" in done.stdout and "path: shipped:tiny_video" in done.stdout
    assert not list(tmp_path.iterdir())

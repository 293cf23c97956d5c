"""benchmarks/gpu.py goes through all of its code on a CPU; benchmarks/gpu.sh names what is there."""

import json
import re
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = {f"ours {name}{how}" for name in ("W8A8", "W4A8", "FP8") for how in ("", ", compiled")}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def check(folder: Path, geometries: int) -> None:
    results = json.loads((folder / "gpu.json").read_text())
    assert len({row["geometry"] for row in results["steps"]}) == geometries
    measured = [row for rows in (results["linears"], results["steps"]) for row in rows if "ms" in row]
    assert len(measured) >= 16 + 8 * geometries
    assert all(row["relative_error"] < 0.1 for row in measured)
    left_out = {row["left_out"] for rows in (results["linears"], results["steps"]) for row in rows if "left_out" in row}
    assert all(reason.startswith("not installed (") for reason in left_out), left_out
    steps = {row["candidate"]: row for row in results["steps"] if "ms" in row}
    assert (
        steps.keys() >= OURS
        and "scaled_mm" in steps["ours FP8"]["backends"]
        and all("fake" not in steps[name]["backends"] for name in OURS)
    )
    page = (folder / "gpu.md").read_text()
    assert "a dry run" in page.splitlines()[0] and all(f"| not measured: {reason} |" in page for reason in left_out)


def test_a_dry_run_writes_both_tables(gpu: Any, tmp_path: Path) -> None:
    gpu.main(["--dry-run", "--out", str(tmp_path / "out"), "--only", "STDiT"])
    check(tmp_path / "out", 1)


@pytest.mark.slow
def test_a_dry_run_of_every_geometry(gpu: Any, tmp_path: Path) -> None:
    gpu.main(["--dry-run", "--out", str(tmp_path)])
    check(tmp_path, 3)


def test_what_there_is_no_time_for_is_left_out_and_said(gpu: Any, tmp_path: Path) -> None:
    gpu.main(["--dry-run", "--out", str(tmp_path), "--seconds", "0"])
    assert "| not measured: no time was left |" in (tmp_path / "gpu.md").read_text()


def test_what_was_found_is_there_when_it_is_ended_early(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by `timeout`, while a compiler has the last candidate."""

    def ended(*_: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(gpu.Bench, "of_step", ended)
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert len([row for row in results["linears"] if "ms" in row]) >= 16
    assert "| 8 x 64 x 96 | ours W4A8 | " in (tmp_path / "gpu.md").read_text()


def test_a_step_is_timed_in_a_cuda_graph_too_where_it_can_be_recorded(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, done = gpu.Bench(True, 1.0, tmp_path), []
    bench.dry_run = False
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: done.append("replayed")))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(gpu.Bench, "milliseconds", lambda self, call, ahead: (call(), 2.0)[1])
    assert bench.in_a_graph(lambda: done.append("recorded")) == 2.0
    assert done == ["recorded", *6 * ["replayed"]]
    assert bench.in_a_graph(lambda: torch.zeros(1).missing) is None
    rows = [{"shape": "one", "candidate": "bf16", "ms": 4.0, "low": 3.0, "host_ms": 1.0, "graph_ms": 2.0}]
    assert (
        gpu.table(rows, "shape", "bf16")[-1] == "| one | bf16 | 4.000 / 3.000 | 1.000 | 2.000 | 1.00 |  |  | 0.0000 |"
    )


def test_every_geometry_has_its_share_of_the_seconds(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each candidate takes 20 seconds, most of them a compiler's, as on a GPU's first day."""
    now = [0.0]

    def slow(*_: object) -> dict[str, Any]:
        now[0] += 20
        return {"ms": 1.0, "low": 1.0, "host_ms": 1.0}

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    for name in ("of_linear", "of_step"):
        monkeypatch.setattr(gpu.Bench, name, slow)
    gpu.main(["--dry-run", "--out", str(tmp_path), "--seconds", "290"])
    results = json.loads((tmp_path / "gpu.json").read_text())
    measured = [(row["geometry"], row["candidate"]) for row in results["steps"] if "ms" in row]
    for geometry in gpu.steps.GEOMETRIES:
        assert [name for of, name in measured if of == geometry][:3] == ["bf16 eager", "bf16 compiled", "ours W8A8"]
    assert now[0] < 320 and any("ms" in row for row in results["linears"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_what_goes(gpu: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="There is no CUDA device"):
        gpu.main(["--out", str(tmp_path)])


def test_the_script_is_sound_and_its_files_exist() -> None:
    script = BENCHMARKS / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    named = re.findall(r"\b(?:tests|benchmarks)/[\w/]+\.py", script.read_text())
    assert len(named) == 7 and all((BENCHMARKS.parent / name).is_file() for name in named)
    seconds = sum(int(n) for n in re.findall(r"timeout (\d+)", script.read_text()))
    assert seconds < 8 * 60

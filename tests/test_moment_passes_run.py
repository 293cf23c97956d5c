"""calibration.moment_bytes through runs: several passes, kills, other budgets."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from viditq.engine.partials import Partials
from viditq.errors import UserError
from viditq.experiment import build
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.stages import calibrate

Run = Callable[..., Any]
GPTQ = ["quant/rounding=gptq", "quant/smoothing=none", "stages=[prompts,calibrate]"]


class Killed(Exception):
    """In place of a SIGKILL."""


def stats_file(cache: Path) -> Path:
    (entry,) = (cache / "stats").iterdir()
    return entry / "stats.safetensors"


def calibrated(cache: Path) -> dict[str, torch.Tensor]:
    return CalibrationStats.load(stats_file(cache)).to_tensors()


def sum_bytes(stats: dict[str, torch.Tensor]) -> list[int]:
    return [tensor.nbytes for key, tensor in stats.items() if "/sum/" in key]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def killed_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """The run ends with that many states saved."""
    save, count = Partials.save, 0

    def once(self: Partials, *args: Any) -> None:
        nonlocal count
        save(self, *args)
        count += 1
        if count == saves:
            raise Killed

    monkeypatch.setattr(Partials, "save", once)


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The statistics of a single pass."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder / "run", folder / "cache", *GPTQ)
    assert [path.name for path in stats_file(folder / "cache").parent.glob("*.safetensors")] == ["stats.safetensors"]
    return calibrated(folder / "cache")


def test_passes_give_what_one_pass_gives(
    run: Run, whole: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest layers do not fit the budget and are alone in theirs."""
    budget = max(sum_bytes(whole)) - 1
    run(tmp_path / "run", tmp_path / "cache", *GPTQ, f"calibration.moment_bytes={budget}")
    told = " ".join(capsys.readouterr().out.split())
    alone = rf"moments of 1 of \d+ layers \(calibration.moment_bytes={budget:,}\), as those of \S+ alone take"
    assert len(re.findall(alone, told)) == 4
    entry = stats_file(tmp_path / "cache").parent
    files = [*entry.glob("stats.moments-*.safetensors")]
    assert len(files) >= 4 and all(file.stat().st_size < budget + 10_000 for file in files)
    assert same(calibrated(tmp_path / "cache"), whole)
    assert not [path for path in entry.iterdir() if path.is_dir()]


@pytest.mark.parametrize("saves", [1, pytest.param(3, marks=pytest.mark.slow)])  # slow: in a later pass
def test_a_killed_calibration_goes_on_at_the_pass_that_was_open(
    run: Run, whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    """In the first pass, then in a later one; each saves two states."""
    budget = sum(sum_bytes(whole)) // 2
    arguments = (tmp_path / "run", tmp_path / "cache", *GPTQ)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, saves)
        run(*arguments, f"calibration.moment_bytes={budget}")
    (entry,) = (tmp_path / "cache" / "stats").iterdir()
    (state,) = entry.rglob("partial-*.safetensors")
    kept = state.read_bytes()
    seen: list[bytes] = []

    def load(self: Partials, rank: int, load: Any = Partials.load) -> Any:
        seen.append(self.path(rank).read_bytes() if self.path(rank).is_file() else b"")
        return load(self, rank)

    monkeypatch.setattr(Partials, "load", load)
    run(*arguments, f"calibration.moment_bytes={4 * budget}")  # a larger budget finishes the open pass as it is
    assert seen[0] == kept and same(calibrated(tmp_path / "cache"), whole)
    assert not [*entry.rglob("partial-*")] and not [path for path in entry.iterdir() if path.is_dir()]


@pytest.mark.parametrize("saves", [1, pytest.param(3, marks=pytest.mark.slow)])  # slow: in a later pass
def test_a_smaller_budget_begins_the_open_pass_anew(
    run: Run, whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    budget = sum(sum_bytes(whole)) // (1 if saves == 1 else 2)
    arguments = (tmp_path / "run", tmp_path / "cache", *GPTQ)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, saves)
        run(*arguments, f"calibration.moment_bytes={budget}")
    run(*arguments, f"calibration.moment_bytes={budget // 2}")
    entry = stats_file(tmp_path / "cache").parent
    assert same(calibrated(tmp_path / "cache"), whole) and not [*entry.rglob("partial-*")]


def test_a_lost_file_is_made_again(
    run: Run, whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = sum(sum_bytes(whole)) // 2
    arguments = (tmp_path / "run", tmp_path / "cache", *GPTQ, f"calibration.moment_bytes={budget}")
    run(*arguments)
    file = stats_file(tmp_path / "cache")
    first, *_ = sorted(file.parent.glob("stats.moments-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(UserError, match="lack the second moments of"):
        CalibrationStats.load(file)
    passes: list[Any] = []
    monkeypatch.setattr(calibrate, "_observe", lambda *a, go=calibrate._observe: passes.append(a[1]) or go(*a))
    run(*arguments)
    assert [one.file for one in passes] == [first] and same(calibrated(tmp_path / "cache"), whole)


def test_no_budget_at_all_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"calibration\.moment_bytes=0 must be a whole number of at least 1"):
        run(tmp_path / "run", tmp_path / "cache", *GPTQ, "calibration.moment_bytes=0")


def test_a_budget_may_have_a_unit(configure: Callable[..., Any], shrunk: list[str]) -> None:
    found = build(configure(*shrunk, "calibration.moment_bytes=1.5GB", "calibration.block_input_bytes=2MiB"))
    assert (found.moment_bytes, found.block_input_bytes) == (1_500_000_000, 2**21)
    plain = build(configure(*shrunk, f"calibration.block_input_bytes={2**21}"))
    assert found.tracked == plain.tracked
    with pytest.raises(UserError, match=r"calibration\.moment_bytes='lots' is no number of bytes: give such as"):
        build(configure(*shrunk, "calibration.moment_bytes=lots"))

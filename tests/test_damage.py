"""Files that were cut off are noticed, named, and made again; what killed runs left behind is removed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from viditq.files import is_whole, write_json

Run = Callable[..., dict[str, Any] | None]
# Files of the run's folder, then of the shared cache.
OF_RUN = [
    "metrics.json",
    "per_prompt.json",
    "seconds.json",
    "seconds_on.json",
    "comparison.png",
    "incoherence.json",
    "incoherence.png",
    "samples/000001.png",
    "quantized/plan.json",
    "quantized/meta.json",
    "quantized/model.safetensors",
]
TIMES = ("seconds.json", "seconds_on.json")  # of work that is not done again
OF_CACHE = [
    "reference/*/000000.png",
    "stats/*/stats.safetensors",
    "reference/*/seconds.json",
    "prompts/*/*.safetensors",
    "reference/*/key.json",
    "stats/*/key.json",
    "noise_floor/*/results.safetensors",
]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Everything that an undisturbed run would repeat."""
    return {key: value for key, value in metrics.items() if key != "seconds"}


def expected(finished_run: Path) -> dict[str, Any]:
    return numbers(json.loads((finished_run / "metrics.json").read_text()))


# Slow: files that are read by what reads another of these.
SECOND = ("per_prompt.json", "seconds_on.json", "comparison.png", "incoherence.json", "quantized/meta.json")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SECOND)) for n in OF_RUN])
def test_truncated_file_of_a_run(
    name: str, run: Run, run_copy: Path, finished_run: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(run_copy / name)
    assert numbers(run(run_copy, shared_cache) or {}) == expected(finished_run)
    assert f"{run_copy / name} is damaged and will be made again" in capsys.readouterr().out
    assert is_whole(run_copy / name) or name in TIMES


@pytest.fixture(scope="module")
def own_cache(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one run alone; the shared one has entries of other tests, in whose place nothing is looked for."""
    folder = tmp_path_factory.mktemp("own")
    run(folder / "run", folder / "cache")
    return folder / "cache"


# Slow: the other files; each is looked at by what reads it, so that two stand for all in the usual run.
@pytest.mark.parametrize(
    "pattern", [pytest.param(p, marks=[pytest.mark.slow] * (i > 1)) for i, p in enumerate(OF_CACHE)]
)
def test_truncated_files_of_the_cache(
    pattern: str, run: Run, finished_run: Path, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Path(shutil.copytree(own_cache, tmp_path / "cache"))
    files = list(cache.glob(pattern))
    assert files
    for file in files:
        truncate(file)
    metrics = run(tmp_path / "run", cache)
    assert numbers(metrics or {}) == expected(finished_run)
    out = capsys.readouterr().out
    assert [file for file in files if f"{file} is damaged and will be made again" in out] == files
    assert all(is_whole(file) or file.name in TIMES for file in files)


def test_leftovers_of_killed_runs_are_removed(run: Run, run_copy: Path, own_cache: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(own_cache, tmp_path / "cache"))
    stats = next(cache.glob("stats/*/stats.safetensors"))
    left = [
        run_copy / ".metrics.json.77.tmp",
        run_copy / "samples" / ".000001.png.77.tmp",
        next(cache.glob("reference/*/000000.png")).with_name(".000000.png.77.tmp"),
        stats.with_name("stats.safetensors.77.tmp"),
        stats.with_name("partial-1.safetensors"),
        stats.parent / "with-abc" / "partial-0.safetensors",  # of a pass that wanted inputs of blocks too
    ]
    left[-1].parent.mkdir()
    for file in left:
        file.write_bytes(b"half")
    (run_copy / "quantized.77.tmp").mkdir()
    run(run_copy, cache)
    assert not [file for file in left if file.exists()] and not left[-1].parent.exists()
    assert not list(run_copy.rglob("*.tmp"))


@pytest.mark.parametrize("length", range(0, 40))
def test_no_prefix_of_a_json_file_is_whole(length: int, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, 2], "b": {"c": "d"}})
    content = (tmp_path / "a.json").read_bytes()
    (tmp_path / "cut.json").write_bytes(content[:length])
    assert is_whole(tmp_path / "a.json")
    assert is_whole(tmp_path / "cut.json") == (content[:length].strip() == content.strip())


@pytest.mark.parametrize("name", ["samples/000000.png", "quantized/model.safetensors"])
def test_no_prefix_of_a_binary_file_is_whole(name: str, finished_run: Path, tmp_path: Path) -> None:
    content = (finished_run / name).read_bytes()
    cut = tmp_path / f"cut{Path(name).suffix}"
    for length in [*range(0, 64), *range(64, len(content), max(1, len(content) // 200)), len(content) - 1]:
        cut.write_bytes(content[:length])
        assert not is_whole(cut), length
    assert is_whole(finished_run / name)

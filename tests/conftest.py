"""Configurations, runs and copies of the shipped models that the whole-program tests share."""

import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports transformers: tests use no network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch: the tensors are too small for more
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from omegaconf import DictConfig
from shrunk import SHRUNK, compose_config, run_shrunk

from viditq.assets import SHIPPED

LONGEST = (
    *("test_processes.py", "test_sweep.py", "test_configs.py", "test_estimate.py", "test_bad_input.py", "test_zoo.py"),
    *("test_search.py", "test_run.py", "test_native_attention.py", "test_learn.py", "test_best_run.py"),
    *("test_damage.py", "test_corrected_run.py", "test_integer_backends.py", "test_comfy_file.py", "test_fit.py"),
    *("test_cli.py", "test_train_tiny.py", "test_folding.py", "test_comfyui.py", "test_trial.py", "test_finished.py"),
    *("test_kills.py", "test_compiled_run.py", "test_leaderboard.py", "test_external_run.py", "test_offload.py"),
    *("test_vllm_omni.py", "test_own_classes.py", "test_quickstart.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest (over 10 s) come first, so that the processes that share the files end together.

    As long as xdist is told to leave the order (`--no-loadscope-reorder` in the Makefile).
    """
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """What the libraries make when they are imported is no garbage, and would be looked through again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    """At the end of Python triton reports what is not collected as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> None:
    """Letting go of a model collects garbage, which takes long where all that was imported is looked through."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 50)  # Python's own 700, 10, 10 took a seventh of what composing and building take


@pytest.fixture(scope="module", autouse=True)
def packages_are_looked_through_once() -> None:
    """For each trainer Lightning looks through all installed packages (30 ms), of which no test installs one."""
    registry: Any = sys.modules.get("lightning.fabric.utilities.registry")
    if registry is not None and not hasattr(registry.entry_points, "cache_info"):
        registry.entry_points = cache(registry.entry_points)


@pytest.fixture(autouse=True)
def logged_lines_can_be_caught() -> None:
    """A run in this process prints what viditq logs itself, which keeps it from `caplog`."""
    logging.getLogger("viditq").propagate = True


@pytest.fixture(scope="session")
def configure() -> Callable[..., DictConfig]:
    """Overrides -> configuration."""
    return compose_config


@pytest.fixture(scope="session")
def shrunk() -> list[str]:
    """Overrides of the shrunk smoke experiment."""
    return SHRUNK


@pytest.fixture(scope="session")
def run() -> Callable[..., dict[str, Any] | None]:
    """(folder, cache, *overrides) -> metrics of the shrunk smoke experiment."""
    return run_shrunk


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed shrunk run, only to be read; its cache, empty before, is `shared_cache`."""
    folder = tmp_path_factory.mktemp("runs") / "finished run"
    run_shrunk(folder, folder.parent / "cache", "benchmark.max_seconds=null")
    return folder


@pytest.fixture(scope="session")
def shared_cache(finished_run: Path) -> Path:
    """A cache folder with the embeddings, reference samples and statistics of the shrunk run."""
    return finished_run.parent / "cache"


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """A copy of the shipped image pipeline that a test may damage."""
    return Path(shutil.copytree(SHIPPED / "tiny_image", tmp_path / "model"))

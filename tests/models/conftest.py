"""What the tests of models share: folders of tiny random pipelines."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from zoo.saving import save


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """Each load of a pipeline collects garbage, which takes longer than a tiny run with all the libraries' modules."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], Any]], Path]:
    """Builder -> the folder of its pipeline, saved once."""
    root, saved = tmp_path_factory.mktemp("zoo"), {}

    def folder_of(build: Callable[[], Any]) -> Path:
        if build not in saved:
            saved[build] = root / f"{build.__module__}.{build.__name__}"
            save(build, saved[build])
        return saved[build]

    return folder_of

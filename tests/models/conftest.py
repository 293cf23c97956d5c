"""What the tests of models share: folders of tiny random pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zoo.saving import save


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

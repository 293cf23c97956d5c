"""One headless Chromium for all browser tests of a session."""

from collections.abc import Iterator

import pytest
from chromium import PROGRAM, Chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """Skips where no Chromium is installed."""
    if PROGRAM is None:
        pytest.skip("no chromium on the PATH: the page is not opened in a browser")
    started = Chromium(tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()

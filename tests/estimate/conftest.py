"""Estimates time every backend that can run, and triton's interpreter would take minutes for a step of a model."""

import pytest


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU, where nobody asks for it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

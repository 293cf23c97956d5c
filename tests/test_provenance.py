"""What a report gives as the command that repeats a run."""

from collections.abc import Mapping
from typing import Any

import pytest

from viditq.provenance import alone


@pytest.mark.parametrize(
    ("sweeper", "words"),
    [({"params": {"edge": {"low": 0.2}}}, ["hydra.mode=RUN"]), ({"params": None}, []), ({}, [])],
)
def test_a_trial_of_a_tuning_is_repeated_as_one_run(sweeper: Mapping[str, Any], words: list[str]) -> None:
    """Its experiment describes a tuning, which refuses the trial's own values."""
    assert alone(sweeper) == words

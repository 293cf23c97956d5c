"""States of an unfinished pass: whatever was killed when, each batch counts once."""

from pathlib import Path

import pytest
import torch

from viditq.engine.partials import Partial, Partials, State
from viditq.errors import UserError


def add(mine: State, theirs: State) -> State:
    return {key: value + theirs[key] for key, value in mine.items()}


def partial_of(*batches: int) -> Partial:
    """Sums 10^batch over its batches: each digit says how often a batch was counted."""
    return Partial(frozenset(batches), {"sum": torch.tensor(sum(10**b for b in batches))})


@pytest.fixture
def partials(tmp_path: Path) -> Partials:
    return Partials(tmp_path, add)


def test_processes_meet_in_one_file(partials: Partials) -> None:
    partials.save(0, partial_of(0, 2))
    partials.save(1, partial_of(1))
    partials.save(2, partial_of(3, 5))
    assert partials.compact() == {0, 1, 2, 3, 5}
    assert [path.name for path in partials.folder.iterdir()] == ["partial-0.safetensors"]
    assert int(partials.load(0).state["sum"]) == 101111


def test_killed_between_compacting_and_deleting(partials: Partials) -> None:
    partials.save(0, partial_of(0, 1, 2))
    partials.save(1, partial_of(1))
    partials.save(2, partial_of(2))
    assert int(partials.gathered().state["sum"]) == 111
    assert partials.compact() == {0, 1, 2}


def test_nothing_yet(partials: Partials) -> None:
    assert partials.compact() == frozenset() and partials.load(0).state == {}
    assert not list(partials.folder.iterdir())


def test_damaged(partials: Partials) -> None:
    partials.save(0, partial_of(0))
    partials.path(0).write_bytes(partials.path(0).read_bytes()[:-3])
    with pytest.raises(UserError, match="Delete it"):
        partials.compact()


def test_one_file_that_holds_everything(partials: Partials) -> None:
    assert partials.only() is None
    partials.save(1, Partial(frozenset({0}), {"sum": torch.tensor(1)}))
    assert partials.only() == partials.path(1)
    partials.save(0, Partial(frozenset({1}), {"sum": torch.tensor(10)}))
    assert partials.only() is None

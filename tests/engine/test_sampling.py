"""Batches that a resumed run repeats."""

import pytest

from viditq.engine.sampling import batches_of


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_batches_cover_every_index_once_in_order(batch_size: int) -> None:
    batches = batches_of(10, batch_size)
    assert [index for batch in batches for index in batch] == list(range(10))
    assert all(len(batch) == batch_size for batch in batches[:-1])

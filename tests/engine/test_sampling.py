"""Batches that a resumed run repeats."""

from pathlib import Path

import pytest
import torch

from viditq.engine.sampling import batches_of, load_partial
from viditq.errors import UserError
from viditq.files import write_tensors


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_batches_cover_every_index_once_in_order(batch_size: int) -> None:
    batches = batches_of(10, batch_size)
    assert [index for batch in batches for index in batch] == list(range(10))
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_partial_statistics_know_how_far_they_are(tmp_path: Path) -> None:
    file = tmp_path / "partial.safetensors"
    write_tensors(file, {"a": torch.ones(2)}, {"num_done": "3"})
    num_done, state = load_partial(file)
    assert num_done == 3 and torch.equal(state["a"], torch.ones(2))
    write_tensors(file, {"a": torch.ones(2)})
    with pytest.raises(UserError, match="Delete it"):
        load_partial(file)

"""A batch checks itself."""

import pytest
import torch

from viditq.metrics.batch import EvalBatch, to_unit


@pytest.mark.parametrize("field", ["samples", "references", "prompts", "index", "data"])
def test_one_entry_too_few_is_noticed(field, pairs):
    fields = dict(pairs(3).__dict__)
    fields[field] = fields[field][:2]
    with pytest.raises(AssertionError):
        EvalBatch(**fields)


def test_float_clips_are_noticed(pairs):
    batch = pairs(2)
    with pytest.raises(AssertionError, match="uint8"):
        EvalBatch(to_unit(batch.samples), batch.references, batch.prompts, batch.index)
    assert torch.equal((to_unit(batch.samples) * 255).round().byte(), batch.samples)

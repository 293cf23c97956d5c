"""A batch checks itself."""

from dataclasses import replace

import pytest
import torch

from viditq.metrics.batch import EvalBatch, to_unit


@pytest.mark.parametrize("field", ["samples", "references", "prompts", "index", "data"])
def test_one_entry_too_few_is_noticed(field, pairs):
    fields = dict(pairs(3).__dict__)
    fields[field] = fields[field][:2]
    with pytest.raises(AssertionError):
        EvalBatch(**fields)


def test_sound_is_of_each_pair_moves_with_the_clips_and_checks_itself(pairs):
    batch = pairs(3)
    with pytest.raises(AssertionError, match="one sound per pair"):
        replace(batch, sound=pairs(2).sound)
    moved = batch.to(torch.device("meta"))
    assert moved.samples.is_meta and moved.sound.references.is_meta and moved.sound.rate == batch.sound.rate
    with pytest.raises(AssertionError, match="int16"):
        replace(batch.sound, samples=batch.sound.samples.float())
    with pytest.raises(AssertionError, match="differ in shape"):
        replace(batch.sound, samples=batch.sound.samples[..., 1:])


def test_float_clips_are_noticed(pairs):
    batch = pairs(2)
    with pytest.raises(AssertionError, match="uint8"):
        EvalBatch(to_unit(batch.samples), batch.references, batch.prompts, batch.index)
    assert torch.equal((to_unit(batch.samples) * 255).round().byte(), batch.samples)

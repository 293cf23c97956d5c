"""Batches that a resumed run repeats, and how often what they have summed up is saved."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from viditq.engine import sampling
from viditq.engine.partials import Partial
from viditq.engine.sampling import Accumulation, batches_of


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_batches_cover_every_index_once_in_order(batch_size: int) -> None:
    batches = batches_of(10, batch_size)
    assert [index for batch in batches for index in batch] == list(range(10))
    assert all(len(batch) == batch_size for batch in batches[:-1])


class Told(Accumulation):
    """Keeps the groups of prompts that it is told of, and what it saves; a batch takes 1 s, a save 0.11."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
        self.groups: list[list[int]] = []
        self.saved: list[list[int]] = []
        self.sampled: list[list[int]] = []
        self.clock = 0.0
        monkeypatch.setattr(sampling, "time", SimpleNamespace(monotonic=lambda: self.clock))
        monkeypatch.setattr(sampling, "denoise", self.sample)
        partials = SimpleNamespace(load=lambda rank: Partial(frozenset(), {}), save=self.save)

        def embeds(index: int) -> dict[str, Tensor]:
            return {"prompt_embeds": torch.zeros(1, lengths[index], 4)}

        accumulator: Any = nullcontext()
        accumulator.state = dict
        pipeline: Any = SimpleNamespace(components={})
        adapter: Any = SimpleNamespace(list_embeds=False)
        super().__init__(adapter, pipeline, embeds, 0, accumulator=accumulator, partials=partials, rank=0)

    def noise_indices(self, indices: list[int]) -> list[int]:
        self.groups.append(indices)
        return [100 + i for i in indices]

    def sample(self, adapter: Any, pipeline: Any, embeds: list[Any], indices: list[int], seed: int) -> None:
        assert len({one["prompt_embeds"].shape for one in embeds}) == 1
        self.sampled.append(indices)
        self.clock += 1

    def save(self, rank: int, partial: Partial) -> None:
        self.saved.append(sorted(partial.done))
        self.clock += 0.11


def test_prompts_of_several_lengths_are_told_as_they_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Told(monkeypatch, [3, 5, 3, 4, 5])
    module.predict_step((0, [0, 1, 2, 3, 4]), 0)
    assert module.groups == [[0, 2], [1, 4], [3]]
    assert module.sampled == [[100, 102], [101, 104], [103]]


def test_saving_takes_a_twentieth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Told(monkeypatch, [3] * 9)
    for number in range(9):
        module.predict_step((number, [number]), number)
    assert [len(done) for done in module.saved] == [1, 4, 7]
    module.on_predict_end()
    module.on_predict_end()
    assert [len(done) for done in module.saved] == [1, 4, 7, 9]


def test_sigterm_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Told(monkeypatch, [3] * 3)
    module._trainer = SimpleNamespace(received_sigterm=False)
    for number in range(3):
        module.on_predict_batch_start(None, number)
        module.predict_step((number, [number]), number)
    assert module.saved == [[0]]
    module._trainer.received_sigterm = True
    with pytest.raises(SystemExit):
        module.on_predict_batch_start(None, 3)
    assert module.saved == [[0], [0, 1, 2]]

"""Models without weights stay without, whatever their size."""

import pytest
import torch
from torch import Tensor, nn

from viditq.estimate.hollow import answer_from_meta, hollowed, on_meta, twin_on_meta

WIDTH = 2**14  # half a gigabyte a weight


class Large(nn.Module):
    """`looks`: at the values of its mask."""

    def __init__(self, looks: bool = False) -> None:
        super().__init__()
        self.first = self.tied = nn.Linear(WIDTH, WIDTH)
        self.looks = looks
        self.register_buffer("table", torch.arange(3.0))

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, other: Tensor | None = None
    ) -> dict[str, Tensor]:
        if attention_mask is not None and attention_mask.all():
            return {}
        if other is not None and other.all():
            return {"small": x}
        return {"out": self.tied(self.first(x)) + self.table[0]}


@pytest.fixture
def large() -> nn.Module:
    return hollowed(on_meta(Large, torch.bfloat16))


def test_a_twin_of_a_hollow_module_takes_no_memory(large):
    twin = twin_on_meta(large)
    assert {t.device.type for t in (*twin.parameters(), *twin.buffers())} == {"meta"}
    assert twin.first.weight is twin.tied.weight and twin.first.weight.shape == (WIDTH, WIDTH)
    assert large.first.weight.device.type == "cpu" and large.first.weight.untyped_storage().nbytes() == 2
    assert large.table.tolist() == [0, 1, 2]


def test_it_answers_with_shapes_from_meta(large):
    answer_from_meta(large)
    x = torch.zeros(1, dtype=torch.bfloat16).expand(2, 5, WIDTH)
    for arguments in ({}, {"attention_mask": torch.ones(2, 5)}):
        out = large(x, **arguments)["out"]
        assert out.shape == x.shape and out.dtype == x.dtype and out.untyped_storage().nbytes() == 2
    assert large(x, torch.ones(2, 5))["out"].shape == x.shape


def test_what_looks_at_values_is_computed(large):
    answer_from_meta(large)
    x = torch.ones(2, 3)
    assert torch.equal(large(x, other=torch.ones(1))["small"], x)

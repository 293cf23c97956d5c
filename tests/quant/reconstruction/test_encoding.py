"""What is kept of a block's input, as bytes."""

import pytest
import torch
from safetensors.torch import load, save

from viditq.mapped import NAMES
from viditq.quant.reconstruction.encoding import encoded

META = '{"structure": "café", "rows": 2}'


def test_one_number_for_all_prompts_of_a_batch() -> None:
    tensors = {f"{n}": torch.tensor(3).expand(n) for n in (1, 4)}
    assert all(torch.equal(found, tensors[name]) for name, found in load(encoded(tensors, META)).items())


@pytest.mark.parametrize("dtype", [*NAMES])
def test_the_library_reads_what_is_written(dtype: torch.dtype) -> None:
    numbers = torch.arange(24).reshape(2, 3, 4)
    tensors = {
        "0": numbers.to(dtype),
        "1": numbers.permute(2, 0, 1).to(dtype)[1:3],
        "2": torch.tensor(3).to(dtype),
        "3": torch.zeros(0, 5, dtype=dtype),
        "4": torch.arange(5, dtype=torch.uint8),
        "5": torch.arange(3) * 2,
    }
    content = encoded(tensors, META)
    found = load(content)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    library = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"call": META})
    assert len(content) == len(library)

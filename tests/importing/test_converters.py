"""Original releases that diffusers converts: its converters say where rows go, and so does what viditq reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from original_names import BESIDE, ORIGINALS, on_meta, original
from torch import Tensor

from viditq.errors import UserError
from viditq.export.releases import RELEASES
from viditq.importing.origins import origins_of, rows_of

OTHERS = {  # classes with a converter that no pipeline here samples with, or whose release has diffusers' own names
    "ErnieImageTransformer2DModel",
    "Flux3Transformer2DModel",
    "MiniMaxH3Transformer3DModel",
    "MotifVideoTransformer3DModel",
    "WanAnimate2Transformer3DModel",
}


def numbered(denoiser: Any) -> dict[str, Tensor]:
    """Of each tensor one number a row (of one row, each number in it), all different."""
    start, out = 0, dict[str, Tensor]()
    for name, tensor in denoiser.state_dict().items():
        rows = tensor.ndim < 2 or len(tensor) == 1 or name.endswith("scale_shift_table")
        shape = tensor.shape if rows else torch.Size([len(tensor), *[1] * (tensor.ndim - 1)])
        out[name] = torch.arange(start, start + shape.numel(), dtype=torch.float64).view(shape)
        start += shape.numel()
    return out


def read(denoiser: Any, released: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    origins, left_out = origins_of(denoiser, released, "its original release")
    return {
        name: rows.of(released[source])
        for source, origin in origins.items()
        for name, rows in rows_of(released[source], origin, denoiser).items()
    }, left_out


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "mochi")) for n in ORIGINALS])
def test_rows_go_where_they_came_from(name: str) -> None:
    denoiser = on_meta(name)
    state = numbered(denoiser)
    released = original(name, state)
    assert name == "hidream" or not released.keys() <= state.keys()
    found, left_out = read(denoiser, released)
    assert found.keys() == state.keys() and set(left_out) == set(BESIDE.get(name, ()))
    assert [n for n in state if not torch.equal(found[n], state[n])] == []


def test_every_converter_is_tried() -> None:
    denoisers = {name for name in SINGLE_FILE_LOADABLE_CLASSES if "Transformer" in name}
    tried = {type(on_meta(name)).__name__ for name in ORIGINALS}
    assert denoisers == tried | OTHERS | (RELEASES.keys() & denoisers)


@pytest.mark.parametrize("name", ["flux2_klein", "krea2", "sana"])
@pytest.mark.parametrize("kind", ["missing", "unknown", "another model"])
def test_what_is_not_the_class_is_refused(name: str, kind: str) -> None:
    denoiser = on_meta(name)
    released = original(name, numbered(denoiser))
    if kind == "missing":
        del released[next(key for key in reversed(released) if key not in BESIDE.get(name, ()))]
    elif kind == "unknown":
        released["something.else.weight"] = torch.ones(3, 3)
    else:
        released = original("aura_flow", numbered(on_meta("aura_flow")))
    with pytest.raises(UserError, match=r"the file is no .* of its original release: "):
        read(denoiser, released)


def test_a_class_without_a_converter_is_read_under_its_own_names_alone() -> None:
    with init_empty_weights():
        denoiser = diffusers.OvisImageTransformer2DModel(num_layers=1, num_single_layers=1)
    state = denoiser.state_dict()
    assert read(denoiser, state)[0].keys() == state.keys()
    with pytest.raises(UserError, match="under diffusers' names, the only ones known: it has no"):
        read(denoiser, {f"blocks.{name}": tensor for name, tensor in state.items()})

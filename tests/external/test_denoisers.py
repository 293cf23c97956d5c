"""Which Linears another library is told to leave in float, and what it reads."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from viditq.errors import UserError
from viditq.external.denoisers import check_source, skipped_words
from viditq.external.policy import ExternalQuantization
from viditq.external.told import quantized_linears
from viditq.quant.sizes import held_bytes

POLICY = ExternalQuantization("theirs", {"_target_": "x"}, 8, 8, [], skips="skip")
KEPT = ("proj", "out")


def adapter_of(*parts: str) -> Any:
    """Of denoisers with a Linear `proj` in a block, quantized, and `proj` and `out` beside it, kept in float."""
    one = {
        name: nn.ModuleDict({"block": nn.ModuleDict({"proj": nn.Linear(2, 2)})} | {n: nn.Linear(2, 2) for n in KEPT})
        for name in parts
    }
    whole = nn.ModuleDict(one) if len(parts) > 1 else one[parts[0]]
    return SimpleNamespace(
        name="m",
        denoiser_names=list(parts),
        build_denoiser=lambda: whole,
        linear_roles=lambda names: {n: "mlp" if "block." in n else "float" for n in names},
    )


@pytest.mark.parametrize("parts", [("transformer",), ("transformer", "transformer_2")])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, ["proj", "out"]),
        ({"skip_as": "{name}.weight"}, ["proj.weight", "out.weight"]),
        ({"skip_as": "{last}"}, ["out"]),  # proj would leave block.proj in float too
        ({"keep_float": False}, []),
        ({"skips": None}, []),
    ],
)
def test_names_are_of_the_part_alone_as_the_library_writes_them(parts: Any, how: Any, words: list[str]) -> None:
    for part in parts:
        assert skipped_words(adapter_of(*parts), replace(POLICY, **how), part) == words


def test_what_a_wrapped_tensor_is_made_of_counts() -> None:
    linear = nn.Linear(4, 8)
    linear.weight = nn.Parameter(TwoTensor(torch.zeros(8, 4), torch.zeros(8, 4)), requires_grad=False)
    assert held_bytes(linear) == 2 * 8 * 4 * 4 + 8 * 4
    assert quantized_linears(nn.ModuleDict({"a": linear, "b": nn.Linear(4, 4)}), ["a", "b"]) == ["a"]


def test_a_denoiser_of_another_model_is_told() -> None:
    with pytest.raises(UserError, match="has no b, which the float model has"):
        quantized_linears(nn.ModuleDict({"a": nn.Linear(4, 4)}), ["a", "b"])


def test_a_folder_without_one_of_the_denoisers_is_refused(tmp_path: Any) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(
        '{"_class_name": "X", "quantization_config": {"quant_method": "rounded"}}'
    )
    adapter = adapter_of("transformer", "transformer_2")
    adapter.index = lambda: {key: ["diffusers", "PixArtTransformer2DModel"] for key in adapter.denoiser_names}
    policy = ExternalQuantization("external", None, None, 16, [], path=str(tmp_path), takes="folder")
    assert policy.who == "rounded" and policy.packages == []
    with pytest.raises(UserError, match="holds no transformer_2"):
        check_source(adapter, policy)

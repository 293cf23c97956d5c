"""Whole steps of denoisers on a GPU, with random weights: in bfloat16, in the rivals' formats and in ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from backends import KEPT_FLOAT
from gpu_linears import FP8, FP8_BACKEND, torchao_quantized
from torch import Tensor, nn

from viditq.fusion.install import ADAPTERS, fuse_blocks
from viditq.models.stdit import STDiT
from viditq.quant import QuantSpec, Recipe, linear_names, quantize_denoiser

Inputs = dict[str, Any]
CompileBlock = Callable[[nn.Module], object]
HALF = torch.bfloat16


def pixart(tiny: bool) -> tuple[nn.Module, Inputs]:
    """PixArt-XL at 1024 px: 4,096 tokens, two guidance branches, 120 caption tokens."""
    size, small = (
        (8, {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}) if tiny else (128, {})
    )
    model = diffusers.PixArtTransformer2DModel(
        num_layers=2 if tiny else 28, sample_size=size, caption_channels=4096, use_additional_conditions=False, **small
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, size, size),
        "encoder_hidden_states": torch.randn(2, 120, 4096),
        "encoder_attention_mask": torch.ones(2, 120),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


def stdit(tiny: bool) -> tuple[nn.Module, Inputs]:
    """STDiT-XL/2: 16 frames of 512 x 512 pixels (1,024 tokens each), two guidance branches, 120 caption tokens."""
    size, frames = (8, 3) if tiny else (64, 16)
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16} if tiny else {"num_layers": 28}
    model = STDiT(sample_size=size, num_frames=frames, **small)
    inputs = {
        "hidden_states": torch.randn(2, 4, frames, size, size),
        "encoder_hidden_states": torch.randn(2, 120, 4096),
        "encoder_attention_mask": torch.ones(2, 120),
    }
    return model, inputs


def wan(tiny: bool) -> tuple[nn.Module, Inputs]:
    """Wan 2.1 1.3B: 81 frames of 480 x 832 pixels, 32,760 tokens, one guidance branch, 512 text tokens."""
    shape = (3, 8, 8) if tiny else (21, 60, 104)
    small: dict[str, int] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64}
    large = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
    model = diffusers.WanTransformer3DModel(**(small if tiny else large))  # type: ignore[arg-type]
    inputs = {"hidden_states": torch.randn(1, 16, *shape), "encoder_hidden_states": torch.randn(1, 512, 4096)}
    return model, inputs


GEOMETRIES = {"PixArt-XL, 1024 px": pixart, "STDiT-XL/2, 16 x 512 x 512": stdit, "Wan 2.1 1.3B, 81 x 480 x 832": wan}


def of_blocks(module: nn.Module, name: str) -> bool:
    """Whether this is a Linear of a block that is quantized."""
    return isinstance(module, nn.Linear) and "block" in name and not any(part in name for part in KEPT_FLOAT)


def candidates(
    model: nn.Module, backend: str, compile_block: CompileBlock
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Name -> what makes the model, most wanted first. model: in bfloat16, on its device; it is copied."""

    def compiled(made: nn.Module) -> nn.Module:
        for module in made.modules():
            if type(module) in (*ADAPTERS, *ADAPTERS.values()):
                compile_block(module)
        return made

    def ours(bits: int) -> nn.Module:
        recipe = Recipe(QuantSpec(bits, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True))
        return made_by(recipe, backend)

    def made_by(recipe: Recipe, backend: str) -> nn.Module:
        made = copy.deepcopy(model)
        names = [name for name in linear_names(made) if of_blocks(made.get_submodule(name), name)]
        quantize_denoiser(made, recipe.resolve(names), None, backend, 1000.0)
        fuse_blocks(made)
        return made

    yield "bf16 eager", lambda: copy.deepcopy(model)
    yield "bf16 compiled", lambda: compiled(copy.deepcopy(model))
    yield "ours W8A8", lambda: ours(8)
    yield "ours W8A8, compiled", lambda: compiled(ours(8))
    yield "torchao int8, compiled", lambda: compiled(torchao_quantized(copy.deepcopy(model), "int8", of_blocks))
    yield "ours W4A8", lambda: ours(4)
    yield "torchao fp8, compiled", lambda: compiled(torchao_quantized(copy.deepcopy(model), "fp8", of_blocks))
    yield "ours W4A8, compiled", lambda: compiled(ours(4))
    yield "ours FP8, compiled", lambda: compiled(made_by(Recipe(*FP8), FP8_BACKEND))
    yield "ours FP8", lambda: made_by(Recipe(*FP8), FP8_BACKEND)


def call_of(model: nn.Module, inputs: Inputs, device: str) -> Callable[[], Tensor]:
    """One step."""
    given = {key: value.to(device, HALF) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    given["timestep"] = torch.full((len(inputs["hidden_states"]),), 500.0, device=device)
    return lambda: model(**given, return_dict=False)[0]

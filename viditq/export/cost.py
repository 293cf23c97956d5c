"""What quantizing layers again costs: their outputs and the denoiser's beside the artifact's, in one step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from viditq.export.float_weights import FloatWeights
from viditq.export.requantize import variant_again
from viditq.interop.folder import CHANGED
from viditq.loading import load_artifact
from viditq.models.adapter import ModelAdapter
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends import get_backend

PROMPT = "a red fox in the snow"


class _Enough(Exception):
    """The denoiser was called; what follows is not needed."""


@dataclass
class Cost:
    """Relative errors, norm of the difference over norm: of layers' outputs on equal inputs, and of the denoiser's."""

    layers: dict[str, float] = field(default_factory=dict)
    output: float = 0.0


@torch.no_grad()
def measure(artifact: Path, adapter: ModelAdapter, again: Mapping[str, LayerScheme], weights: FloatWeights) -> Cost:
    """again: layer -> its new scheme. Of several denoisers, the one that is called first.

    Raises UserError where the pipeline cannot be loaded: text encoders and samplers are those of the float model.
    """
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    pipeline = load_artifact(artifact, "fake", complete=True)
    pipeline.set_progress_bar_config(disable=True)
    denoiser, cost = adapter.denoiser_of(pipeline), Cost()
    parts = list(denoiser.values()) if isinstance(denoiser, nn.ModuleDict) else [denoiser]
    layers = {layer: denoiser.get_submodule(layer) for layer in again}

    def compared(called: Any, args: Any, kwargs: Any, out: Any) -> None:
        for hook in hooks:
            hook.remove()
        _replace_outputs(layers, again, weights, cost)
        cost.output = _relative(_sample(called(*args, **kwargs)), _sample(out))
        raise _Enough

    hooks = [part.register_forward_hook(compared, with_kwargs=True) for part in parts]
    prompt: dict[str, Any] = {"class_labels": [0]} if adapter.conditioning == "class" else {"prompt": PROMPT}
    with suppress(_Enough):
        pipeline(**prompt, generator=torch.Generator().manual_seed(0))
    return cost


def told_cost(
    artifact: Path, adapter: ModelAdapter, again: Mapping[str, LayerScheme], weights: FloatWeights
) -> dict[str, Any]:
    """What quantizing again cost, said and returned."""
    cost = measure(artifact, adapter, again, weights)
    worst = max(cost.layers, key=lambda layer: cost.layers[layer])
    mean = sum(cost.layers.values()) / len(cost.layers)
    said = (
        f"quantized again: {len(again)} Linears, to 8 bits a weight. Relative error against the artifact, one step of "
        f"one prompt: {cost.output:.2%} of the denoiser's output; of these layers' own {mean:.2%} in the mean, at "
        f"most {cost.layers[worst]:.2%} ({worst})"
    )
    print(said)
    return {"layers": len(again), "output_error": cost.output, "mean_layer_error": mean, CHANGED: said}


def _replace_outputs(
    layers: Mapping[str, nn.Module], again: Mapping[str, LayerScheme], weights: FloatWeights, cost: Cost
) -> None:
    """From now on layers return what their new codes make of their inputs; the error of each is noted once."""
    fake = get_backend("fake")

    def replaced(name: str, layer: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        variant = variant_again(weights, name, again[name])
        fake.prepare(variant)
        bias = None if layer.bias is None else layer.bias.float()
        new = fake.linear(variant, args[0].float(), bias).to(out.dtype)
        cost.layers.setdefault(name, _relative(new, out))
        return new

    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, out, name=name: replaced(name, module, args, out))


def _sample(out: Any) -> Tensor:
    """A denoiser's output, whatever it is wrapped in."""
    while not isinstance(out, Tensor):
        out = out[0] if isinstance(out, list | tuple) else next(iter(out.values()))
    return out


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())

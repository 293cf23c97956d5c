"""Where the models of a pipeline lie while it samples: on the device, or on the CPU but for what computes.

`model` moves one whole model at a time (diffusers' enable_model_cpu_offload), `sequential` one layer at a time. With
`disk`, on a CPU, the denoisers' weights lie in their files but for the layer that computes (`viditq.on_disk`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

from viditq.errors import UserError
from viditq.quant.correction.ptqd import Correction
from viditq.quant.execution.linear import QuantLinear

OFFLOADS, DISK = ("model", "sequential"), "disk"


def check_offload(offload: str | None, device: torch.device) -> None:
    """Raises UserError for an unknown value, or one that spares memory which this device does not have."""
    if offload is None:
        return
    if offload not in (*OFFLOADS, DISK):
        choices = ", ".join((*OFFLOADS, DISK))
        raise UserError(f"trainer.offload={offload!r} is unknown; choose null or one of {choices}.")
    if device.type == "cpu" and offload != DISK:
        raise UserError(
            f"trainer.offload={offload} spares the memory of a GPU, and this run computes on the CPU. "
            f"Use trainer=gpu on a machine that has one, trainer.offload={DISK} for a model larger than the memory, or "
            "trainer.offload=null."
        )
    if device.type != "cpu" and offload == DISK:
        raise UserError(
            f"trainer.offload={DISK} is for computing on the CPU; on a GPU choose null or one of {', '.join(OFFLOADS)}."
        )


def offload_pipeline(pipeline: Any, offload: str, device: torch.device) -> None:
    """Let the models of `pipeline`, all on the CPU, compute on `device` and lie on the CPU otherwise."""
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
        return
    for part in pipeline.components.values():  # as enable_sequential_cpu_offload, which knows no QuantLinear
        if isinstance(part, nn.Module):
            offload_layers(part, device)


def offload_layers(model: nn.Module, device: torch.device) -> None:
    """Every layer comes to `device` for its forward and goes again; a QuantLinear as a whole. A Correction stays."""
    children = [(parent, key, child) for parent in model.modules() for key, child in parent._modules.items()]
    kept = QuantLinear | Correction
    places = [(parent, key, child) for parent, key, child in children if isinstance(child, kept)]
    for parent, key, _ in places:  # accelerate moves what a module itself holds, and only if its own forward is called
        parent._modules[key] = nn.Identity()
    cpu_offload(model, device, offload_buffers=True)
    for parent, key, layer in places:
        parent._modules[key] = layer
    for layer in {id(layer): layer for _, _, layer in places if isinstance(layer, QuantLinear)}.values():
        add_hook_to_module(layer, Visit(device))


class Visit(ModelHook):
    """Brings a QuantLinear's bias and current variant, with what its backend holds and has derived; forgets them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._at_home: list[tuple[dict[str, Any], str, Any]] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Onto the device, inputs too."""
        assert isinstance(module, QuantLinear)
        variant = module.current_variant()
        if variant.held is not None:
            self._at_home.append((variant.__dict__, "held", variant.held))
            variant.held = variant.held.moved(lambda tensor: tensor.to(self.device))
        for part in variant.modules():
            self._bring(part._buffers, lambda buffer: buffer.to(self.device))
        self._bring(module._parameters, lambda p: nn.Parameter(p.to(self.device), requires_grad=False))
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)

    def _bring(self, tensors: dict[str, Any], moved: Callable[[Any], Any]) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self._at_home.append((tensors, name, tensor))
                tensors[name] = moved(tensor)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Those on the CPU were never given up."""
        while self._at_home:
            tensors, name, tensor = self._at_home.pop()
            tensors[name] = tensor
        return output

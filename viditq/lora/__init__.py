"""LoRA on a quantized pipeline: an exact branch beside the codes, several at once, removable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from viditq.errors import UserError
from viditq.lora.branch import LoraBranch, attach, branches, detach
from viditq.lora.files import Update, moved_to, read_lora
from viditq.quant.execution.linear import QuantLinear

__all__ = ["add_lora", "lora_scales", "merge_lora", "remove_lora", "set_lora_scale"]


def add_lora(
    pipeline: Any,
    path: str | Path,
    scale: float = 1.0,
    name: str | None = None,
    weight_name: str | None = None,
    component: str | None = None,
) -> str:
    """Add a LoRA to a pipeline; returns its name.

    W x becomes W x + scale (alpha / r) B A x for every Linear that the file names, quantized or not: what the float
    model would gain, whatever the codes are (Hu et al. 2021, arXiv 2106.09685). Blocks that hold such a Linear run
    unfused. pipeline: of `load_quantized`, of diffusers after `import viditq`, or a float one. path: a .safetensors
    file or a folder with one, in the layout of diffusers, PEFT or, where diffusers converts it, of the model's release.
    name: to remove it by; None = the file's. weight_name: of the file in the folder. component: the denoiser that it
    is for, where there are several (Wan 2.2's file for low noise: transformer_2); None = as the file's names say, which
    are the first one's where they say nothing.
    Raises UserError for files that hold no LoRA, or one of another model, before anything is changed.
    """
    scale = _number(scale)
    _modules(pipeline)
    updates, file = read_lora(pipeline, Path(path).expanduser(), weight_name)
    if component is not None:
        updates = moved_to(pipeline, component, updates, file)
    name = file.stem.replace(".", "_") if name is None else name
    if not isinstance(name, str) or not name or "." in name:
        raise UserError(f"name={name!r} cannot name a LoRA: give a word without dots.")
    if name in lora_scales(pipeline):
        raise UserError(f"A LoRA {name!r} is there already. Remove it (viditq.remove_lora), or give another name=.")
    linears = [(update, _linear(pipeline, update, file)) for update in updates]
    for update, linear in linears:
        attach(linear, name, update, scale)
    return name


def set_lora_scale(pipeline: Any, name: str, scale: float) -> None:
    """Make a LoRA stronger or weaker; 0 leaves it in place without effect.

    Raises UserError for an unknown name, and for what is no number.
    """
    scale = _number(scale)
    for branch in _named(pipeline, name):
        branch.scale = scale


def remove_lora(pipeline: Any, name: str | None = None) -> None:
    """Remove a LoRA, or (None) all: samples are again what they were before. Raises UserError for an unknown name."""
    if name is not None:
        _named(pipeline, name)
    for module in _modules(pipeline):
        for branch in branches(module):
            if name in (None, branch.name):
                detach(module, branch)


@torch.no_grad()
def merge_lora(pipeline: Any, name: str | None = None) -> None:
    """Put a LoRA, or (None) all, into the weights of the float Linears that it was added to, for good.

    To quantize the sum of both: save the denoiser after it. Raises UserError for an unknown name, and where a Linear is
    quantized, whose codes cannot hold it.
    """
    if name is not None:
        _named(pipeline, name)
    found = [(m, b) for m in _modules(pipeline) for b in branches(m) if name in (None, b.name)]
    if any(isinstance(module, QuantLinear) for module, _ in found):
        raise UserError("A LoRA is merged into float weights, and this pipeline is quantized. Merge it, then quantize.")
    for module, branch in found:
        down_rC, up_Or = (getattr(module, buffer).float() for buffer in branch.buffers)
        weight_OC: Any = module.weight
        weight_OC.data = (weight_OC.float() + branch.scale * up_Or @ down_rC).to(weight_OC.dtype)
        detach(module, branch)


def lora_scales(pipeline: Any) -> dict[str, float]:
    """Name -> scale of every LoRA, in the order in which they were added."""
    return {branch.name: branch.scale for module in _modules(pipeline) for branch in branches(module)}


def _number(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < float("inf"):
        raise UserError(f"scale={scale!r} is no number: give such as 1.0 or 0.7.")
    return float(scale)


def _named(pipeline: Any, name: str) -> list[LoraBranch]:
    found = [branch for module in _modules(pipeline) for branch in branches(module) if branch.name == name]
    if not found:
        known = ", ".join(lora_scales(pipeline)) or "none"
        raise UserError(f"There is no LoRA {name!r}. There are: {known}.")
    return found


def _modules(pipeline: Any) -> list[nn.Module]:
    if not hasattr(pipeline, "components"):
        raise UserError(f"A LoRA goes to a pipeline, and this is a {type(pipeline).__name__}: give the whole pipeline.")
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return [module for part in parts for module in part.modules()]


def _linear(pipeline: Any, update: Update, file: Path) -> QuantLinear | nn.Linear:
    """The Linear that an update is for; raises where it is none, or of another width."""
    part: nn.Module = getattr(pipeline, update.component)
    linear = part.get_submodule(update.layer)
    where = f"{update.component}.{update.layer}"
    if not isinstance(linear, QuantLinear | nn.Linear):
        raise UserError(f"{file} changes {where}, a {linear._get_name()}: only Linears can take a LoRA here.")
    given = (update.up_Or.shape[0], update.down_rC.shape[1])
    if given != (linear.out_features, linear.in_features):
        raise UserError(
            f"{file} is for another model: it changes {where} as one of {given[1]} to {given[0]} channels, and here it "
            f"has {linear.in_features} to {linear.out_features}."
        )
    return linear

"""A quantized model as a float one again, with the weights that the codes stand for."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.fusion.install import unfuse_blocks
from viditq.hooks import Hook
from viditq.lora.branch import branches
from viditq.quant.calibration.context import StepContext
from viditq.quant.correction.ptqd import corrections_of
from viditq.quant.execution.linear import QuantLinear, quant_linears
from viditq.quant.execution.variant import Variant


def dequantize(model: Any) -> Any:
    """Linears in place of QuantLinears, in the types that those stand for; inputs are not rounded any more.

    Raises UserError for layers with other weights at other noise levels, and for a corrected output, before anything
    is changed.
    """
    if corrections_of(model):
        raise UserError("dequantize() would lose what quant.correction takes back of the output; load the float model")
    if any(branches(module) for module in model.modules()):
        raise UserError("dequantize() would lose the LoRA that was added; remove it first (viditq.remove_lora)")
    layers = quant_linears(model)
    weights = {name: float_weight(name, layer) for name, layer in layers.items()}
    unfuse_blocks(model)
    for name, layer in layers.items():
        weight_OC = weights[name]
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight_OC, requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        path, _, key = name.rpartition(".")
        setattr(model.get_submodule(path), key, linear)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [n for n, hook in hooks.items() if _tells_noise_level(hook)]:
            del hooks[number]
    model.__dict__.pop("load_lora_adapter", None)  # which quantized ones refuse
    del model.config.quantization_config
    model._internal_dict = type(model.config)({k: v for k, v in model.config.items() if k != "quantization_config"})
    return model


def float_weight(name: str, layer: QuantLinear) -> Tensor:
    """[O, C]: what a layer multiplies its float input by; raises UserError where that depends on the noise level."""
    found = [variant_weight(cast(Variant, variant)) for variant in layer.variants]
    if any(not torch.equal(weight_OC, found[0]) for weight_OC in found[1:]):
        raise UserError(
            f"{name} has {len(found)} weights for ranges of noise levels, which no float model holds: dequantize() is "
            "for plans with one. Load the float model."
        )
    return found[0]


def variant_weight(variant: Variant) -> Tensor:
    """[O, C] that stands for its codes, branch and chain: with T(x) = x M, linear(T(x), W) = linear(x, W M^T)."""
    weight_OC = variant.dequantized_weight().float()
    if variant.low_rank_up is not None:
        weight_OC = weight_OC + variant.low_rank_up.float() @ variant.low_rank_down.float()
    if len(variant.chain):
        unit_CC = torch.eye(variant.in_features, device=weight_OC.device)
        weight_OC = weight_OC @ variant.chain.activation(unit_CC).T
    return weight_OC.to(variant.dtype)


def _tells_noise_level(hook: Any) -> bool:
    function = getattr(hook.function, "func", hook.function) if isinstance(hook, Hook) else None
    return isinstance(getattr(function, "__self__", None), StepContext)

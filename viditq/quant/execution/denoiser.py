"""What a denoiser does otherwise once it holds QuantLinears."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from torch import nn

from viditq.errors import UserError
from viditq.quant.calibration.context import StepContext, denoisers_of
from viditq.quant.execution.linear import quant_linears


def settle(denoiser: nn.Module, context: StepContext) -> None:
    """Attaches the context, and lets nothing pass by the QuantLinears or save them as what they are not.

    A single segment needs no timestep. Raises UserError for a model without one where there are several segments.
    """
    if len(context.edges) > 2 or context.reads(denoiser):
        context.attach(denoiser)
    for module in denoiser.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and quant_linears(module):
            _leave_fast_path(module)
    for part in denoisers_of(denoiser).values():
        if hasattr(part, "save_pretrained") and quant_linears(part):
            refuse = partial(refuse_to_save, "viditq.quant.save_denoiser(folder, denoiser, plan, {})")
            part.save_pretrained = refuse  # type: ignore[assignment]
        if hasattr(part, "load_lora_adapter") and quant_linears(part):
            part.load_lora_adapter = refuse_lora  # type: ignore[assignment]


def _leave_fast_path(module: nn.TransformerEncoderLayer | nn.TransformerEncoder) -> None:
    """In evaluation mode torch fuses these layers: it reads the weights of their Linears, which it does not call."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    else:
        module.use_nested_tensor = False


def refuse_to_save(instead: str, *_: Any, **__: Any) -> NoReturn:
    """Raises UserError in place of diffusers' save_pretrained, which drops codes and scales without a word."""
    raise UserError(
        "save_pretrained writes float models only: what it wrote of this quantized one could not be loaded again. "
        f"Use {instead}."
    )


def refuse_lora(*_: Any, **__: Any) -> NoReturn:
    """Raises UserError in place of diffusers' own, which ends in PEFT's refusal of layers that it does not know."""
    raise UserError("A quantized model takes a LoRA by viditq.add_lora(pipeline, path), not by load_lora_weights.")

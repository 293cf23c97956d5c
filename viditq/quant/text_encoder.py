"""How a text encoder is quantized: the weights of its Linears alone, each rounded to the nearest code."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from viditq.errors import UserError
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.model_linears import shapes_of, tied_names

BACKEND = "weight_only"  # of what reads the artifact: a float copy of the weights is what it is to save


def text_encoder_plan(encoder: nn.Module, spec: QuantSpec, name: str) -> QuantPlan:
    """Every Linear in `spec`, but those that group_size does not divide: they get a scale per output channel.

    Left in float: a Linear whose weight is an embedding's too. name: of the encoder, for messages. Raises UserError for
    an encoder without Linears.
    """
    tied = tied_names(encoder)
    shared = {*tied, *tied.values()}
    linears = {n: inputs for n, (_, inputs) in shapes_of(encoder).items() if f"{n}.weight" not in shared}
    if not linears:
        raise UserError(
            f"quant/text_encoder: {name} ({type(encoder).__name__}) has no Linear that could be quantized. Give "
            "quant/text_encoder=none."
        )
    schemes = {
        spec.granularity: LayerScheme(spec, None),
        "channel": LayerScheme(replace(spec, granularity="channel", group_size=None), None),
    }
    layers = {
        layer: (spec.granularity if inputs % (spec.group_size or 1) == 0 else "channel",)
        for layer, inputs in linears.items()
    }
    used = {scheme for (scheme,) in layers.values()}
    return QuantPlan((0.0, 1.0), {n: s for n, s in schemes.items() if n in used}, dict(layers))

"""QuantSetting: the configuration's `quant` node, a recipe with the policy that turns it into plans."""

from collections.abc import Mapping, Sequence
from typing import Any

from viditq.errors import UserError
from viditq.quant.correction.ptqd import CORRECTIONS
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.policy import Policy, StoredArtifact
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.recipe import Recipe, Smoothing
from viditq.quant.description.specs import RangeSpec, RoundingSpec
from viditq.quant.execution.attention import check_attention

FLOAT_DTYPES = ("float32", "float16", "bfloat16")


class QuantSetting:
    """How to quantize: see `Recipe` for the formats, smoothing, rounding, ranges, segments and rules.

    correction: ptqd = what can be foretold of the output's error is taken back, and a stochastic sampler adds less
    noise for the rest; ptqd_mean = without the latter; None = nothing is corrected.
    text_encoder: format of the weights of the text encoders' Linears, None = they stay in float.
    float_dtype: dtype of the quantized denoiser's float arithmetic, None = the model's own.
    attention: one of `execution.attention.KINDS`, emulated where the quantized denoiser runs; None = the model's own.
    attention_granularity: one of `execution.attention.GRANULARITIES`, which tokens share a scale there.
    Raises UserError for everything that can be seen without a model.
    """

    def __init__(
        self,
        weight: QuantSpec | None,
        activation: QuantSpec | None,
        smoothing: Smoothing,
        rounding: RoundingSpec | str,
        ranges: RangeSpec | str,
        activation_ranges: RangeSpec | str,
        low_rank: int | None,
        segments: Sequence[float],
        rules: Sequence[Any],
        policy: Policy,
        float_dtype: str | None,
        correction: str | None,
        text_encoder: QuantSpec | None,
        attention: str | None = None,
        attention_granularity: str = "token",
    ) -> None:
        for side, spec in {"weight": weight, "activation": activation}.items():
            if isinstance(spec, Mapping):  # bits= on top of a side that the setting leaves in float
                raise UserError(
                    f"quant.{side}={dict(spec)} is no format, only a part of one: this setting leaves the {side}s in "
                    "float, so that there is nothing to change (bits= goes with a setting that quantizes both). "
                    f"Choose another quant=..., or give a whole format: +quant/format@quant.{side}=int8_token."
                )
        if isinstance(text_encoder, Mapping):
            raise UserError(
                f"quant.text_encoder={dict(text_encoder)} is no format, only a part of one. Choose one of "
                "conf/quant/text_encoder: quant/text_encoder=w8 or w4."
            )
        if float_dtype is not None and float_dtype not in FLOAT_DTYPES:
            raise UserError(f"quant.float_dtype={float_dtype!r}: choose null or one of {', '.join(FLOAT_DTYPES)}.")
        check_attention(attention, attention_granularity)
        if correction is not None and correction not in CORRECTIONS:
            raise UserError(f"quant.correction={correction!r}: choose null or one of {', '.join(CORRECTIONS)}.")
        if correction is not None and weight is None and activation is None:
            raise UserError(f"quant.correction={correction}: nothing is quantized, so there is no error to correct.")
        changed = {"float_dtype": float_dtype, "correction": correction, "text_encoder": text_encoder}
        for key, value in changed.items() if isinstance(policy, StoredArtifact) else ():
            if value is not None:
                raise UserError(
                    f"quant.{key}={value}: quant/policy=artifact takes a quantized model as it is, which this does not "
                    "change. Leave it out, or quantize anew with quant/policy=uniform."
                )
        self.shrinks_noise = correction == "ptqd"
        how = (ranges, activation_ranges, low_rank)
        self.recipe = Recipe(weight, activation, smoothing, rounding, segments, rules, *how)
        self.policy, self.float_dtype, self.correction, self.attention = policy, float_dtype, correction, attention
        self.attention_granularity = attention_granularity
        self.text_encoder = None if text_encoder is None else text_encoder.check_weight()

    def plan(self, linear_names: Sequence[str], keep_float: Sequence[str]) -> QuantPlan:
        """The plan for a model with these Linears, of which `keep_float` patterns stay in float."""
        return self.policy.plan(self.recipe, linear_names, keep_float)

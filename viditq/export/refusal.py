"""Exact or refused: what a program's format cannot hold of a plan, found before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from viditq.errors import UserError
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme


@dataclass(frozen=True)
class Refusal:
    """Why a layer cannot go. field: of its scheme, such as activation.symmetric. preset: the nearest that can."""

    layer: str
    field: str
    value: object
    why: str
    preset: str

    def __str__(self) -> str:
        return f"{self.layer} has {self.field}={self.value!r}, {self.why}"


RefusalOf = Callable[[LayerScheme, str], Refusal | None]


def refusals(plan: QuantPlan, refusal: RefusalOf, preset: str, by_segment: bool = False) -> dict[str, Refusal]:
    """Layer -> why it cannot go, of those that cannot.

    refusal: of one scheme of one layer. preset: the nearest for what differs by noise level, which the format holds
    only if `by_segment`.
    """
    found: dict[str, Refusal] = {}
    for layer, names in plan.layers.items():
        schemes = [plan.schemes[name] for name in dict.fromkeys(names) if name is not None]
        differs = len({*names}) > 1 or (len(names) > 1 and any(scheme.per_segment for scheme in schemes))
        if differs and not by_segment:
            why = "and is quantized anew for each range of noise levels, which the format does not know"
            found[layer] = Refusal(layer, "segments", list(plan.edges), why, preset)
            continue
        first = next(
            filter(None, (_float_numbers(scheme, layer) or refusal(scheme, layer) for scheme in schemes)), None
        )
        if first is not None:
            found[layer] = first
    return found


def _float_numbers(scheme: LayerScheme, layer: str) -> Refusal | None:
    """No exporter of integer formats knows them."""
    for side, spec in (("weight", scheme.weight), ("activation", scheme.activation)):
        if spec is not None and spec.is_float:
            return Refusal(layer, f"{side}.number", spec.number, "and the format holds integers", "quant=w8a8_sym")
    return None


def difference(spec: QuantSpec | None, wanted: QuantSpec) -> tuple[str, object, object] | None:
    """The first field in which a format is another one: its name, what it has, what is wanted; None = there is none."""
    pairs = ((field.name, getattr(spec, field.name), getattr(wanted, field.name)) for field in fields(wanted))
    return None if spec is None else next((pair for pair in pairs if pair[1] != pair[2]), None)


def raise_refused(target: str, found: dict[str, Refusal], requantizes: bool) -> None:
    """UserError for the first of them, if any."""
    if not found:
        return
    first = next(iter(found.values()))
    others = f" ({len(found) - 1} more layers cannot go either)" if len(found) > 1 else ""
    how = ", or export with --requantize, which converts and says what that costs" if requantizes else ""
    raise UserError(
        f"--to {target} cannot hold this model exactly: {first}{others}. The nearest that it can hold is "
        f"{first.preset}: quantize with that{how}."
    )


def refuse_correction(target: str, meta: Mapping[str, Any]) -> None:
    """UserError for an artifact that takes back what its error is known to be."""
    if meta.get("correction"):
        raise UserError(
            f"--to {target} cannot hold quant.correction={meta['correction']}, which changes the denoiser's output. "
            "The nearest that it can hold is quant.correction=null: quantize without."
        )

"""Plans of the original ViDiT-Q code: bits of named Linears in ranges of sampling-step indices, as yaml has them.

A key "hi-lo" is a range of step indices of an n-step run, n - 1 being the first, noisiest step. The key "fp_layers"
holds, per range, patterns of layers left in float there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from viditq.errors import UserError
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme

Renames = Sequence[tuple[str, str]]
"""(regular expression for the whole of a name in the file, the Linear's name here with \\1 ...), first match wins."""

KEPT = "fp_layers"
BITS = range(2, 9)
RENAMES: dict[str, Renames] = {
    "open_sora": (
        (r"model\.(blocks\.\d+\.(?:attn|attn_temp)\.(?:q|k|v|proj))", r"\1"),
        (r"model\.(blocks\.\d+\.cross_attn\.(?:q_linear|kv_linear|proj))", r"\1"),
        (r"model\.(blocks\.\d+\.mlp\.(?:fc1|fc2))", r"\1"),
    ),
}


def parse_ranges(fields: Any, what: str) -> dict[tuple[int, int], dict[str, int]]:
    """(lo, hi) -> layer -> bits, the cleanest range first.

    Raises UserError unless ranges tile 0 .. n - 1, and for bits and `fp_layers` that cannot be.
    """
    if not isinstance(fields, Mapping):
        raise UserError(f"{what} must be a mapping of step ranges such as '19-15' to bits of layers.")
    _check_kept(fields, what)
    ranges: dict[tuple[int, int], dict[str, int]] = {}
    for key, bits in fields.items():
        if key == KEPT:
            continue
        found = re.fullmatch(r"(\d+)-(\d+)", str(key))
        if not found or not isinstance(bits, Mapping) or not bits:
            raise UserError(f"{what}: {key!r} is no range of sampling steps such as '19-15' with bits of layers.")
        for layer, value in bits.items():
            if type(value) is not int or value not in BITS:
                raise UserError(
                    f"{what}: {key!r} gives {layer} the bits {value!r}. Give a whole number from {BITS[0]} to "
                    f"{BITS[-1]}; the key {KEPT} leaves layers in float."
                )
        hi, lo = int(found[1]), int(found[2])
        ranges[lo, hi] = {str(layer): value for layer, value in bits.items()}
    ordered = dict(sorted(ranges.items()))
    ends = [-1, *(hi for _, hi in ordered)]
    if not ordered or any(lo != end + 1 or hi < lo for (lo, hi), end in zip(ordered, ends, strict=False)):
        raise UserError(f"{what}: the ranges {', '.join(map(str, fields))} do not follow each other from step 0 on.")
    return ordered


def _check_kept(fields: Mapping[Any, Any], what: str) -> None:
    patterns = fields.get(KEPT, {})
    if not isinstance(patterns, Mapping) or not all(isinstance(names, list) for names in patterns.values()):
        raise UserError(f"{what}: {KEPT} must be a mapping of step ranges to lists of patterns, such as 19-15: [mlp].")
    if unknown := [span for span in patterns if span not in fields]:
        raise UserError(f"{what}: {KEPT} names the steps {unknown[0]!r}, for which the file has no bits.")


def edges_of(ranges: Sequence[tuple[int, int]], noise_levels: Sequence[float]) -> tuple[float, ...]:
    """Noise levels between ranges, midway between neighbouring steps; noise_levels: of step 0 .. n - 1, ascending."""
    count = ranges[-1][1] + 1
    if count != len(noise_levels):
        raise UserError(f"the ranges are of a {count}-step run, the noise levels of one of {len(noise_levels)} steps.")
    return (0.0, *((noise_levels[hi] + noise_levels[hi + 1]) / 2 for _, hi in ranges[:-1]), 1.0)


def linspace_levels(num_steps: int, num_train_steps: int = 1000) -> list[float]:
    """Noise level of each step of Open-Sora's IDDPM: timesteps round(linspace(0, 999, n)) of 1000."""
    last = num_train_steps - 1
    return [round(i * last / max(num_steps - 1, 1)) / num_train_steps for i in range(num_steps)]


def renamed(layer: str, renames: Renames) -> str:
    """The name here of a Linear of the file; raises UserError for one that no pattern covers."""
    for pattern, name in renames:
        found = re.fullmatch(pattern, layer)
        if found:
            return found.expand(name)
    raise UserError(f"the plan file names {layer!r}, for which the chosen model's table has no name.")


def kept_in_float(fields: Mapping[str, Any], span: tuple[int, int], layer: str) -> bool:
    """Whether the name of `layer` contains one of the range's patterns of `fp_layers`."""
    patterns = (fields.get(KEPT) or {}).get(f"{span[1]}-{span[0]}") or []
    return any(str(pattern) in layer for pattern in patterns)


def import_plan(
    weights: Any,
    activations: Any,
    renames: Renames,
    scheme: LayerScheme,
    noise_levels: Sequence[float] | None = None,
    labels: tuple[str, str] = ("the weight file", "the activation file"),
) -> QuantPlan:
    """The plan of two yaml files (as plain values); either may be None: that side then stays as in `scheme`.

    scheme: formats, transforms and rounding, whose bits the files replace. noise_levels: of the steps, ascending; None
    = Open-Sora's. labels: of the two files in messages. Raises UserError if they disagree about ranges or layers.
    """
    given = {"weight": weights, "activation": activations}
    told = zip(given.items(), labels, strict=True)
    sides = {side: parse_ranges(fields, label) for (side, fields), label in told if fields is not None}
    if not sides:
        raise UserError("give a weight file, an activation file, or both.")
    tables = [*sides.values()]
    if any(list(table) != list(tables[0]) for table in tables):
        raise UserError("the weight and the activation file have different step ranges.")
    ranges = list(tables[0])
    names = list(next(iter(tables[0].values())))
    if any(set(bits) != set(names) for table in tables for bits in table.values()):
        raise UserError("the step ranges, or the two files, do not name the same layers.")
    schemes: dict[str, LayerScheme] = {}

    def entered(name: str, span: tuple[int, int]) -> str | None:
        if any(fields is not None and kept_in_float(fields, span, name) for fields in given.values()):
            return None
        return _enter(schemes, scheme, {side: table[span][name] for side, table in sides.items()})

    layers = {renamed(name, renames): tuple(entered(name, span) for span in ranges) for name in names}
    layers = {layer: chosen for layer, chosen in layers.items() if any(chosen)}
    return QuantPlan(edges_of(ranges, noise_levels or linspace_levels(ranges[-1][1] + 1)), schemes, layers)


def _enter(schemes: dict[str, LayerScheme], scheme: LayerScheme, bits: Mapping[str, int]) -> str:
    formats: dict[str, Any] = {}
    for side in bits:
        spec = getattr(scheme, side)
        if not isinstance(spec, QuantSpec):
            raise UserError(
                f"the recipe leaves the {side} in float, but the file gives its bits; choose another recipe."
            )
        formats[side] = replace(spec, bits=bits[side])
    made = replace(scheme, **formats)
    specs = (made.weight, made.activation)
    name = "w{}a{}".format(*(spec.bits if spec else 16 for spec in specs))
    schemes[name] = made
    return name

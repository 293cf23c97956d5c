"""Recipe: what the user writes (defaults and patterns); `resolve` turns it into a QuantPlan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from viditq.errors import UserError, no_linear
from viditq.quant.description.fields import checked_fields
from viditq.quant.description.plan import QuantPlan, check_edges
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.description.specs import RangeSpec, RoundingSpec, TransformSpec

WEIGHTS = ("quantized weights", "Leave it out, or give weight a format.")
STATIC = ("static activations", "Leave it out, or choose a static format for activation.")
Smoothing = TransformSpec | Sequence[TransformSpec] | Mapping[str, TransformSpec] | None


@dataclass(frozen=True)
class Rule:
    """An exception for the Linears whose name matches the glob `pattern` (`*` also crosses dots).

    weight, activation, smoothing (one transform or several), low_rank replace the recipe's own (None = as in the
    recipe; low_rank=0 takes the branch away); keep_float leaves them alone.
    """

    pattern: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    smoothing: Smoothing = None
    keep_float: bool = False
    low_rank: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise UserError(f"a rule needs a pattern such as '*.attn1.*', got {self.pattern!r}")
        if not isinstance(self.keep_float, bool):
            raise UserError(f"rule {self.pattern!r}: keep_float must be true or false, got {self.keep_float!r}")
        if self.smoothing is not None:
            object.__setattr__(self, "smoothing", _as_chain(self.smoothing))
        names = ("weight", "activation", "smoothing", "low_rank")
        overrides = [name for name in names if getattr(self, name) is not None]
        if self.keep_float and overrides:
            raise UserError(f"rule {self.pattern!r} has keep_float and {overrides[0]}; give one or the other")
        if not self.keep_float and not overrides:
            raise UserError(
                f"rule {self.pattern!r} changes nothing; give weight, activation, smoothing, low_rank or "
                "keep_float=true"
            )


def _as_chain(smoothing: Any) -> tuple[TransformSpec, ...]:
    """The transforms of a `smoothing`: none, one, a list, or a mapping in whose order they apply."""
    parts = smoothing
    if isinstance(smoothing, Mapping):
        parts = list(smoothing.values())
    elif smoothing is None or isinstance(smoothing, TransformSpec):
        parts = [] if smoothing is None else [smoothing]
    if not isinstance(parts, list | tuple) or not all(isinstance(part, TransformSpec) for part in parts):
        raise UserError(f"smoothing takes a transform such as SmoothSpec, several of them, or null, got {smoothing!r}")
    return tuple(parts)


def _as_rule(rule: Any) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, Mapping) and "pattern" in rule:
        return Rule(**checked_fields(Rule, rule, "a rule"))
    raise UserError(f"a rule must be a mapping with a pattern, got {rule!r}")


class Recipe:
    """How to quantize a denoiser.

    segments: noise levels that tile [0, 1]; a smoothing given per segment lists its values in the same order
    (low noise first). smoothing: one transform or several in order. rounding, ranges: of weights; activation_ranges: of
    static activations; low_rank: rank of a branch in 16 bits beside the quantized weight. rules: the last one that
    matches a Linear decides, on top of the recipe's own settings.
    """

    def __init__(
        self,
        weight: QuantSpec | None = None,
        activation: QuantSpec | None = None,
        smoothing: Smoothing = None,
        rounding: RoundingSpec | str = "nearest",
        segments: Sequence[float] = (0, 1),
        rules: Sequence[Rule] = (),
        ranges: RangeSpec | str = "min_max",
        activation_ranges: RangeSpec | str = "min_max",
        low_rank: int | None = None,
    ) -> None:
        if isinstance(rules, str) or not isinstance(rules, Sequence):
            raise UserError(f"rules must be a list, got {rules!r}")
        self.weight, self.activation, self.smoothing = weight, activation, _as_chain(smoothing)
        self.rounding: RoundingSpec = RoundingSpec.parse(rounding)
        self.ranges: RangeSpec = RangeSpec.parse(ranges)
        self.activation_ranges: RangeSpec = RangeSpec.parse(activation_ranges)
        self.low_rank = low_rank
        self.edges = check_edges(segments)
        self.rules = tuple(_as_rule(rule) for rule in rules)
        # What can be checked without a model fails here.
        schemes = [self._schemes(rule) for rule in (None, *self.rules)]
        self._check_used([scheme for of_rule in schemes for scheme in of_rule or []])

    def _check_used(self, schemes: Sequence[LayerScheme]) -> None:
        """Raises UserError for a setting of what these schemes leave in float, or scale anew for each token."""
        weights = any(scheme.weight for scheme in schemes)
        static = any(scheme.static_activation for scheme in schemes)
        learned, seen = getattr(self.rounding, "learn_activation_scale", False), self.activation_ranges
        for setting, idle, (what, remedy) in (
            (f"rounding={self.rounding.name}", self.rounding.name != "nearest" and not weights, WEIGHTS),
            (f"ranges={self.ranges.name}", self.ranges.name != "min_max" and not weights, WEIGHTS),
            (f"activation_ranges={seen.name}", seen.name != "min_max" and not static, STATIC),
            ("rounding.learn_activation_scale=true", learned and not static, STATIC),
        ):
            if idle:
                raise UserError(f"{setting} changes nothing here: it is about {what}. {remedy}")

    def with_rules(self, rules: Sequence[Rule]) -> Recipe:
        """This recipe with `rules` in place of its own."""
        how = (self.ranges, self.activation_ranges, self.low_rank)
        return Recipe(self.weight, self.activation, self.smoothing, self.rounding, self.edges, rules, *how)

    def with_formats(self, weight: QuantSpec | None, activation: QuantSpec | None) -> Recipe:
        """This recipe with other formats in place of its own."""
        how = (self.ranges, self.activation_ranges, self.low_rank)
        return Recipe(weight, activation, self.smoothing, self.rounding, self.edges, self.rules, *how)

    def _schemes(self, rule: Rule | None) -> list[LayerScheme] | None:
        """One scheme per segment under `rule`; None = float."""
        if rule is not None and rule.keep_float:
            return None
        weight = (rule and rule.weight) or self.weight
        activation = (rule and rule.activation) or self.activation
        smoothing = self.smoothing if rule is None or rule.smoothing is None else _as_chain(rule.smoothing)
        low_rank = (self.low_rank if rule is None or rule.low_rank is None else rule.low_rank) or None
        if weight is None and activation is None:
            if smoothing and (rule is not None or not self.rules):
                raise UserError(
                    "smoothing without quantization changes nothing: give weight or activation, or no smoothing"
                )
            return None
        num = len(self.edges) - 1
        chains = [tuple(part.for_segment(i, num) for part in smoothing) for i in range(num)]
        how = (self.rounding, self.ranges, self.activation_ranges, low_rank)
        return [LayerScheme(weight, activation, chain, *how) for chain in chains]

    def _match(self, linear_names: Sequence[str]) -> dict[str, Rule | None]:
        """Layer -> the rule that decides it; raises UserError for a rule that matches nothing."""
        matched: dict[str, Rule | None] = dict.fromkeys(linear_names)
        for rule in self.rules:
            hits = [name for name in linear_names if fnmatchcase(name, rule.pattern)]
            if not hits:
                raise UserError(no_linear(rule.pattern, linear_names))
            matched.update(dict.fromkeys(hits, rule))
        return matched

    def resolve(self, linear_names: Sequence[str]) -> QuantPlan:
        """The plan for a denoiser with these Linears (`execution.model_linears.linear_names`)."""
        schemes: dict[str, LayerScheme] = {}
        layers: dict[str, tuple[str | None, ...]] = {}
        for layer, rule in self._match(linear_names).items():
            per_segment = self._schemes(rule)
            if per_segment is not None:
                layers[layer] = tuple(_enter(schemes, scheme) for scheme in per_segment)
        return QuantPlan(self.edges, schemes, layers)


def _enter(schemes: dict[str, LayerScheme], scheme: LayerScheme) -> str:
    """The name of `scheme` in `schemes`, entered if new: w4a8, w4a8_smooth, w4a8_smooth_2, ..."""
    bits = (spec.label if spec else "16" for spec in (scheme.weight, scheme.activation))
    parts = ["w{}a{}".format(*bits), *(t.name for t in scheme.transforms)]
    if scheme.low_rank is not None:
        parts.append(f"rank{scheme.low_rank}")
    base = "_".join(parts)
    name, count = base, 1
    while name in schemes and schemes[name] != scheme:
        count += 1
        name = f"{base}_{count}"
    schemes[name] = scheme
    return name

"""Recipe: what the user writes (defaults and patterns); `resolve` turns it into a QuantPlan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from viditq.errors import UserError
from viditq.quant.plan import QuantPlan, check_edges
from viditq.quant.registry import ROUNDINGS, close_names
from viditq.quant.scheme import LayerScheme, QuantSpec, TransformSpec, strict_kwargs


@dataclass(frozen=True)
class Rule:
    """An exception for the Linears whose name matches the glob `pattern` (`*` also crosses dots).

    weight, activation, smoothing replace the recipe's own (None = as in the recipe); keep_float leaves them
    alone.
    """

    pattern: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    smoothing: TransformSpec | None = None
    keep_float: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise UserError(f"a rule needs a pattern such as '*.attn1.*', got {self.pattern!r}")
        overrides = [name for name in ("weight", "activation", "smoothing") if getattr(self, name) is not None]
        if self.keep_float and overrides:
            raise UserError(f"rule {self.pattern!r} has keep_float and {overrides[0]}; give one or the other")
        if not self.keep_float and not overrides:
            raise UserError(
                f"rule {self.pattern!r} changes nothing; give weight, activation, smoothing or keep_float=true"
            )


def _as_rule(rule: Any) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, Mapping) and "pattern" in rule:
        return Rule(**strict_kwargs(Rule, rule, "a rule"))
    raise UserError(f"a rule must be a mapping with a pattern, got {rule!r}")


class Recipe:
    """How to quantize a denoiser.

    segments: noise levels that tile [0, 1]; a smoothing given per segment lists its values in the same order
    (low noise first). rules: the last one that matches a Linear decides, on top of the recipe's own settings.
    """

    def __init__(
        self,
        weight: QuantSpec | None = None,
        activation: QuantSpec | None = None,
        smoothing: TransformSpec | None = None,
        rounding: str = "nearest",
        segments: Sequence[float] = (0, 1),
        rules: Sequence[Rule] = (),
    ) -> None:
        ROUNDINGS.get(rounding)
        if isinstance(rules, str) or not isinstance(rules, Sequence):
            raise UserError(f"rules must be a list, got {rules!r}")
        self.weight, self.activation, self.smoothing, self.rounding = weight, activation, smoothing, rounding
        self.edges = check_edges(segments)
        self.rules = tuple(_as_rule(rule) for rule in rules)
        self._schemes(None)  # what can be checked without a model fails here
        for rule in self.rules:
            self._schemes(rule)

    def with_rules(self, rules: Sequence[Rule]) -> Recipe:
        """This recipe with `rules` in place of its own."""
        return Recipe(self.weight, self.activation, self.smoothing, self.rounding, self.edges, rules)

    def _schemes(self, rule: Rule | None) -> list[LayerScheme] | None:
        """One scheme per segment under `rule`; None = float."""
        if rule is not None and rule.keep_float:
            return None
        weight = (rule and rule.weight) or self.weight
        activation = (rule and rule.activation) or self.activation
        smoothing = (rule and rule.smoothing) or self.smoothing
        if weight is None and activation is None:
            if smoothing is not None and (rule is not None or not self.rules):
                raise UserError(
                    "smoothing without quantization changes nothing: give weight or activation, or no smoothing"
                )
            return None
        num = len(self.edges) - 1
        if smoothing is not None and not isinstance(smoothing, TransformSpec):
            raise UserError(f"smoothing takes a transform such as SmoothSpec or null, got {smoothing!r}")
        parts = [() if smoothing is None else (smoothing.for_segment(i, num),) for i in range(num)]
        return [LayerScheme(weight, activation, transforms, self.rounding) for transforms in parts]

    def _match(self, linear_names: Sequence[str]) -> dict[str, Rule | None]:
        """Layer -> the rule that decides it; raises UserError for a rule that matches nothing."""
        matched: dict[str, Rule | None] = dict.fromkeys(linear_names)
        for rule in self.rules:
            hits = [name for name in linear_names if fnmatchcase(name, rule.pattern)]
            if not hits:
                bare = rule.pattern.strip("*.")
                raise UserError(
                    f"pattern {rule.pattern!r} matches no Linear of the model; {close_names(bare, linear_names)}"
                )
            matched.update(dict.fromkeys(hits, rule))
        return matched

    def resolve(self, linear_names: Sequence[str]) -> QuantPlan:
        """The plan for a denoiser with these Linears (`convert.linear_names`)."""
        schemes: dict[str, LayerScheme] = {}
        layers: dict[str, tuple[str | None, ...]] = {}
        for layer, rule in self._match(linear_names).items():
            per_segment = self._schemes(rule)
            if per_segment is not None:
                layers[layer] = tuple(_enter(schemes, scheme) for scheme in per_segment)
        return QuantPlan(self.edges, schemes, layers)


def _enter(schemes: dict[str, LayerScheme], scheme: LayerScheme) -> str:
    """The name of `scheme` in `schemes`, entered if new: w4a8, w4a8_smooth, w4a8_smooth_2, ..."""
    bits = (str(spec.bits) if spec else "16" for spec in (scheme.weight, scheme.activation))
    base = "_".join(["w{}a{}".format(*bits), *(t.name for t in scheme.transforms)])
    name, count = base, 1
    while name in schemes and schemes[name] != scheme:
        count += 1
        name = f"{base}_{count}"
    schemes[name] = scheme
    return name

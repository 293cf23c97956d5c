"""What a plan may use: average bits, bytes, latency."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from viditq.errors import UserError
from viditq.quant.search.candidates import Bits

SCHEME = re.compile(r"w\d+a\d+")


@dataclass(frozen=True)
class Budget:
    """Upper limits, None = no limit; averages are over the Linears that are quantized (not those kept in float).

    weight_bits, activation_bits: as `QuantPlan` averages them, segments by their share of the sampling steps; a
    low-rank branch's numbers count 16 bits each. size_bytes: of the stored weights of these Linears (codes, scales,
    zero points, low-rank branches), equal weights of several segments once, and of whole denoisers that are left in
    float (16 bits). latency: relative to all in float, a mean over weights and sampling steps of `latency_costs`
    (scheme such as w4a8 -> cost, branch and all; float = 1; beside schemes the names of `additions` -> what one adds).
    """

    additions: ClassVar[tuple[str, ...]] = ()

    weight_bits: float | None = None
    activation_bits: float | None = None
    size_bytes: float | None = None
    latency: float | None = None
    latency_costs: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "latency_costs"}
        for name, value in given.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise UserError(f"the budget's {name}={value!r} must be a number above 0, or null for no limit.")
        if all(value is None for value in given.values()):
            raise UserError(f"the search has no budget: give at least one of {', '.join(given)}.")
        if self.latency is not None and not self.latency_costs:
            raise UserError("a budget of latency needs latency_costs, such as {w8a8: 0.58, w4a8: 0.72, w16a16: 1}.")
        if not isinstance(self.latency_costs, Mapping | None):
            raise UserError(
                f"latency_costs={self.latency_costs!r} is no table; in a shell it needs quotes: "
                "'quant.policy.budget.latency_costs={w4a8:0.72,w8a8:0.58}'"
            )
        for name, value in (self.latency_costs or {}).items():
            if name in self.additions:
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                    raise UserError(f"latency_costs has {name}: {value!r}; give what it adds, 0 or more, 1 = float.")
                continue
            if not SCHEME.fullmatch(str(name)):
                beside = f", nor one of {', '.join(self.additions)}" if self.additions else ""
                raise UserError(
                    f"latency_costs names {name!r}, which is no scheme such as w4a8 (w16a16 = float){beside}."
                )
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"latency_costs has {name}: {value!r}; give a number above 0, 1 = as slow as float.")

    @property
    def given(self) -> dict[str, float]:
        """The limits there are."""
        names = [f.name for f in fields(self) if f.name != "latency_costs"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def limits(self) -> dict[str, float]:
        """Those that are sums."""
        return {name: value for name, value in self.given.items() if name != "size_bytes"}

    def latency_of(self, bits: Bits, addition: str = "") -> float:
        """Cost of a scheme, with what one of `additions` adds; raises UserError when the table lacks the scheme."""
        name, costs = "w{}a{}".format(*bits), self.latency_costs or {}
        if name not in costs:
            raise UserError(f"latency_costs has no {name}; it needs every combination of the choices.")
        return float(costs[name]) + float(costs.get(addition, 0.0))

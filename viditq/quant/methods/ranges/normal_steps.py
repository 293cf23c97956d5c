"""PTQ4DM's calibration set: noise levels drawn from a normal distribution that leans to low noise.

The observed input rows are thinned out bucket by bucket until their noise levels follow N(mean, deviation^2); the
range is then the L_p search's (Shang et al., arXiv 2211.15736: t ~ N(mu, T/2), mu <= T/2, ranges by MSE).
"""

from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.registry import RANGES
from viditq.quant.methods.ranges.search import LpSearch

if TYPE_CHECKING:
    from viditq.quant.calibration.segment_stats import SegmentStats


@RANGES.register("normal_steps")
@dataclass(frozen=True)
class NormalSteps(LpSearch):
    """For static activations. mean (0 to 0.5), deviation: noise levels, 1 = pure noise. Weights: as LpSearch."""

    name: ClassVar[str] = "normal_steps"

    p: float = 2.0
    mean: float = 0.4
    deviation: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, lowest, highest in (("mean", 0.0, 0.5), ("deviation", 0.01, 10.0)):
            value = getattr(self, field)
            if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value <= highest:
                raise UserError(f"{field}={value!r} is not possible: give a number from {lowest:g} to {highest:g}")

    def rows_of(self, stats: "SegmentStats") -> Tensor:
        return stats.rows_like(lambda level: exp(-(((level - self.mean) / self.deviation) ** 2) / 2))

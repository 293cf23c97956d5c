"""Where several denoisers of one pipeline share the noise levels, each runs in some of a plan's segments only."""

from collections.abc import Mapping

from torch import nn

from viditq.quant.calibration.context import denoisers_of
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.description.plan import QuantPlan


def segment_sources(denoiser: nn.Module, plan: QuantPlan, stats: CalibrationStats | None) -> Mapping[str, list[int]]:
    """Layer of the plan -> for each segment, the one whose statistics it takes: itself, as a rule.

    A segment that one denoiser never runs in, but another one does, takes those of the nearest segment it runs in:
    nothing is ever computed with them. A segment that none runs in keeps itself, and is refused where it is fitted.
    """
    own = list(range(plan.num_segments))
    prefixes = denoisers_of(denoiser)
    if stats is None or len(prefixes) == 1:
        return dict.fromkeys(plan.layers, own)
    reached = {
        prefix: [i for i in own if any(_seen(stats, name, plan, i) for name in stats.layers if name.startswith(prefix))]
        for prefix in prefixes
    }
    by_any = {i for segments in reached.values() for i in segments}
    found: dict[str, list[int]] = {}
    for prefix, segments in reached.items():
        nearest = [i if i not in by_any or not segments else min(segments, key=lambda s: abs(s - i)) for i in own]
        found |= {name: nearest for name in plan.layers if name.startswith(prefix)}
    return found


def _seen(stats: CalibrationStats, name: str, plan: QuantPlan, segment: int) -> bool:
    return bool(stats.layers[name].reached(plan.edges[segment], plan.edges[segment + 1]))

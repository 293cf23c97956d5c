"""How often a calibration samples its prompts: `calibration.moment_bytes` against the second moments of all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from viditq.estimate.readers import leaders_among
from viditq.files import is_whole
from viditq.job import Job
from viditq.quant.calibration.moment_passes import cut, most_bytes, ranges
from viditq.quant.calibration.moments import matrix_bytes
from viditq.stages.calibration_passes import INPUTS, MOMENTS, left, unsummed


@dataclass(frozen=True)
class Passes:
    """left: passes that have yet to be done. all_bytes: second moments of all layers. most_bytes: of one pass."""

    left: int
    all_bytes: int
    most_bytes: int

    @classmethod
    def of(cls, job: Job, in_features: Mapping[str, int], leader_of: Mapping[str, str]) -> Passes:
        """in_features: of all Linears; leader_of: Linear -> the first that reads what it does."""
        if not job.needs_stats:
            return cls(0, 0, 0)
        layers = {name: in_features[name] for name in job.experiment.plan.moment_layers}
        budget, mine = job.experiment.moment_bytes, leaders_among(layers, leader_of)
        planned = ranges(layers, mine, budget)
        todo, count = left(job), len(planned)
        if is_whole(job.stats_file):
            count = (INPUTS in todo) + (len(cut(unsummed(job), layers, budget)) if MOMENTS in todo else 0)
        led = {name: layers[name] for name, leader in mine.items() if name == leader}
        held = [[name for name in names if name in led] for names in planned]
        return cls(count, sum(map(matrix_bytes, led.values())), most_bytes(held, led))

"""Part of stage `quantize`: which layers share one set of codes between segments, where the plan leaves that open."""

from typing import Any

from torch import nn

from viditq.job import Job
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.description.plan import QuantPlan
from viditq.quant.search.shared_codes import share_codes
from viditq.quant.sizes import laid_out, weight_bytes


def settled(
    job: Job, plan: QuantPlan, denoiser: nn.Module, stats: CalibrationStats | None
) -> tuple[QuantPlan, dict[str, Any]]:
    """The plan with nothing left open, the same in each process, and what meta.json says of how that was decided."""
    if stats is None or not plan.open_layers:
        return plan, {}
    found = job.processes.first_does(lambda: share_codes(denoiser, plan, stats))
    before, after = (_stored_bytes(job, one) for one in (plan, found.plan))
    own, shared = len(plan.open_layers) - len(found.shared), len(found.shared)
    job.say(
        f"      {own} of {own + shared} Linears have codes for each segment, {shared} share one set: "
        f"{(before - after) / 1e6:.2f} MB saved"
    )
    return found.plan, {"segment_gains": {layer: round(gain, 4) for layer, gain in found.gains.items()}}


def _stored_bytes(job: Job, plan: QuantPlan) -> int:
    adapter = job.experiment.adapter
    return weight_bytes(laid_out(adapter.build_denoiser(), plan, adapter.timestep_scale)).stored

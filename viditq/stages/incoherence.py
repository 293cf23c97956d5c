"""incoherence.json, written by the stage that has statistics of the layers' inputs at hand.

That is `quantize` where the recipe takes calibration statistics, and otherwise `diagnose`, which then observes the
inputs of the float denoiser on its prompts.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from viditq.files import is_whole, write_json
from viditq.job import Job
from viditq.models.mapped_weights import map_denoiser
from viditq.quant.calibration.observers import NO_KEY
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.diagnosis.incoherence import SCALE, incoherence
from viditq.stages.calibrate import observe


def has_incoherence(job: Job) -> bool:
    """Whether the file is there, or there is nothing to say; the same in every process."""
    return not job.plan.layers or job.processes.first_does(lambda: is_whole(job.run_dir.incoherence))


def restore_incoherence(job: Job) -> None:
    """Write the file anew from the calibration statistics, where the artifact is there and this one was lost."""
    if not job.needs_stats or has_incoherence(job):
        return
    observe(job)
    job.processes.first_does(lambda: _restore(job))


def _restore(job: Job) -> None:
    denoiser, _ = map_denoiser(job.experiment.adapter)
    calibrated_incoherence(job, quantized_weights(job, denoiser), CalibrationStats.load(job.stats_file))


def quantized_weights(job: Job, denoiser: nn.Module) -> dict[str, Tensor]:
    """Linear -> its float weight, of those that the plan quantizes."""
    return {name: denoiser.get_submodule(name).get_parameter("weight") for name in job.plan.layers}


def calibrated_incoherence(job: Job, weights: Mapping[str, Tensor], stats: CalibrationStats) -> None:
    """Write the file, if it is missing, from the statistics of the calibration."""
    if job.plan.layers and not is_whole(job.run_dir.incoherence):
        write_incoherence(job, weights, stats, "calibrate", len(job.experiment.observed_prompts))


def write_incoherence(
    job: Job, weights: Mapping[str, Tensor], stats: CalibrationStats, stage: str, num_prompts: int
) -> None:
    """Write the file. weights: layer -> [O, C]. stage, num_prompts: where the statistics are from.

    A layer that was never called has null in place of its values.
    """
    rows = {name: int((stats.layers[name].keys != NO_KEY).sum()) for name in weights}
    found = incoherence(stats, {name: weight for name, weight in weights.items() if rows[name]})
    nothing: dict[str, Any] = {"activation": None, "weight": None}
    values = {
        "stage": stage,
        "num_prompts": num_prompts,
        "max_rows": max(rows.values()),
        "alpha": SCALE.alpha,
        "layers": {name: {"role": job.experiment.roles[name], **found.get(name, nothing)} for name in weights},
    }
    write_json(job.run_dir.incoherence, values)

"""Peaks of a run's stages and of using its result, whichever way weights lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from viditq.engine.offload import DISK
from viditq.estimate.from_disk import Budgeted, peaks_from_disk, use, use_from_disk
from viditq.estimate.memory import UNCOUNTED, Peak, Pieces, larger, peaks, with_holes
from viditq.estimate.text_encoders import EncoderBytes, held_while_encoding, peak_while_quantizing
from viditq.job import Job
from viditq.models.dtypes import DTYPES

# Of a denoiser that is cast to another type: what stays of both at most. 0.57 was seen from float32 to bfloat16.
CAST = 0.7


@dataclass(frozen=True)
class Use:
    """`load_quantized` and a call: peaks of whole models, and of models in their files by a memory_budget.

    least_budget: bytes that a budget has to be at least. most_budget: from which on no layer comes and goes.
    """

    whole: Peak
    from_disk: Peak
    least_budget: int
    most_budget: int


def all_peaks(
    job: Job, p: Pieces, b: Budgeted, encoders: Mapping[str, EncoderBytes], gpu: bool, largest_layer_bytes: int
) -> tuple[dict[str, Peak], Use]:
    """Stage -> its peak, and those of using the result.

    b: of the models where they lie in files. encoders: text encoders that are quantized."""
    e, encoding = job.experiment, held_while_encoding(encoders)
    if e.offload == DISK:
        most = peaks_from_disk(p, b)
    else:
        most = peaks(p, gpu, e.offload, largest_layer_bytes)
        most["noise_floor"] = _in_other_type(most["noise_floor"], p, e.adapter.dtype, e.floor_dtype)
        if encoders:
            most["generate"] = larger(most["generate"], Peak(UNCOUNTED + encoding + with_holes(p.encoding), 0))
    if e.quant.correction is not None:  # its fit holds what the diagnosis holds
        most["quantize"] = larger(most["quantize"], most["diagnose"])
    if encoders:
        most["quantize"] = larger(most["quantize"], peak_while_quantizing(encoders))
    least, enough = b.quantized.least, b.quantized.passing + max(p.weights.resident, b.quantized.always)
    return most, Use(use(p, b.float_text, encoding, gpu), use_from_disk(p, b), least, enough)


def _in_other_type(peak: Peak, p: Pieces, dtype: str, floor_dtype: str) -> Peak:
    """The noise floor's second half has the denoiser in another type, to which it is cast once it is loaded."""
    more = max(DTYPES[floor_dtype].itemsize / DTYPES[dtype].itemsize - 1, 0)
    weights, activations = round(more * p.denoiser), round(more * p.step)
    if peak.vram is None:
        return Peak(peak.ram + max(weights, round(CAST * p.denoiser)) + with_holes(activations))
    return Peak(peak.ram + weights, peak.vram + weights + activations)

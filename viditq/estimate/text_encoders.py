"""Quantized text encoders in an estimate: their folders in the artifact, and what they hold while they encode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from viditq.estimate.from_disk import OnDisk, on_disk, together
from viditq.estimate.memory import ROWS_PER_WEIGHT, UNCOUNTED, Peak
from viditq.files import stored_entries
from viditq.job import Job
from viditq.mapped import DTYPES as DTYPES_STORED
from viditq.models.adapter import ModelAdapter
from viditq.models.text_encoders import build_encoder, run_dtype
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.sizes import artifact_bytes, laid_out, weight_bytes
from viditq.quant.text_encoder import BACKEND


@dataclass(frozen=True)
class EncoderBytes:
    """float16: of its parameters in two bytes each. artifact: on disk. held: in memory, as codes. floats: in the
    file, of what stays in float, whose pages are there as well where it runs in a wider type. decoded: its largest
    Linear's weight while it is called. temporary: what quantizing it takes. on_disk: where it lies in its files.
    """

    float16: int
    artifact: int
    held: int
    floats: int
    decoded: int
    temporary: int
    on_disk: OnDisk


def encoder_bytes(job: Job) -> dict[str, EncoderBytes]:
    """Text encoder -> its bytes, of those that the run quantizes; from configurations alone."""
    e = job.experiment
    found = {}
    for name, plan in e.encoder_plans.items():
        encoder = build_encoder(e.adapter, name)
        largest = max(out * inputs for layer, (out, inputs) in shapes_of(encoder).items() if layer in plan.layers)
        float16 = sum(2 * parameter.numel() for parameter in encoder.parameters())
        quantized = laid_out(encoder, plan, backend=BACKEND)
        meta = {"part": name, "model": e.adapter.to_dict(), "weights": e.weights}
        artifact = artifact_bytes(quantized, plan, _stored_dtypes(e.adapter, name), meta)
        weights = weight_bytes(quantized)
        found[name] = EncoderBytes(
            float16=float16,
            artifact=artifact,
            held=weights.resident,
            floats=max(artifact - (weights.resident - weights.rest), 0),
            decoded=largest * run_dtype(e.adapter, name).itemsize,
            temporary=largest * ROWS_PER_WEIGHT,
            on_disk=together([on_disk(quantized, {}), OnDisk(0, largest * run_dtype(e.adapter, name).itemsize)]),
        )
    return found


def held_while_encoding(encoders: Mapping[str, EncoderBytes]) -> int:
    """Bytes of all of them at once, with what one layer takes."""
    decoded = max((one.decoded for one in encoders.values()), default=0)
    return sum(one.held + one.floats for one in encoders.values()) + decoded


def peak_while_quantizing(encoders: Mapping[str, EncoderBytes]) -> Peak:
    """One of its Linears after another."""
    return Peak(UNCOUNTED + max(one.temporary for one in encoders.values()), 0)


def _stored_dtypes(adapter: ModelAdapter, name: str) -> dict[str, torch.dtype]:
    files = sorted(adapter.part_folder(name, weights=False).glob("*.safetensors"))
    entries = {key: entry for path in files for key, entry in stored_entries(path).items()}
    return {key: DTYPES_STORED[entry["dtype"]] for key, entry in entries.items()}

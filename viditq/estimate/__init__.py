"""`estimate=true`: what a run will need, told before it starts; nothing is written."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from viditq.engine.offload import DISK
from viditq.engine.sampling import batches_of
from viditq.errors import UserError
from viditq.estimate import parts
from viditq.estimate.all_peaks import Use, all_peaks
from viditq.estimate.backends import Held, refusals
from viditq.estimate.from_disk import Budgeted, OnDisk, on_disk, together
from viditq.estimate.memory import Peak, Pieces, held_while_quantizing
from viditq.estimate.passes import Passes
from viditq.estimate.probe import Probe, probe_on_meta
from viditq.estimate.readers import leaders
from viditq.estimate.searching import searching
from viditq.estimate.seen import Seen, measured, plan_of
from viditq.estimate.text_encoders import EncoderBytes, encoder_bytes
from viditq.estimate.work import Counter, Work, work_of
from viditq.job import Job
from viditq.models.adapter import ModelAdapter
from viditq.models.dtypes import DTYPES
from viditq.models.stored_weights import stored_dtypes
from viditq.quant.calibration.context import denoisers_of
from viditq.quant.execution.model_linears import linear_names
from viditq.quant.sizes import (
    WeightBytes,
    artifact_bytes,
    laid_out,
    module_bytes,
    stats_bytes,
    weight_bytes,
)


@dataclass(frozen=True)
class Estimate:
    """All bytes. parts: part -> (parameters, bytes as loaded). float16: the denoisers' parameters in two bytes each;
    left_in_float: those of denoisers that are not quantized, which count in it.

    weights: of the run's backend. held: by "float" and every backend. base: what the process held before. probes of the
    float and of the quantized model; works: stage -> what it does. encoders: text encoders that are quantized.
    """

    durations: bool
    batch_size: int
    processes: int
    parts: Mapping[str, tuple[int, int]]
    denoisers: tuple[str, ...]
    float16: int
    left_in_float: int
    weights: WeightBytes
    held: Mapping[str, Held]
    artifact: int
    stats: int
    base: int
    probe: Probe
    quantized_probe: Probe | None
    works: Mapping[str, Work]
    peaks: Mapping[str, Peak]
    disk: Mapping[str, int]
    remarks: tuple[str, ...]
    encoders: Mapping[str, EncoderBytes]
    use: Use


@dataclass(frozen=True)
class Known:
    """What estimates of one model have in common, whatever is quantized. base: as of `Estimate`."""

    base: int
    texts: parts.TextShapes
    sizes: Mapping[str, tuple[int, int]]
    text_on_disk: Mapping[str, OnDisk]

    @classmethod
    def of(cls, adapter: ModelAdapter) -> Known:
        """From configurations alone."""
        return cls(resident_bytes(), parts.TextShapes(adapter), parts.sizes(adapter), parts.text_on_disk(adapter))


def estimate(job: Job, mode: Any, known: Known | None = None, on_meta: Probe | None = None) -> Estimate:
    """The estimate of a run.

    mode: True = two denoiser forwards of a whole batch are computed, on the run's device, with embeddings of
    made-up values; "meta" = from the model's configuration alone, without its weights and without durations. known,
    on_meta: from estimates of other settings of this model, and of its batches. Raises UserError for a model whose
    shapes "meta" cannot follow, and where True would load what trainer.offload=disk leaves in its files.
    """
    e, plan, trainer = job.experiment, plan_of(job), job.experiment.make_trainer()
    if mode is True and e.offload == DISK:
        raise UserError(
            f"estimate=true loads whole models, and trainer.offload={DISK} is for those that do not fit. Give "
            "estimate=meta, which loads nothing."
        )
    known = known or Known.of(e.adapter)
    skeleton = e.adapter.build_denoiser()
    linears: dict[str, Any] = {name: skeleton.get_submodule(name) for name in linear_names(skeleton)}
    in_features = {name: linear.in_features for name, linear in linears.items()}
    dtype = DTYPES[e.quant.float_dtype or e.adapter.dtype]
    quantized = laid_out(e.adapter.build_denoiser().to(dtype), plan, e.adapter.timestep_scale, e.backend)
    texts, sizes = known.texts, known.sizes
    embeds = texts.embeds(e.data.prompts[0])
    batch = min(e.batch_size, job.num_prompts)
    if mode == "meta":
        on_meta = on_meta or probe_on_meta(e.adapter, parts.hollow_pipeline(e.adapter), embeds, batch)
        seen = Seen(on_meta, backends=refusals(plan) if plan.layers else {})
    else:
        seen = measured(job, trainer, embeds, batch, dtype)
    float_bytes = {name: size for name, (_, size) in sizes.items()}
    denoiser_bytes = sum(float_bytes[name] for name in e.adapter.denoiser_names)
    float_denoisers = sum(float_bytes[name] for name in e.adapter.float_denoisers)
    left_in_float = e.adapter.left_in_float_bytes()
    text_bytes = sum(size for name, size in float_bytes.items() if name.startswith(parts.TEXT))
    leader_of = leaders(in_features, seen.float_model.inputs, denoisers_of(skeleton))
    passes = Passes.of(job, in_features, leader_of)
    rows = e.num_buckets, e.rows_per_bucket
    stats = stats_bytes(in_features, *rows, leader_of, e.adapter.torch_dtype) if job.needs_stats else 0
    stats += passes.all_bytes
    numel = {name: linear.weight.numel() for name, linear in linears.items()}
    diagnosed = {name: in_features[name] for name in plan.layers} if e.diagnosis_prompts and not job.needs_stats else {}
    pieces = Pieces(
        denoiser=denoiser_bytes,
        rest=sum(float_bytes.values()) - denoiser_bytes - text_bytes,
        text=text_bytes,
        file=parts.largest_file(e.adapter),
        step=seen.float_model.forward_bytes or 0,
        decode=seen.float_model.decode_bytes or 0,
        stats=stats,
        spared=passes.all_bytes - passes.most_bytes,
        weights=weight_bytes(quantized),
        quantizing=held_while_quantizing(plan, {n: (m.out_features, m.in_features) for n, m in linears.items()}),
        observed=stats_bytes(diagnosed, *rows, dtype=e.adapter.torch_dtype),
        learned_block=max((sum(numel[name] for name in names) for names in plan.learned_blocks.values()), default=0),
        processes=trainer.num_devices * trainer.num_nodes,
        workers=max(1, job.workers(trainer, denoiser_bytes, len(batches_of(job.num_prompts, e.batch_size)))),
        measuring=min(e.adapter.calibration_batch_size, len(e.data.calibration_prompts)) / batch,
        encoding=texts.encoding,
        text_file=parts.text_file_bytes(e.adapter, float_bytes),
    )
    layer_bytes = max((module_bytes(m) for m in linears.values()), default=0) * dtype.itemsize // 4
    gpu = trainer.strategy.root_device.type != "cpu"
    stored = stored_dtypes(e.adapter)
    artifact = artifact_bytes(quantized, plan, stored, {"model": e.adapter.to_dict(), "weights": e.weights})
    once = seen.load_seconds, seen.quantize_seconds
    works = work_of(job, texts, seen.float_model, seen.quantized, once, passes.left)
    if job.searches and "search" in works:
        counter = Counter(job, texts, seen.load_seconds)
        works["search"] = searching(job, counter, seen.float_model, seen.quantized or seen.float_model)
    encoders = encoder_bytes(job)
    left = [name for name in known.text_on_disk if name not in encoders]
    budgeted = Budgeted(
        denoiser=on_disk(skeleton.to(e.adapter.torch_dtype), stored),
        floor=on_disk(skeleton.to(DTYPES[e.floor_dtype]), stored),
        text=together(known.text_on_disk.values()),
        quantized=on_disk(quantized, stored),
        encoders=together(one.on_disk for one in encoders.values()),
        left=together(known.text_on_disk[name] for name in left),
        float_text=sum(float_bytes[name] for name in left),
        budget=e.memory_budget or 0,
    )
    stages, using = all_peaks(job, pieces, budgeted, encoders, gpu, layer_bytes)
    held = {"float": Held(denoiser_bytes + float_denoisers, seen.float_model.forward_seconds)}
    held |= {
        name: one if one.why else replace(one, nbytes=weight_bytes(quantized, name).resident + float_denoisers)
        for name, one in seen.backends.items()
    }
    return Estimate(
        durations=mode is True,
        batch_size=batch,
        processes=trainer.world_size,
        parts=sizes,
        denoisers=tuple(e.adapter.denoiser_names),
        float16=sum(2 * p.numel() for p in skeleton.parameters()) + left_in_float,
        left_in_float=left_in_float,
        weights=pieces.weights,
        held=held,
        artifact=artifact,
        stats=stats,
        base=known.base,
        probe=seen.float_model,
        quantized_probe=seen.quantized,
        works=works,
        peaks=stages,
        disk=_disk(job, works, seen.float_model, artifact, stats, texts, encoders),
        remarks=tuple(_remarks(mode, gpu, job.searches)),
        encoders=encoders,
        use=using,
    )


def _disk(
    job: Job,
    works: Mapping[str, Work],
    seen: Probe,
    artifact: int,
    stats: int,
    texts: parts.TextShapes,
    encoders: Mapping[str, EncoderBytes],
) -> dict[str, int]:
    data = job.experiment.data
    embeds = texts.stored_bytes({*data.prompts, *data.calibration_prompts})
    embeds += texts.stored_bytes({*data.prompts}) if encoders else 0  # by the quantized ones too
    kept = sum(works[name].kept for name in ("reference", "noise_floor", "generate") if name in works)
    inputs = {"inputs of blocks, at most": job.experiment.block_input_bytes} if job.needs_block_inputs else {}
    return {
        "samples": kept * seen.sample_bytes,
        "artifact": artifact,
        **{f"{name}, quantized": one.artifact for name, one in encoders.items()},
        "statistics": stats,
        **inputs,
        "embeddings of prompts": embeds,
    }


def _remarks(mode: Any, gpu: bool, searches: bool) -> list[str]:
    lines = ["Not counted: what a metric's network computes with, kernels' own workspace, caches."]
    if mode == "meta":
        lines += [
            "From the configuration alone: no durations; attention is taken as fused (its matrix is never formed).",
        ]
    else:
        lines += [
            "Durations: loading, and one forward of a whole batch times their number; other sizes of batches in "
            "proportion. Not in them: encoding, metrics, the report, and writing; observing adds up to a fifth, more "
            "where batches are tiny.",
        ]
    if searches:
        lines.append(
            "Of the search's candidates every one is counted that pruning may leave; its memory and its metrics' time "
            "are not. Until it is done weights are those of the plan that it starts from."
        )
    if not gpu:
        lines.append("RAM is that of one process, the interpreter and its libraries included.")
    return lines


def resident_bytes() -> int:
    """The most that this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss begins with what the process held that started this one
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

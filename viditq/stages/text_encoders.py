"""Parts of stages `quantize` and `generate`: text encoders in the artifact, the embeddings they make, and how far those
are from the float encoders'.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from viditq.engine.offload import DISK
from viditq.files import is_whole, read_json, write_json, write_tensors
from viditq.job import Job
from viditq.loading import load_encoders
from viditq.models.text import check_prompts, encode_prompt
from viditq.models.text_encoders import map_encoder
from viditq.quant.artifact import FORMAT_VERSION, read_meta, size_bytes
from viditq.quant.artifact_writer import ArtifactWriter
from viditq.quant.convert import Conversion
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.streaming import Streaming
from viditq.quant.text_encoder import BACKEND
from viditq.stages.embedding_error import embedding_errors, mean_errors

BITS_AND_BYTES = ("average_weight_bits", "float_size_bytes")


def quantize_encoders(job: Job) -> list[str]:
    """A line for each text encoder that is quantized, each process its share of the shards."""
    return [_quantized(job, name, plan) for name, plan in job.experiment.encoder_plans.items()]


def _quantized(job: Job, name: str, plan: QuantPlan) -> str:
    folder, processes = job.artifact / name, job.processes
    if processes.first_does(folder.is_dir):
        return f"{name} already done"
    with job.timed(job.run_dir.path, "quantize"):
        encoder, runs = map_encoder(job.experiment.adapter, name)
        conversion = Conversion(encoder, plan, None, BACKEND, dtypes=runs)
        streaming = Streaming(conversion, runs)
        writer = ArtifactWriter(folder, job.run_dir.path / f"{name}.partial", len(streaming.shards))
        meta = _meta(job, name, encoder, plan)
        missing = processes.first_does(lambda: writer.begin({"plan": plan.to_json(), **meta, "format": FORMAT_VERSION}))
        for index in processes.share(missing):
            writer.write(index, streaming.header_bytes(index), streaming.contents(index))
        processes.wait()
        processes.first_does(lambda: writer.finish(plan, meta, conversion.context.timestep_scale))
    apart = sum(schemes == ("channel",) for schemes in plan.layers.values()) if "group" in plan.schemes else 0
    note = (
        f", {apart} of them per channel (quant.text_encoder.group_size does not divide their inputs)" if apart else ""
    )
    return f"{name}: {len(plan.layers)} Linears{note}, {size_bytes(folder) / 1e6:.2f} MB"


def _meta(job: Job, name: str, encoder: nn.Module, plan: QuantPlan) -> dict[str, Any]:
    shapes = shapes_of(encoder)
    numel = {layer: out * inputs for layer, (out, inputs) in shapes.items()}
    return {
        "part": name,
        "model": job.experiment.adapter.to_dict(),
        "weights": job.experiment.weights,
        "num_weights": sum(numel.values()),
        "average_weight_bits": plan.average_weight_bits(numel),
        "float_size_bytes": sum(2 * parameter.numel() for parameter in encoder.parameters()),
    }


def encode(job: Job) -> None:
    """Encode the evaluation prompts with the quantized encoders, each process its share, and write the errors."""
    e, processes, entry = job.experiment, job.processes, job.quantized_embeds
    if not e.encoder_plans:
        return

    def missing() -> list[str]:
        return [p for p in dict.fromkeys(e.data.prompts) if not is_whole(job.embeds_path(p, entry))]

    if processes.first_does(missing):
        with job.holding(entry), job.timed(job.run_dir.path, "prompts"):
            _encode(job, processes.share(processes.first_does(missing)))
            processes.wait()
    if not processes.first_does(lambda: is_whole(job.run_dir.embedding_errors)):
        job.may_change()
        processes.first_does(lambda: write_json(job.run_dir.embedding_errors, _errors(job)))


def _encode(job: Job, prompts: list[str]) -> None:
    adapter = job.experiment.adapter
    if prompts:
        encoders = load_encoders(job.artifact, adapter, job.experiment.encoder_plans, job.experiment.offload == DISK)
        pipeline = adapter.load_text_part(encoders)
        check_prompts(adapter, pipeline, prompts)
    for prompt in prompts:
        write_tensors(job.embeds_path(prompt, job.quantized_embeds), encode_prompt(adapter, pipeline, prompt))


def _errors(job: Job) -> dict[str, Any]:
    prompts = job.experiment.data.prompts
    exact, quantized = job.load_embeds(prompts), job.load_embeds(prompts, job.quantized_embeds)
    found = [embedding_errors(quantized(i), exact(i)) for i in range(len(prompts))]
    return {"prompts": prompts, "errors": found, "mean": mean_errors(found)}


def told(job: Job, denoiser: Mapping[str, Any]) -> dict[str, Any] | None:
    """What metrics.json says of quantized text encoders: bits and bytes, and the errors of embeddings.

    denoiser: size_bytes, float_size_bytes and average_weight_bits of the denoisers, for those of all together.
    """
    adapter, folder = job.experiment.adapter, job.run_dir.artifact
    parts = {name: _size(folder / name) for name in job.experiment.encoder_plans}
    if not parts:
        return None
    counts = [parts[name].pop("num_weights") for name in parts]
    counts.append(sum(map(_num_weights, (adapter.build_denoiser(), adapter.build_float_denoisers()))))
    sizes = [*parts.values(), denoiser]
    together = {key: sum(size[key] for size in sizes) for key in ("size_bytes", "float_size_bytes")}
    bits = sum(count * size["average_weight_bits"] for count, size in zip(counts, sizes, strict=True)) / sum(counts)
    errors: Mapping[str, Any] = read_json(job.run_dir.embedding_errors)["mean"]
    return {"parts": parts, "together": {**together, "average_weight_bits": bits}, "errors": errors}


def _size(folder: Path) -> dict[str, Any]:
    meta = read_meta(folder)
    return {"size_bytes": size_bytes(folder), **{key: meta[key] for key in ("num_weights", *BITS_AND_BYTES)}}


def _num_weights(model: nn.Module) -> int:
    return sum(out * inputs for out, inputs in shapes_of(model).values())

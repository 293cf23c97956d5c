"""Parts of stages where another library quantizes (quant=external/...): which are skipped, loading, bits and bytes."""

from typing import Any

from viditq.external.denoisers import load_denoisers
from viditq.external.policy import ExternalQuantization
from viditq.external.told import describe
from viditq.files import is_whole, read_json, write_json
from viditq.job import Job
from viditq.quant.artifact import denoiser_bytes
from viditq.quant.execution.linear import backend_counts

REASONS = {
    "calibrate": "{library} sees no statistics of ours",
    "search": "{library} chooses its bits itself",
    "quantize": "{library} quantizes while the denoiser is loaded, in stage generate",
    "diagnose": "layers of {library} are not ours, to be set beside float one by one",
}
ALREADY = "{library} has quantized it before"


def skipped(job: Job, stage: str) -> str | None:
    """Why a stage is skipped; None where it is not."""
    policy = job.external
    if policy is None:
        return None
    reason = ALREADY if stage == "quantize" and policy.path is not None else REASONS[stage]
    return f"skipped: {reason.format(library=policy.who)}"


def load_judged(job: Job, tell: bool = True) -> tuple[Any, dict[str, Any]]:
    """The pipeline that the run judges, and, on the first process, which backend (or library) computes how many of its
    Linears; tell: say what the library did.
    """
    e = job.experiment
    if (policy := job.external) is not None:
        pipeline = load_external(job, policy)
        if not job.processes.first:
            return pipeline, {}
        told = told_of(job, policy)
        if tell:
            job.say(f"      {_line(told)}")
        return pipeline, {"requested": policy.who, "layers": {policy.who: len(told["quantized"])}}
    pipeline = job.load_quantized()
    return pipeline, {"requested": e.backend, "layers": backend_counts(e.adapter.denoiser_of(pipeline))}


def sizes_of(job: Job) -> dict[str, Any]:
    """Bits and bytes of the denoisers, as metrics.json has them."""
    keys = ("average_weight_bits", "average_activation_bits", "float_size_bytes")
    if (policy := job.external) is not None:
        told = told_of(job, policy)
        return {key: told[key] for key in (*keys, "size_bytes", "size_of", "on_disk")}
    folder = job.run_dir.artifact
    meta = read_json(folder / "meta.json")
    size = denoiser_bytes(folder) + meta.get("left_in_float_bytes", 0)
    return {key: meta[key] for key in keys} | {"size_bytes": size}


def plan_of(job: Job) -> dict[str, Any]:
    """Formats by Linear, as plan.json has them."""
    if (policy := job.external) is not None:
        return dict(told_of(job, policy)["plan"])
    return dict(read_json(job.run_dir.artifact / "plan.json"))


def load_external(job: Job, policy: ExternalQuantization) -> Any:
    """The pipeline with denoisers that the library has quantized, without its text part; leaves external.json."""
    adapter, file = job.experiment.adapter, job.run_dir.external
    denoiser = load_denoisers(adapter, policy)
    if job.processes.first and not is_whole(file):  # also called where the others are at something else
        write_json(file, describe(adapter, policy, job.experiment.roles, denoiser))
    return adapter.load(denoiser)


def told_of(job: Job, policy: ExternalQuantization) -> dict[str, Any]:
    """The content of external.json, made anew where it is missing."""
    if not is_whole(job.run_dir.external):
        load_external(job, policy)
    found: dict[str, Any] = read_json(job.run_dir.external)
    return found


def _line(told: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    line = f"{told['library']} ({versions or 'no package'}): {len(told['quantized'])} Linears quantized"
    for key, words in (
        ("left_in_float", "that our recipes quantize are left in float"),
        ("also_quantized", "that the model keeps in float are quantized"),
    ):
        if names := told[key]:
            line += f"; {len(names)} {words}, such as {names[0]}"
    return f"{line}; {told['size_bytes'] / 1e6:.2f} MB, of {told['size_of']}"

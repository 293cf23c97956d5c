"""The most that each stage holds, put together from weights, activations and statistics; all in bytes.

A model of what the code does (which copies live at once), set against measurements in docs/estimate.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from viditq.quant.sizes import WeightBytes

# Of the dense weights, while they are made: glibc's heap keeps the holes of temporaries between them until `give_back`.
HOLES, HOLES_QUANTIZING = 0.4, 0.2
# Bytes for each weight of a block while its roundings are learned: the block twice, soft roundings with their gradient
# and the optimizer's two moments, what they are computed from, temporaries.
LEARNING_PER_WEIGHT = 72
# What every stage adds, beside what is counted: code loaded when it is first used (18 MB), workspace of matrix
# products, stacks of threads. What a quantized denoiser adds: the code of the kernels (48 MB of mapped files).
UNCOUNTED, KERNELS = 64 * 2**20, 48 * 2**20
# The heap's holes between activations: as much again (on models of 10 to 70 M parameters twice that, with
# MALLOC_MMAP_THRESHOLD_ half), but tensors of 32 MiB and more lie outside of it and leave none.
HOLES_AT_MOST = 256 * 2**20
TEMPORARY_PER_WEIGHT = 21  # while a weight is quantized: float32 copies, scaled and rounded, int16 and uint8 codes


@dataclass(frozen=True)
class Pieces:
    """denoiser, rest, text: weights as loaded (rest: VAE and others, float_denoisers among them). file: the largest
    with weights of a denoiser, whose pages are in memory while it is loaded. step, decode: activations.

    stats: calibration statistics. observed: those gathered while diagnosing, where nothing is calibrated. weights: the
    quantized denoiser. largest_layer: weights of the largest Linear. learned_block: of the largest block whose
    roundings are learned together. processes: how many share the work. measuring: the batch of calibration and
    diagnosis, in batches of generation.
    """

    denoiser: int
    rest: int
    text: int
    file: int
    step: int
    decode: int
    stats: int
    weights: WeightBytes
    largest_layer: int
    observed: int = 0
    learned_block: int = 0
    processes: int = 1
    measuring: float = 1.0
    float_denoisers: int = 0


@dataclass(frozen=True)
class Peak:
    """ram: of the process, without interpreter and libraries. vram: None on a CPU."""

    ram: int
    vram: int | None = None


def larger(one: Peak, other: Peak) -> Peak:
    """The peak of two pieces of work one after the other."""
    vram = None if one.vram is None or other.vram is None else max(one.vram, other.vram)
    return Peak(max(one.ram, other.ram), vram)


def peaks(p: Pieces, gpu: bool, offload: str | None, largest_layer_bytes: int) -> dict[str, Peak]:
    """Stage -> its peak."""
    activations, measured = max(p.step, p.decode), round(p.step * max(p.measuring, 1.0))
    models = p.denoiser + p.rest
    quantized = p.weights.resident + p.rest
    both = models + quantized
    # beside the prepared weights what the artifact's file holds: packed codes, the rest in half
    reading = p.weights.resident + round(HOLES * p.weights.dense) + p.weights.codes + p.weights.rest // 2
    loading = dict.fromkeys(("reference", "noise_floor", "calibrate"), models + p.file) | {
        "generate": reading,
        "diagnose": models + max(p.file, reading),
        "benchmark": models + max(models + p.file, p.denoiser // 2 + reading),  # in half it is loaded in whole
    }
    kernels = dict.fromkeys(("generate", "diagnose", "benchmark"), KERNELS)
    # what is on the CPU whatever computes; and beside it, on the device that computes
    on_cpu = {
        "prompts": p.text,
        "reference": models,
        "noise_floor": models,
        # the observers beside the model; then, where there are several processes, the files of two
        "calibrate": p.stats + (models if p.processes == 1 else max(models, p.stats)),
        "quantize": p.denoiser
        + p.float_denoisers
        + p.stats
        + p.weights.resident
        - p.weights.rest
        + round(HOLES_QUANTIZING * p.weights.dense)
        + max(p.stats, TEMPORARY_PER_WEIGHT * p.largest_layer, p.weights.rest // 2),
        "generate": quantized,
        "benchmark": both + p.denoiser // 2,  # float, the same in bfloat16, and quantized
        # the observers, and the file read back, or those of two processes
        "diagnose": both + (2 if p.processes == 1 else 3) * p.observed,
    }
    computing = {
        "prompts": 0,
        "reference": activations,
        "noise_floor": activations,
        "calibrate": measured,
        "quantize": LEARNING_PER_WEIGHT * p.learned_block,
        "generate": activations,
        "diagnose": 2 * measured,
        "benchmark": p.step,
    }
    if not gpu:
        found = {}
        for stage, size in on_cpu.items():
            computed = size + computing[stage] + min(computing[stage], HOLES_AT_MOST)
            found[stage] = Peak(UNCOUNTED + kernels.get(stage, 0) + max(computed, loading.get(stage, 0)))
        return found
    resident = {
        "prompts": 0,
        "reference": models,
        "noise_floor": models,
        "calibrate": models + p.stats,
        "quantize": 0,
        "generate": quantized,
        "diagnose": both,
        "benchmark": both + p.denoiser // 2,
    }
    if offload == "model":
        resident = {stage: max(size - p.rest, p.rest) if size else 0 for stage, size in resident.items()}
        resident["diagnose"] = p.denoiser + largest_layer_bytes  # the quantized one always goes layer by layer
    if offload == "sequential":
        resident = {stage: largest_layer_bytes if size else 0 for stage, size in resident.items()}
        resident["calibrate"] += p.stats
    resident["diagnose"] += p.observed
    return {
        stage: Peak(
            UNCOUNTED + kernels.get(stage, 0) + max(size, loading.get(stage, 0)), resident[stage] + computing[stage]
        )
        for stage, size in on_cpu.items()
    }

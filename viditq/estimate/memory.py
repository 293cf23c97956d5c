"""The most that each stage holds, put together from weights, activations and statistics; all in bytes.

A model of what the code does (which copies live at once), set against measurements in docs/estimate.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from viditq.quant.description.plan import QuantPlan
from viditq.quant.sizes import WeightBytes

# Of the dense weights, while they are made: glibc's heap keeps the holes of temporaries between them until `give_back`.
HOLES = 0.4
# Bytes for each weight of a block while its roundings are learned: the block twice, soft roundings with their gradient
# and the optimizer's two moments, what they are computed from, temporaries.
LEARNING_PER_WEIGHT = 72
# What every stage adds, beside what is counted: code loaded when it is first used (18 MB), workspace of matrix
# products, stacks of threads. What a quantized denoiser adds: the code of the kernels (48 MB of mapped files).
UNCOUNTED, KERNELS = 64 * 2**20, 48 * 2**20
# The heap's holes between activations: as much again, and four times as much where what is observed of inputs stays
# between them (tiny_video: 122 MB for 23 MB of activations, none with MALLOC_MMAP_THRESHOLD_=1000000, which costs
# time); but tensors of 32 MiB and more lie outside of the heap and leave none.
HOLES_OBSERVING, HOLES_AT_MOST = 4, 256 * 2**20
# For each weight of a Linear that is quantized as a whole: float32 copies, scaled and rounded, int16 and uint8 codes;
# of one that is quantized some rows at a time: its codes, those of the one before, pages of its file.
WHOLE_PER_WEIGHT, ROWS_PER_WEIGHT = 21, 4
MOMENTS_PER_ENTRY = 12  # of the matrix of a layer's second moments: it, its inverse and a factor, float32
SAMPLING = ("reference", "noise_floor", "generate")  # stages whose batches may be made side by side


@dataclass(frozen=True)
class Pieces:
    """denoiser, rest, text: weights as loaded (rest: VAE and others). file: the largest with weights of the denoiser,
    whose pages are in memory while it is loaded. step, decode: activations.

    stats: calibration statistics, of which `spared` are never held at once while calibrating. observed: those gathered
    while diagnosing, where nothing is calibrated. weights: the quantized denoiser. quantizing: what one Linear takes
    then (`held_while_quantizing`). learned_block: weights of the largest block whose roundings are learned together.
    processes: how many share the work. workers: that sample side by side in each of SAMPLING. measuring: the batch of
    calibration and diagnosis, in batches of generation. encoding: what the text encoders compute with. text_file: the
    files of the largest, whose pages are there as well while it is loaded.
    """

    denoiser: int
    rest: int
    text: int
    file: int
    step: int
    decode: int
    stats: int
    weights: WeightBytes
    quantizing: int
    observed: int = 0
    learned_block: int = 0
    processes: int = 1
    workers: int = 1
    measuring: float = 1.0
    spared: int = 0
    encoding: int = 0
    text_file: int = 0


@dataclass(frozen=True)
class Peak:
    """ram: of the process, without interpreter and libraries. vram: None on a CPU."""

    ram: int
    vram: int | None = None


def larger(one: Peak, other: Peak) -> Peak:
    """The peak of two pieces of work one after the other."""
    vram = None if one.vram is None or other.vram is None else max(one.vram, other.vram)
    return Peak(max(one.ram, other.ram), vram)


def with_holes(computing: int, times: int = 1) -> int:
    """Activations, and what the heap keeps between them: so many times as much."""
    return computing + min(times * computing, HOLES_AT_MOST)


def held_while_quantizing(plan: QuantPlan, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The most that quantizing one Linear of a plan takes; shapes: Linear -> (out_features, in_features)."""
    most = 0
    for name in plan.layers:
        out_features, in_features = shapes[name]
        for segment in range(plan.num_segments):
            scheme = plan.scheme(name, segment)
            if scheme is not None:
                moments = MOMENTS_PER_ENTRY * in_features**2 if scheme.moments_for(name) else 0
                per_weight = ROWS_PER_WEIGHT if scheme.rows_apart and not moments else WHOLE_PER_WEIGHT
                most = max(most, per_weight * out_features * in_features + moments)
    return most


def peaks(p: Pieces, gpu: bool, offload: str | None, largest_layer_bytes: int) -> dict[str, Peak]:
    """Stage -> its peak."""
    activations, measured = max(p.step, p.decode), round(p.step * max(p.measuring, 1.0))
    models, observed = p.denoiser + p.rest, p.stats - p.spared
    quantized = p.weights.resident + p.rest
    both = models + quantized
    # beside the prepared weights what the artifact's files hold: packed codes, the rest in half
    reading = p.weights.resident + round(HOLES * p.weights.dense) + p.weights.codes + p.weights.rest // 2
    loading = dict.fromkeys(("reference", "noise_floor", "calibrate"), models + p.file) | {
        "generate": reading,
        "diagnose": models + max(p.file, reading),
        "benchmark": models + max(models + p.file, p.denoiser // 2 + reading),  # in half it is loaded in whole
    }
    kernels = dict.fromkeys(("generate", "diagnose", "benchmark"), KERNELS)
    # what is on the CPU whatever computes; and beside it, on the device that computes
    on_cpu = {
        "prompts": p.text + max(p.text_file, with_holes(p.encoding)),
        "reference": models,
        "noise_floor": models,
        # the observers beside the model; then, where there are several processes, the files of two
        "calibrate": observed + (models if p.processes == 1 else max(models, observed)),
        "quantize": p.quantizing,
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
            computed = size + with_holes(computing[stage], HOLES_OBSERVING if stage == "calibrate" else 1)
            if stage in SAMPLING:
                computed += (p.workers - 1) * (with_holes(activations) + UNCOUNTED)
            found[stage] = Peak(UNCOUNTED + kernels.get(stage, 0) + max(computed, loading.get(stage, 0)))
        return found
    resident = {
        "prompts": 0,
        "reference": models,
        "noise_floor": models,
        "calibrate": models + observed,
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
        resident["calibrate"] += observed
    resident["diagnose"] += p.observed
    return {
        stage: Peak(
            UNCOUNTED + kernels.get(stage, 0) + max(size, loading.get(stage, 0)), resident[stage] + computing[stage]
        )
        for stage, size in on_cpu.items()
    }

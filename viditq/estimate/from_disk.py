"""Peaks where weights lie in their files (`trainer.offload=disk`, `memory_budget`), and those of using the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from viditq.estimate.memory import HOLES_OBSERVING, KERNELS, UNCOUNTED, Peak, Pieces, peaks, with_holes
from viditq.on_disk import comes_and_goes, held_by_call
from viditq.quant.execution.linear import quant_linears
from viditq.quant.execution.residency import largest_bytes
from viditq.quant.sizes import tensor_bytes

PAGES = 48 * 2**20  # of mapped files: headers, what is read ahead, embeddings' rows


@dataclass(frozen=True)
class OnDisk:
    """Bytes of a model in its files: always in memory; of the layer that computes, with what is read of its file."""

    always: int = 0
    passing: int = 0

    @property
    def least(self) -> int:
        """What it takes at least."""
        return self.always + self.passing


def together(models: Iterable[OnDisk]) -> OnDisk:
    """Of several that compute one after the other."""
    found = [*models]
    return OnDisk(sum(one.always for one in found), max((one.passing for one in found), default=0))


def on_disk(model: nn.Module, stored: Mapping[str, torch.dtype]) -> OnDisk:
    """Of a model on meta in the types that it runs in; stored: parameter -> its type in the file, where it is known."""
    layers = quant_linears(model)
    inside = {id(part) for layer in layers.values() for part in layer.modules()}
    always = largest = 0
    for prefix, module in model.named_modules():
        if id(module) in inside:
            continue
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            kept = _as_stored(parameter, stored.get(f"{prefix}.{key}" if prefix else key))
            if comes_and_goes(module, kept):
                read = held_by_call(module, kept, torch.promote_types(kept.dtype, parameter.dtype))
                largest = max(largest, held_by_call(module, parameter, parameter.dtype) + read)
            else:
                always += parameter.nbytes
        always += tensor_bytes(buffer for buffer in module._buffers.values() if buffer is not None)
    always += sum(layer.bias.nbytes for layer in layers.values() if layer.bias is not None)
    if layers:
        largest = max(largest, 2 * max(map(largest_bytes, layers.values())))
    return OnDisk(always, largest)


def _as_stored(parameter: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On meta; where its type is not known in the narrowest, so that rather too much counts as always in memory."""
    narrow = torch.bfloat16 if parameter.is_floating_point() else parameter.dtype
    return torch.empty_like(parameter, dtype=dtype or narrow, device="meta")


@dataclass(frozen=True)
class Budgeted:
    """What `peaks_from_disk` adds to `Pieces`, by model.

    denoiser: in float; floor: in the other type of the noise floor. text: all float encoders. quantized: the denoiser;
    budget: bytes that it may take. encoders: text encoders that are quantized; left, float_text: the others where they
    lie in files, and their bytes as whole ones.
    """

    denoiser: OnDisk
    floor: OnDisk
    text: OnDisk
    quantized: OnDisk
    encoders: OnDisk
    left: OnDisk
    float_text: int
    budget: int

    def taken(self, resident: int) -> int:
        """Bytes of the quantized denoiser under its budget. resident: of all of it."""
        least = self.quantized.least
        return max(least, min(self.budget, resident + self.quantized.passing))


def peaks_from_disk(p: Pieces, b: Budgeted) -> dict[str, Peak]:
    """Stage -> its peak with `trainer.offload=disk`, on a CPU; benchmark is left out there."""
    found = peaks(p, gpu=False, offload=None, largest_layer_bytes=0)
    observed, sampling, measured = p.stats - p.spared, max(p.step, p.decode), round(p.step * max(p.measuring, 1.0))
    taken = KERNELS + b.taken(p.weights.resident)
    models = p.rest + b.denoiser.least
    held = {
        "prompts": b.text.least + with_holes(p.encoding),
        "reference": models + with_holes(sampling),
        "noise_floor": p.rest + b.floor.least + with_holes(max(2 * p.step, p.decode)),
        "calibrate": observed
        + (models if p.processes == 1 else max(models, observed))
        + with_holes(measured, HOLES_OBSERVING),
        "generate": max(p.rest + taken + with_holes(sampling), b.encoders.least + with_holes(p.encoding)),
        "diagnose": models + taken + (2 if p.processes == 1 else 3) * p.observed + with_holes(2 * measured),
    }
    del found["benchmark"]
    return found | {stage: Peak(UNCOUNTED + PAGES + size) for stage, size in held.items()}


def use_from_disk(p: Pieces, b: Budgeted) -> Peak:
    """Of `load_quantized(run, memory_budget=...)` and a call with a prompt."""
    text, rest = together([b.left, b.encoders]), p.rest + b.taken(p.weights.resident)
    called = max(text.passing + with_holes(p.encoding), with_holes(max(p.step, p.decode)))
    return Peak(UNCOUNTED + PAGES + KERNELS + rest + text.always + called)


def use(p: Pieces, text: int, encoders: int, gpu: bool) -> Peak:
    """Of `load_quantized(run)` and a call with a prompt; text, encoders: bytes of float and of quantized encoders.

    On a GPU the pipeline is moved there as a whole.
    """
    whole = p.rest + p.weights.resident + text + encoders
    loading = peaks(replace(p, step=0, decode=0), gpu, None, 0)["generate"].ram
    computing = max(p.encoding, p.step, p.decode)
    file = p.text_file if text else 0
    called = UNCOUNTED + KERNELS + whole + max(file, 0 if gpu else with_holes(computing))
    return Peak(max(loading, called), whole + computing if gpu else None)

"""What of a denoiser another library has quantized: which Linears, how many bits and bytes."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from viditq.errors import UserError
from viditq.external.denoisers import source_of
from viditq.external.policy import ExternalQuantization
from viditq.models.adapter import ModelAdapter
from viditq.models.roles import FLOAT
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.sizes import held_bytes

FLOAT_BITS = 16


def quantized_linears(denoiser: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the float model's Linears that are none any more; raises UserError where the structure is another."""
    modules = dict(denoiser.named_modules())
    absent = [name for name in names if name not in modules]
    if absent:
        raise UserError(
            f"The quantized denoiser has no {absent[0]}, which the float model has: it is of another model."
        )
    return [name for name in names if not _is_float(modules[name])]


def _is_float(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    plain = type(module) is nn.Linear and type(weight) is nn.Parameter
    return plain and weight.is_floating_point() and weight.element_size() > 1


def describe(adapter: ModelAdapter, policy: ExternalQuantization, roles: Mapping[str, str], denoiser: Any) -> Any:
    """What external.json says of it, in plain values. roles: every Linear of the float model -> its role.

    left_in_float: Linears that our recipes quantize and the library has not; also_quantized: those that the model keeps
    in float and the library does not.
    """
    shapes = shapes_of(adapter.build_denoiser())
    floats = adapter.build_float_denoisers()
    found = quantized_linears(denoiser, list(roles))
    if not found:
        raise UserError(
            f"{policy.who} has left every Linear of {adapter.name} in float, so that there is nothing to judge. "
            "Look at its own limits (least sizes, layers to skip), or leave quant=external out."
        )
    size, of, on_disk = stored_bytes(adapter, policy, denoiser)
    in_half = sum(2 * p.numel() for p in [*adapter.build_denoiser().parameters(), *floats.parameters()])
    bits = _weight_bits(policy, denoiser, found, shapes)
    left = shapes | shapes_of(floats)
    return {
        "library": policy.who,
        "versions": policy.versions,
        "quantized": found,
        "left_in_float": [n for n, role in roles.items() if role != FLOAT and n not in found],
        "also_quantized": [n for n, role in roles.items() if role == FLOAT and n in found],
        "average_weight_bits": _mean(bits, found, {n: out * inputs for n, (out, inputs) in left.items()}),
        "average_activation_bits": _mean(policy.activation_bits, found, {n: i for n, (_, i) in left.items()}),
        "size_bytes": size + adapter.left_in_float_bytes(),
        "size_of": of,
        "on_disk": on_disk,
        "float_size_bytes": in_half,
        "plan": _plan(policy, bits, found),
    }


def _weight_bits(
    policy: ExternalQuantization, denoiser: nn.Module, found: list[str], shapes: Mapping[str, Any]
) -> float:
    """As told, or counted: of all that its quantized Linears hold but their biases, scales included."""
    if policy.weight_bits is not None:
        return float(policy.weight_bits)
    held = weights = 0
    for name in found:
        module, bias = denoiser.get_submodule(name), getattr(denoiser.get_submodule(name), "bias", None)
        held += held_bytes(module) - (0 if bias is None else bias.numel() * bias.element_size())
        weights += shapes[name][0] * shapes[name][1]
    return min(float(FLOAT_BITS), 8 * held / weights)


def _mean(bits: float, found: Sequence[str], numel: Mapping[str, int]) -> float:
    quantized = sum(numel[name] for name in found)
    total = sum(numel.values())
    return (bits * quantized + FLOAT_BITS * (total - quantized)) / total


def _plan(policy: ExternalQuantization, bits: float, found: Sequence[str]) -> dict[str, Any]:
    """For the page, as plan.json has it."""
    sides = {"weight": bits, "activation": policy.activation_bits}
    scheme = {side: {"bits": round(value)} if value < FLOAT_BITS else None for side, value in sides.items()}
    return {"edges": [0.0, 1.0], "schemes": {policy.who: scheme}, "layers": {n: [policy.who] for n in found}}


def stored_bytes(adapter: ModelAdapter, policy: ExternalQuantization, denoiser: nn.Module) -> tuple[int, str, bool]:
    """Bytes, of what, and whether on disk: of the files it was read from, those that save_pretrained writes, or, where
    the library cannot save, of the tensors in memory.
    """
    if policy.path is not None:
        sources = {source_of(adapter, policy, name) for name in adapter.denoiser_names}
        return sum(map(_file_bytes, sources)), "the files given", True
    parts: Any = denoiser.values() if isinstance(denoiser, nn.ModuleDict) else [denoiser]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for number, part in enumerate(parts):
                part.save_pretrained(Path(scratch) / str(number))
            return _file_bytes(Path(scratch)), "what save_pretrained writes", True
    except Exception as error:  # whatever a library raises
        reason = f"its tensors in memory: save_pretrained cannot ({type(error).__name__}: {error})"
        return held_bytes(denoiser), reason, False


def _file_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())

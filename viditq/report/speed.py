"""What a step of the denoiser takes, in words and bars, from speed.json; and whether its integers were emulated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from viditq.report.wording import num_bytes, three_digits

EMULATION = "fake"  # the backend that computes in floating point what integers would give
COMPILED = "_compiled"


@dataclass(frozen=True)
class Bar:
    """One candidate; `share`: per cent of the slowest one. Words are empty where the system told no bytes."""

    label: str
    time: str
    spread: str
    weights: str
    step: str
    share: float
    quantized: bool


@dataclass(frozen=True)
class SpeedView:
    """The bars, slowest first, and what the times depend on."""

    bars: tuple[Bar, ...]
    where: str


def emulated(backend: Mapping[str, Any] | None) -> str:
    """`emulated`, `emulated in part`, or nothing: whether what should be integers ran in floating point.

    backend: metrics.json's or speed.json's: the one requested, and how many Linears each computed (None: not known).
    """
    if backend is None:
        return ""
    layers = backend["layers"]
    if layers is None:
        return "emulated" if backend["requested"] == EMULATION else ""
    if EMULATION not in layers:
        return ""
    return "emulated" if len(layers) == 1 else "emulated in part"


def emulation(backend: Mapping[str, Any] | None) -> str:
    """The same as a sentence."""
    word = emulated(backend)
    if word != "emulated in part" or backend is None:
        return word and "Emulated: the quantized Linears ran in floating point, without a gain in time or memory."
    count, total = backend["layers"][EMULATION], sum(backend["layers"].values())
    return f"Emulated in part: {count} of {total} quantized Linears ran in floating point."


def measured(speed: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Mapping[str, Any]]]:
    """The quantized candidate as the run computes it, compiled or not, and what it is set against, float first."""
    candidates = speed["candidates"]
    end = COMPILED if f"quantized{COMPILED}" in candidates else ""
    others = {name: c for name, c in candidates.items() if name.endswith(COMPILED) == bool(end)}
    return others.pop(f"quantized{end}"), others


def speed_line(backend: Mapping[str, Any] | None, speed: Mapping[str, Any] | None) -> str:
    """The line of the headline: emulated or not, the step's time against float's, the weights' memory."""
    told = [emulation(backend)]
    if speed is not None:
        mine, others = measured(speed)
        median = mine["seconds"]["median"]
        ratios = [(other["seconds"]["median"] / median, other["dtype"]) for other in others.values()]
        against = " and ".join(f"{three_digits(ratio)} times the speed of {dtype}" for ratio, dtype in ratios)
        float_bytes = next(iter(others.values()))["weights_bytes"]
        told.append(
            f"A step of the denoiser takes {milliseconds(median)}, {against}; its weights hold "
            f"{num_bytes(mine['weights_bytes'])} of memory, those of float {num_bytes(float_bytes)}."
        )
    return " ".join(filter(None, told))


def speed_view(speed: Mapping[str, Any]) -> SpeedView:
    """All candidates, slowest first."""
    ordered = sorted(speed["candidates"].items(), key=lambda item: -item[1]["seconds"]["median"])
    slowest = ordered[0][1]["seconds"]["median"] or 1.0
    bars = []
    for name, c in ordered:
        seconds = c["seconds"]
        bars.append(
            Bar(
                label=label_of(name, c, speed),
                time=milliseconds(seconds["median"]),
                spread=f"{milliseconds(seconds['low'])} to {milliseconds(seconds['high'])}",
                weights=num_bytes(c["weights_bytes"]),
                step="–" if c["step_bytes"] is None else num_bytes(c["step_bytes"]),
                share=round(100 * seconds["median"] / slowest, 1),
                quantized=name.startswith("quantized"),
            )
        )
    return SpeedView(tuple(bars), f"{speed['rounds']} rounds in random order, {conditions(speed)}")


def label_of(name: str, candidate: Mapping[str, Any], speed: Mapping[str, Any]) -> str:
    """`float32`, `quantized (native), compiled`."""
    layers = speed["backend"]["layers"]
    ran = " and ".join(layers) or "nothing quantized"
    label = f"quantized ({ran})" if name.startswith("quantized") else candidate["dtype"]
    return f"{label}, compiled" if candidate["compiled"] else label


def conditions(speed: Mapping[str, Any]) -> str:
    """What times depend on: `8 prompts at once, 1 thread on 2 cores of AMD EPYC (avx2, ...), torch 2.13`."""
    machine = speed["machine"]
    count, threads, cores = speed["batch_size"], machine["threads"], machine["cores"]
    on = machine["gpu"] or (
        f"{threads} {'thread' if threads == 1 else 'threads'} on {cores} {'core' if cores == 1 else 'cores'} of "
        f"{machine['cpu']} ({', '.join(machine['isa'])})"
    )
    return f"{count} {'prompt' if count == 1 else 'prompts'} at once, {on}, torch {machine['torch']}"


def milliseconds(seconds: float) -> str:
    """`55.8 ms`, or seconds from ten on."""
    return f"{three_digits(1e3 * seconds)} ms" if seconds < 10 else f"{three_digits(seconds)} s"


def speed_numbers(speed: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers for loggers: `quantized/median`, `quantized/weights_bytes`, ..."""
    found: dict[str, float | None] = {}
    for name, c in speed["candidates"].items():
        found |= {f"{name}/{key}": value for key, value in c["seconds"].items()}
        found |= {f"{name}/{key}": c[key] for key in ("weights_bytes", "step_bytes")}
    return {key: value for key, value in found.items() if value is not None}

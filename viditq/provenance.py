"""Where a run's numbers come from: the command, the versions, the machine."""

import os
import platform
import shlex
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from viditq.config import program

if TYPE_CHECKING:  # a finished run asks for the versions alone, before torch is imported
    import torch

    from viditq.report.content import Machine

PACKAGES = ("viditq", "torch", "diffusers", "transformers", "torchmetrics", "lightning", "hydra-core")
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
COMMAND_OF_RUN = "VIDITQ_COMMAND_OF_RUN"  # for the processes of a run, which have an argv of their own


def command() -> str:
    """The command line that repeats this run alone, a job of a sweep too."""
    if COMMAND_OF_RUN in os.environ:
        return os.environ[COMMAND_OF_RUN]
    if not HydraConfig.initialized():
        return "viditq.runner.run(...)  # called from Python"
    return shlex.join([*program(), *HydraConfig.get().overrides.task, *alone(HydraConfig.get().sweeper)])


def alone(sweeper: Mapping[str, Any]) -> list[str]:
    """What a command line needs beside its overrides to be one run, where its experiment describes a sweep.

    sweeper: hydra.sweeper of the run.
    """
    return ["hydra.mode=RUN"] if sweeper.get("params") else []


def versions() -> dict[str, str]:
    """Package -> version, of what the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def machine() -> "Machine":
    """The processor, its cores that this process may use, and the GPU."""
    import torch

    from viditq.report.content import Machine

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(_processor(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, gpu)


def compute(device: "torch.device") -> dict[str, Any]:
    """What a measured time depends on: processor, its cores and instructions, threads, GPU, torch."""
    import torch

    here, known = machine(), torch.cpu.get_capabilities()
    return {
        "cpu": here.cpu,
        "cores": here.cores,
        "threads": torch.get_num_threads(),
        "isa": [name for name in INSTRUCTIONS if known.get(name)],
        "gpu": here.gpu if device.type == "cuda" else None,
        "torch": torch.__version__,
    }


def computed_on(threads: Collection[int], processes: int, device: "torch.device") -> str:
    """What seconds depend on, in words: `1 thread of AMD EPYC`, `2 processes of 1 to 2 threads of ...`, or the GPU.

    threads: the numbers of threads that a process had meanwhile.
    """
    here, low, high = machine(), min(threads), max(threads)
    each = f"{low} thread{'s' * (low != 1)}" if low == high else f"{low} to {high} threads"
    on = here.gpu if device.type == "cuda" and here.gpu else f"{each} of {here.cpu}"
    return on if processes == 1 else f"{processes} processes of {on}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

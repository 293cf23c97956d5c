"""torch.compile of a denoiser's forward: float and quantized alike, hooks stay outside of it."""

import copy
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from viditq.errors import UserError


def check_compiler(device: torch.device, offload: str | None) -> None:
    """Raises UserError where torch.compile finds nothing to compile with for this device, or weights come and go."""
    if offload is not None:
        raise UserError(
            f"model.compile=true with trainer.offload={offload}: what brings the weights would cut the compiled graph "
            "into pieces. Choose one of the two."
        )
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UserError(
                f"model.compile=true needs a C++ compiler, and {compiler} is not there. Install g++ (or name another "
                "in the variable CXX), or leave model.compile=false."
            )
    elif importlib.util.find_spec("triton") is None:
        raise UserError(
            "model.compile=true on a GPU needs the package triton, which is not installed. Install it, or leave "
            "model.compile=false."
        )


def compile_forward(denoiser: nn.Module) -> nn.Module:
    """Let torch compile what `denoiser` computes, at its first call for each segment and shape; in place.

    Its own hooks run before and after as they are: one reads the timestep, which decides the segment, and so there is
    one graph for each segment. An nn.ModuleDict is compiled part by part. Before that, the first call is computed as it
    is and let go of: what checks itself once, as fused blocks do, cannot do so inside a graph.
    """
    for part in denoiser.values() if isinstance(denoiser, nn.ModuleDict) else [denoiser]:
        part.forward = _checked_first(part.forward, torch.compile(part.forward))
    return denoiser


def _checked_first(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    seen = False

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if not seen:
            seen = True
            plain(*args, **kwargs)
        return compiled(*args, **kwargs)

    return forward


def compiled_twin(denoiser: nn.Module) -> nn.Module:
    """A compiled denoiser that shares everything with `denoiser`, which stays as it is."""
    if isinstance(denoiser, nn.ModuleDict):
        return nn.ModuleDict({name: compiled_twin(part) for name, part in denoiser.items()})
    return compile_forward(copy.copy(denoiser))

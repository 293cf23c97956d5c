"""The kernels of this backend: what they are built of, and whether they are exact here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from viditq import kernels
from viditq.errors import UserError
from viditq.quant.execution.backends.base import Unavailable

SOURCES = ("linear.cpp", "activations.h", "amx.h", "epilogue.h", "multiply.h", "product.h", "quantize.h", "vectors.h")
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c")
FASTER = ("avx512bf16",)  # used where the CPU has it
OPERATORS = ("linear", "linears", "transform")

_state: Unavailable | bool = False


def load() -> None:
    """Makes `torch.ops.viditq.linear` available, once per process; raises Unavailable, at every call."""
    global _state
    if _state is False:
        try:
            _load()
            _state = True
        except Unavailable as reason:
            _state = reason
    if isinstance(_state, Unavailable):
        raise _state


def _load() -> None:
    try:
        kernels.check_cpu(INSTRUCTIONS)
        kernels.load(
            [Path(__file__).with_name(name) for name in SOURCES], [*INSTRUCTIONS, *filter(kernels.has, FASTER)]
        )
    except kernels.CannotBuild as reason:
        raise Unavailable("native", str(reason)) from reason
    for name in OPERATORS:
        torch.library.impl(f"viditq::{name}", "cuda", _on_a_gpu)
    if not _how():
        raise Unavailable("native", "u8 times s8 is not summed exactly on this CPU")


def _how() -> str:
    return torch.ops.viditq.native_prepare(True)


def _on_a_gpu(*args: Any) -> Any:
    raise UserError(
        "the model was loaded for the CPU (backend native) and then moved to a GPU, where its packed weights cannot be "
        'multiplied: load it with backend="cuda", or with backend="fake", which runs anywhere'
    )

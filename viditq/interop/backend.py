"""Which backend multiplies, after a model has been loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from viditq.fusion.install import fuse_blocks, unfuse_blocks
from viditq.quant.execution.backends import check_supported, get_backend
from viditq.quant.execution.linear import QuantLinear, quant_linears
from viditq.quant.execution.variant import Variant


def set_backend(denoiser: nn.Module, backend: str) -> None:
    """Let `backend` (docs/backends.md) multiply from now on, and fuse the blocks that it can.

    Where backend=auto, layers on a CUDA device get what is fastest there, on others emulation. Raises UserError for a
    backend that cannot run a layer, before anything is changed.
    """
    chosen, on_gpu, emulation = (get_backend(name) for name in (backend, "cuda", "fake"))
    layers = quant_linears(denoiser)
    for name, layer in layers.items():
        for variant in layer.variants:
            check_supported(chosen, name, cast(Variant, variant).scheme)
    unfuse_blocks(denoiser)
    for layer in layers.values():
        kind = next((tensor.device.type for tensor in _tensors(layer) if tensor.device.type != "cpu"), "cpu")
        elsewhere = on_gpu if kind == "cuda" else emulation
        layer.use(elsewhere if kind != "cpu" and backend == "auto" else chosen)
    fuse_blocks(denoiser)


def _tensors(layer: QuantLinear) -> Iterator[Tensor]:
    yield from layer.buffers()
    for variant in layer.variants:
        yield from cast(Variant, variant).held_tensors()

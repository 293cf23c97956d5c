"""Tokens out of a patch embedding in the order in which blocks read them.

torch's convolution puts channels before places. A model then looks at its output as [B, N, C] through strides, and in
16 bits everything up to the first block takes many times as long for it: the convolution itself, positions, copies.

Legend: B batch, N tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LARGE = 2**16  # values of a sample from which on one copy each pays


class FusedPatches:
    """Mixin before a convolution's own class: its output has the channels last in memory, and the same values.

    In float32 torch may sum in another order then, for no gain: it stays as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and x.ndim in LAST:
            x = x.contiguous(memory_format=LAST[x.ndim])
        return super().forward(x)  # type: ignore[misc,no-any-return]

    def _get_name(self) -> str:
        """What it is called where modules are printed."""
        return "Conv2d" if isinstance(self, nn.Conv2d) else "Conv3d"


class FusedPatches2d(FusedPatches, nn.Conv2d):
    """Of pictures."""


class FusedPatches3d(FusedPatches, nn.Conv3d):
    """Of clips."""


def cuts_patches(module: nn.Module) -> bool:
    """Whether it is a convolution over patches that do not overlap."""
    return type(module) in (nn.Conv2d, nn.Conv3d) and module.kernel_size == module.stride  # type: ignore[attr-defined]


def in_rows(x_BNC: Tensor) -> Tensor:
    """The same, contiguous.

    Where channels come before tokens in memory, each sample is a transposed matrix, which torch copies several times
    as fast as all of them together.
    """
    if x_BNC.is_contiguous() or x_BNC.device.type != "cpu" or x_BNC.stride(1) != 1 or x_BNC[0].numel() < LARGE:
        return x_BNC.contiguous()
    return torch.stack([sample.contiguous() for sample in x_BNC])

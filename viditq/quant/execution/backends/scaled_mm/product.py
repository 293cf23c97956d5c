"""Products of FP8 numbers with a scale for each row and output, or for all of a tensor, and who may compute them.

Legend: M rows, O out_features, C in_features, P and Q are O and C padded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.execution.backends.cuda.behind import allowed, finished
from viditq.quant.execution.backends.cuda.choice import Candidate
from viditq.quant.execution.backends.triton import float8
from viditq.quant.execution.backends.triton.tiles import Tile, float8_tiles_for
from viditq.quant.numerics.float_grid import NUMBERS

MULTIPLE = 16  # of in-features and outputs, on CUDA devices
HALVES = (torch.bfloat16, torch.float16)
RELATIVE = {"cpu": 2.0**-20}
TENSOR_CORES = 2.0**-10
"""Of the sum of |x w|, elsewhere: the units of sm_89 and sm_90 keep 13 bits of a sum's mantissa between the steps at
which it goes on in float32 (SageAttention2, arXiv 2411.10958, 3.2)."""
PROBED_ROWS, PROBED_OUTS = 64, 256
KIND_OF = {of.dtype: name for name, of in NUMBERS.items() if of.dtype is not None}


class Float8Weight(NamedTuple):
    """data: torch's FP8 [P, Q], 0 where padded. scale: float32 [O, 1] or [1, 1]. outs, width: O and C."""

    data: Tensor
    scale: Tensor
    outs: int
    width: int

    def codes(self) -> Tensor:
        """uint8 [O, C]: bit patterns."""
        return self.data.view(torch.uint8)[: self.outs, : self.width].contiguous()

    def grid(self, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """As it was given."""
        return self.scale, None

    def moved(self, move: Callable[[Tensor], Tensor]) -> Float8Weight:
        """The same with each of its tensors moved."""
        return self._replace(data=move(self.data), scale=move(self.scale))

    def decoded(self) -> Tensor:
        """float64 [O, C]."""
        return self.data[: self.outs, : self.width].double() * self.scale.double()


class Float8Product(NamedTuple):
    """residual + gate * activation((codes scale) weight^T + bias + addend) as [M, O] in `dtype`.

    codes: torch's FP8 [M, Q]. scale: float32 [M, 1] or [1, 1]. The rest as in `ops.arguments`.
    """

    codes: Tensor
    scale: Tensor
    weight: Float8Weight
    bias: Tensor | None
    dtype: torch.dtype
    addend: Tensor | None = None
    activation: int = 0
    gate: Tensor | None = None
    residual: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, C, O."""
        return len(self.codes), self.weight.width, self.weight.outs

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return self.codes.device

    @property
    def label(self) -> str:
        """Of its weight, such as "We4m3", and whether more than a bias stands behind it."""
        return f"W{KIND_OF[self.weight.data.dtype]}{' and more behind it' if self.has_more else ''}"

    @property
    def kind(self) -> tuple[object, ...]:
        """What decides how fast it is computed."""
        return (*self.shape, self.codes.dtype, self.weight.data.dtype, self.has_one_scale, self.bias is None,
                self.has_more, self.dtype, str(self.device))  # fmt: skip

    @property
    def has_more(self) -> bool:
        """Whether more than a bias stands behind it."""
        parts = (self.addend, self.gate, self.residual)
        return self.activation > 0 or any(part is not None for part in parts)

    @property
    def has_one_scale(self) -> bool:
        """On each side."""
        return self.scale.numel() == self.weight.scale.numel() == 1

    def finished(self, y_MO: Tensor) -> Tensor:
        """What stands behind the product, on its result with scales and bias."""
        return finished(self, y_MO)

    def corner(self) -> Float8Product:
        """The same of a few outputs of a few rows, which share a line of the gate."""
        data, scale, outs, width = self.weight
        rows, outs = PROBED_ROWS if self.gate is None else len(self.codes) // len(self.gate), min(outs, PROBED_OUTS)
        rows = min(rows, PROBED_ROWS)

        def cut(part: Tensor | None, count: int = rows) -> Tensor | None:
            return None if part is None else part[:count, :outs]

        return self._replace(
            codes=self.codes[:rows],
            scale=self.scale[:rows],
            weight=Float8Weight(data[: outs + -outs % MULTIPLE], scale[:outs], outs, width),
            bias=None if self.bias is None else self.bias[:outs],
            addend=cut(self.addend),
            gate=cut(self.gate, 1),
            residual=cut(self.residual),
        )

    def extreme(self) -> Float8Product:
        """A small one of this kind with the largest codes there are: what saturates or overflows shows here."""
        cut = self.corner()
        codes, x_scale = _largest(self.codes.new_empty((PROBED_ROWS, self.codes.shape[1])))
        data, scale = _largest(cut.weight.data)
        codes[:, ::4] = (-codes[:, 1:2].float()).to(codes.dtype)
        codes.view(torch.uint8)[:, self.weight.width :] = 0
        rows = 1 if self.scale.numel() == 1 else PROBED_ROWS
        weight = cut.weight._replace(data=data, scale=torch.full_like(cut.weight.scale, scale))
        return Float8Product(codes, cut.scale.new_full((rows, 1), x_scale), weight, None, self.dtype)

    def exact(self) -> tuple[Tensor, Tensor]:
        """The output in float64, and how far a right one may lie from it."""
        rows, weight = self.codes[:, : self.weight.width].double() * self.scale.double(), self.weight.decoded()
        y, size = rows @ weight.T, rows.abs() @ weight.abs().T
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        out = self._replace(dtype=torch.float64).finished(y)
        return out, allowed(self, y, out, RELATIVE.get(self.device.type, TENSOR_CORES) * size)


def _largest(like: Tensor) -> tuple[Tensor, float]:
    """Filled with the largest number there is, and a scale that makes it nearly 1."""
    number = NUMBERS[KIND_OF[like.dtype]]
    return torch.full(like.shape, number.largest, device=like.device).to(like.dtype), 2.0 ** -(number.exponent + 1)


def _multiplied(product: Float8Product, scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """With the bias, in `dtype`, or in float32 where that is added after it."""
    weight, bias = product.weight, product.bias
    inside = bias is not None and bias.dtype == dtype and dtype in HALVES  # the others CUDA does not add
    padding = len(weight.data) - weight.outs
    given = F.pad(bias, (0, padding)) if bias is not None and inside else None
    y_MP = torch._scaled_mm(product.codes, weight.data.T, scale, weight_scale, bias=given, out_dtype=dtype)
    y = y_MP[:, : weight.outs] if padding else y_MP
    return y if bias is None or inside else y + bias


def _by_tensor(product: Float8Product) -> Tensor:
    scales = product.scale.view(()), product.weight.scale.view(())
    return product.finished(_multiplied(product, *scales, product.dtype))


def _by_row(product: Float8Product) -> Tensor:
    rows, weight = len(product.codes), product.weight
    padding = len(weight.data) - weight.outs
    outs_scale = F.pad(weight.scale.expand(weight.outs, 1), (0, 0, 0, padding), value=1.0).view(1, -1)
    scale = product.scale.expand(rows, 1).contiguous()
    return product.finished(_multiplied(product, scale, outs_scale, product.dtype))


def _scaled_after(product: Float8Product) -> Tensor:
    one = torch.ones((), device=product.device)
    y = _multiplied(product._replace(bias=None), one, one, torch.float32)
    y = y * (product.scale * product.weight.scale.view(1, -1))
    return product.finished(y if product.bias is None else y + product.bias)


def _by_triton(tile: Tile, product: Float8Product) -> Tensor:
    codes, scale, weight, bias, dtype, addend, activation, gate, residual = product
    return float8.multiply(
        codes, scale, weight.data, weight.scale, weight.outs, bias, dtype, addend=addend, activation=activation,
        gate=gate, residual=residual, tile=tile,
    )  # fmt: skip


def _in_float(product: Float8Product) -> Tensor:
    rows = product.codes[:, : product.weight.width].float() * product.scale
    weight = product.weight.data[: product.weight.outs, : product.weight.width].float() * product.weight.scale
    return product.finished(F.linear(rows, weight, None if product.bias is None else product.bias.float()))


def _unless_scales_differ(product: Float8Product) -> str | None:
    return None if product.has_one_scale else "scales differ by row or output"


def _unless_one_scale_serves(product: Float8Product) -> str | None:
    return "a scale a tensor serves" if product.has_one_scale else None


def _unless_installed(product: Float8Product) -> str | None:
    return None if float8.installed() else "it is not installed"


def candidates_for(product: Float8Product) -> list[Candidate]:
    """All there are on its device, the ones that may not take it included: they say why."""
    tiles = float8_tiles_for(len(product.codes)) if product.device.type == "cuda" else ()
    ours = (
        Candidate(f"triton {tile.rows}x{tile.outs}", partial(_by_triton, tile), _unless_installed) for tile in tiles
    )
    return [*OF_TORCH, *ours]


OF_TORCH = (
    Candidate("torch._scaled_mm by tensor", _by_tensor, _unless_scales_differ),
    Candidate("torch._scaled_mm by row", _by_row, _unless_one_scale_serves),
    Candidate("torch._scaled_mm, scales after it", _scaled_after, _unless_one_scale_serves),
)
LAST = Candidate("emulation", _in_float)
"""Where none of them is right: the weight decoded at every call."""

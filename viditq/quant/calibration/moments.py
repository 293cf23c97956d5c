"""Second moments X^T X of the inputs of Linears, one matrix for all Linears that read the same tensor.

They need C^2 floats each (5.3 MB for 1,152 channels, 85 MB for 4,608), so only the layers whose rounding asks are
observed, q, k, v share one matrix, and all noise levels are summed up. Legend: C in_features.

Forming them costs C^2 a row, C / O times what the Linear itself costs: all rows of a transformer block would make its
Linears 2.5 times as slow. So a sample of rows stands for each input, weighed so that the sums remain those of all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from viditq.errors import UserError, close_names
from viditq.mapped import release

PREFIX = "@moments"  # no module has such a name
SQUARED = (1e-16, 1e16)  # magnitudes whose squares can be summed up in float32
STRIP = 128  # rows of the matrix that are added at once, from the diagonal on: nearly half of the work is spared


class Moments:
    """leader: layer -> the first layer in model order that reads the same tensor.

    sums: leader -> [C, C] float32, of which the upper triangle counts.
    """

    def __init__(self) -> None:
        self.leader: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, layer: str, leader: str, rows_nC: Tensor | None, weight: float = 1.0) -> None:
        """Says who leads `layer` and adds rows of its input, None where the leader's were added.

        weight: how many rows of the input each of them stands for.
        """
        if self.leader.setdefault(layer, leader) != leader:
            raise UserError(
                f"{layer} read the input of {self.leader[layer]} before and that of {leader} now; GPTQ and AdaRound "
                "need a model whose layers share their inputs the same way in every step"
            )
        if rows_nC is None:
            return
        rows_nC = rows_nC.float()
        with torch.inference_mode(False):  # Lightning samples in inference mode; merging comes after it
            if layer not in self.sums:
                num = rows_nC.shape[1]
                self.sums[layer] = torch.zeros(num, num, device=rows_nC.device)
            elif self.sums[layer].device != rows_nC.device:  # loaded before the model was moved
                self.sums[layer] = self.sums[layer].to(rows_nC.device)
        total_CC, channels = self.sums[layer], rows_nC.shape[1]
        strip = STRIP if total_CC.device.type == "cpu" else channels  # many small products leave a GPU idle
        for c in range(0, channels, strip):
            total_CC[c : c + strip, c:].addmm_(rows_nC[:, c : c + strip].T, rows_nC[:, c:], alpha=weight)

    def of(self, layer: str) -> Tensor:
        """X^T X [C, C] of the inputs of `layer`, a new tensor; nothing else of its size is made."""
        self.check(layer)
        upper_CC = self.sums[self.leader[layer]]
        whole_CC = torch.empty_like(upper_CC)
        for c in range(0, len(upper_CC), STRIP):
            strip_nC = whole_CC[c : c + STRIP, c:]
            strip_nC.copy_(upper_CC[c : c + STRIP, c:].triu())
            square_nn = strip_nC[:, : len(strip_nC)]
            square_nn += square_nn.triu(1).T
            whole_CC[c + STRIP :, c : c + STRIP] = strip_nC[:, STRIP:].T
            release([upper_CC[c : c + STRIP]])
        return whole_CC

    @property
    def missing(self) -> list[str]:
        """Layers that lead an input whose sums are not here."""
        return [leader for leader in dict.fromkeys(self.leader.values()) if leader not in self.sums]

    def stored(self, layer: str) -> list[Tensor]:
        """The matrix that `of` reads, if there is one."""
        leader = self.leader.get(layer)
        return [self.sums[leader]] if leader in self.sums else []

    def check(self, layer: str, largest: float = 1.0) -> None:
        """Raises UserError when they were not collected for `layer`, or are not to be had.

        largest: magnitude of its inputs.
        """
        if layer not in self.leader:
            raise UserError(
                f"the statistics lack the second moments of {layer} ({close_names(layer, self.leader)}), which GPTQ "
                "and AdaRound need; calibrate with moment_layers for this plan"
            )
        if largest and not SQUARED[0] < largest < SQUARED[1]:
            raise UserError(
                f"the inputs of {layer} reach {largest:.3g}, whose squares float32 does not hold; GPTQ and AdaRound "
                "cannot weigh them: leave this layer in float, or use rounding=nearest"
            )

    def merge(self, other: Moments) -> None:
        """Adds what `other` saw."""
        for layer, leader in other.leader.items():
            if self.leader.setdefault(layer, leader) != leader:
                raise UserError(
                    f"two parts of the statistics disagree on who shares the input of {layer}; calibrate again"
                )
        for leader, total in other.sums.items():
            self.sums[leader] = self.sums[leader] + total.to(self.sums[leader]) if leader in self.sums else total

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat state; the sums are not copied (they can be gigabytes)."""
        sums = {f"{PREFIX}/sum/{leader}": total.detach().cpu() for leader, total in self.sums.items()}
        names = {f"{PREFIX}/leader/{layer}": _as_bytes(leader) for layer, leader in self.leader.items()}
        return sums | names

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Inverse of `to_tensors`; other keys are ignored."""
        moments = cls()
        for key in of_moments(tensors):
            _, field, layer = key.split("/", 2)
            if field == "sum":
                moments.sums[layer] = tensors[key]
            else:
                moments.leader[layer] = bytes(tensors[key].tolist()).decode()
        return moments


def matrix_bytes(in_features: int) -> int:
    """What the sums of one Linear take."""
    return 4 * in_features**2


def of_moments(keys: Iterable[str]) -> list[str]:
    """The keys that belong to the moments."""
    return [key for key in keys if key.startswith(f"{PREFIX}/")]


def _as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)

"""Sums of errors by layer and noise level: fixed size, merged without regard to order.

Legend: R rows = layers, K buckets of noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from viditq.errors import UserError

REDUCTIONS = {"squared_error": "sum", "squared_norm": "sum", "minimum": "min", "maximum": "max", "num_prompts": "sum"}
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}


class ErrorSums:
    """What `Diagnosis` keeps, of fixed size: one row per layer, and a last row for the denoiser's own output.

    squared_error, squared_norm [R + 1, K] float64: sums over everything seen. minimum, maximum [R, K]: of the
    layers' inputs. num_prompts [1]. `REDUCTIONS` says how two of them, or their `state()`, become one.
    """

    def __init__(self, layer_names: Sequence[str], num_buckets: int) -> None:
        self.layer_names, num_layers = list(layer_names), len(layer_names)
        with torch.inference_mode(False):  # Lightning samples in inference mode; merging comes after it
            self.squared_error = torch.zeros(num_layers + 1, num_buckets, dtype=torch.float64)
            self.squared_norm = torch.zeros(num_layers + 1, num_buckets, dtype=torch.float64)
            self.minimum = torch.full((num_layers, num_buckets), torch.inf)
            self.maximum = torch.full((num_layers, num_buckets), -torch.inf)
            self.num_prompts = torch.zeros(1, dtype=torch.int64)

    def to(self, device: torch.device) -> None:
        """Moves the sums."""
        with torch.inference_mode(False):
            for field in REDUCTIONS:
                setattr(self, field, getattr(self, field).to(device))

    def add_error(self, row: int, bucket: int, quantized: Tensor, exact: Tensor) -> None:
        """Adds ||quantized - exact||^2 and ||exact||^2."""
        if self.squared_error.device != exact.device:  # weights that are offloaded lie elsewhere than they compute
            self.to(exact.device)
        exact = exact.float()
        error = quantized.to(exact.device, exact.dtype) - exact
        self.squared_error[row, bucket] += error.square().sum(dtype=torch.float64)
        self.squared_norm[row, bucket] += exact.square().sum(dtype=torch.float64)

    def add_range(self, row: int, bucket: int, x: Tensor) -> None:
        """Adds the extremes of a layer's input; of a stream without tokens there are none."""
        if not x.numel():
            return
        lo, hi = x.aminmax()
        self.minimum[row, bucket] = torch.minimum(self.minimum[row, bucket], lo)
        self.maximum[row, bucket] = torch.maximum(self.maximum[row, bucket], hi)

    def merge(self, other: ErrorSums) -> None:
        """Adds what `other` saw (another process, another part of the prompts), in any order."""
        assert self.layer_names == other.layer_names and self.minimum.shape == other.minimum.shape
        for field, reduction in REDUCTIONS.items():
            mine: Tensor = getattr(self, field)
            mine.copy_(COMBINE[reduction](mine, getattr(other, field).to(mine.device)))

    def state(self) -> dict[str, Tensor]:
        """Flat copy on the CPU: `layers/<layer>/<field>` and `denoiser/<field>` [K], `num_prompts` [1]."""
        state = {"num_prompts": self.num_prompts.cpu().clone()}
        for prefix, field, row in self._places():
            state[f"{prefix}/{field}"] = getattr(self, field)[row].cpu().clone()
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Strict inverse of `state`; raises UserError when it was made with other layers or sizes."""
        if {k: v.shape for k, v in self.state().items()} != {k: v.shape for k, v in state.items()}:
            raise UserError(
                "the saved diagnosis has other layers or sizes than this plan; delete it and diagnose again"
            )
        self.num_prompts.copy_(state["num_prompts"])
        for prefix, field, row in self._places():
            getattr(self, field)[row].copy_(state[f"{prefix}/{field}"])

    def _places(self) -> list[tuple[str, str, int]]:
        """(prefix, field, row) of every row."""
        sums, rows = ["squared_error", "squared_norm"], [f"layers/{name}" for name in self.layer_names]
        places = [(prefix, field, row) for field in (*sums, "minimum", "maximum") for row, prefix in enumerate(rows)]
        return places + [("denoiser", field, len(rows)) for field in sums]


def merge_states(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two `state()`s of the same layers and sizes, made on different prompts, as one."""
    return {key: COMBINE[REDUCTIONS[key.rsplit("/", 1)[-1]]](value, theirs[key]) for key, value in mine.items()}

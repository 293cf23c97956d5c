"""How metrics remember: small rows that processes concatenate, whatever number of samples each has seen."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from viditq.metrics.batch import EvalBatch


class StreamingMetric(Metric):
    """A metric whose states are one-dimensional and concatenated over processes.

    A state starts with an empty piece of its own dtype, so that a process that has seen nothing takes part in
    the gather (torchmetrics would send float32, which corrupts other dtypes).
    """

    full_state_update = False
    has_float_value = False  # whether `compute` adds reference_value, the float model's own
    reads_given = False  # whether it reads the pictures that sampling started from
    reads_sound = False  # whether it reads what is heard beside the frames

    def __init__(self, name: str, unit: str, **states: torch.dtype) -> None:
        super().__init__()
        self.name, self.unit = name, unit
        self._dtypes: dict[str, torch.dtype] = states
        for state in states:
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        super().reset()
        for state, dtype in self._dtypes.items():
            getattr(self, state).append(torch.zeros(0, dtype=dtype, device=self.device))

    def append(self, state: str, values: Tensor) -> None:
        """Add [n] values to a state."""
        getattr(self, state).append(values.to(self.device, self._dtypes[state]))

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError for the first that it cannot score; called before anything is sampled."""

    def update(self, batch: EvalBatch) -> None:
        """Take in the pairs of `batch`."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """Return at least `value` and `standard_error` (nan where undefined), both 0-d float64."""
        raise NotImplementedError

    def joined(self, state: str) -> Tensor:
        """All pieces of a state, [n]."""
        return dim_zero_cat(getattr(self, state))


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of float64 [n] and its standard error, the sample deviation over sqrt(n); nan for n = 1."""
    mean = values.mean()
    if len(values) == 1:
        return mean, torch.full_like(mean, torch.nan)
    return mean, values.std() / len(values) ** 0.5


class PerSampleMetric(StreamingMetric):
    """A metric that is the mean of one score per pair.

    `compute` gives value, standard_error, index [n] ascending and per_sample [n] in that order; with
    `scores_references` also reference_value and per_sample_reference [n], the same of the float model. `shares`
    names further columns of `scores` whose means `compute` adds.
    """

    def __init__(self, name: str, unit: str, scores_references: bool = False, shares: tuple[str, ...] = ()) -> None:
        columns = ["per_sample", "per_sample_reference"] if scores_references else ["per_sample"]
        super().__init__(name, unit, index=torch.int64, **dict.fromkeys([*columns, *shares], torch.float64))
        self.columns, self.shares, self.has_float_value = columns, shares, scores_references

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Return [B] scores for each of `self.columns` and `self.shares`."""
        raise NotImplementedError

    def update(self, batch: EvalBatch) -> None:
        """Score the pairs of `batch`."""
        self.append("index", batch.index)
        for column, values in self.scores(batch).items():
            self.append(column, values)

    def compute(self) -> dict[str, Tensor]:
        """Sort by prompt index, so that the result does not depend on order or number of processes."""
        index = self.joined("index")
        result = summarise(index, **{column: self.joined(column) for column in self.columns})
        return result | {share: self.joined(share)[index.argsort()].mean() for share in self.shares}


def summarise(index: Tensor, per_sample: Tensor, per_sample_reference: Tensor | None = None) -> dict[str, Any]:
    """The result of a per-sample metric from its unsorted columns, all [n]."""
    assert len(index) > 0, "compute before any pair was seen"
    assert len(index.unique()) == len(index), "a pair was scored twice: shards must not be padded"
    order = index.argsort()
    value, error = mean_and_error(per_sample[order])
    result = {"value": value, "standard_error": error, "index": index[order], "per_sample": per_sample[order]}
    if per_sample_reference is not None:
        reference = per_sample_reference[order]
        result |= {"reference_value": reference.mean(), "per_sample_reference": reference}
    return result

"""How far a sample is from the float model's, pixel by pixel: any stock paired metric, and relative L2.

Axes: B pairs, F frames, C channels, H height, W width.
"""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor
from torchmetrics import Metric

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch, to_unit
from viditq.metrics.streaming import PerSampleMetric

VALUE_RANGES: dict[str, Callable[[Tensor], Tensor]] = {"unit": lambda x: x, "signed": lambda x: 2 * x - 1}


class Paired(PerSampleMetric):
    """A stock torchmetrics metric `metric(samples_FCHW, references_FCHW)`, one value per clip.

    `value_range`: what the metric wants, "unit" = [0, 1] or "signed" = [-1, 1]. `ceiling`: scores above it
    count as it, which makes the infinite PSNR of identical clips finite. Without a ceiling a score that is
    not finite raises UserError.
    """

    def __init__(
        self,
        metric: Metric,
        name: str,
        unit: str = "",
        value_range: str = "unit",
        ceiling: float | None = None,
        scores_references: bool = False,
    ) -> None:
        super().__init__(name, unit, scores_references)
        if value_range not in VALUE_RANGES:
            raise UserError(f"value_range is {value_range!r}. Use one of: {', '.join(VALUE_RANGES)}.")
        self.metric, self.value_range, self.ceiling = metric, value_range, ceiling
        # One clip is complete on its own process: the inner metric must not wait for the others.
        self.metric._to_sync = self.metric.sync_on_compute = False

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """As the stock metric says."""
        return self.metric.higher_is_better

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """One value of the stock metric per pair, [B]."""
        return {"per_sample": self.against(batch.samples, batch.references, batch.index)}

    def against(self, clips_BFCHW: Tensor, others_BFCHW: Tensor, index: Tensor) -> Tensor:
        """The stock metric of each uint8 clip and its other, [B]."""
        prepare = VALUE_RANGES[self.value_range]
        clips, others = prepare(to_unit(clips_BFCHW)), prepare(to_unit(others_BFCHW))
        values = [self._score(clip, other) for clip, other in zip(clips, others, strict=True)]
        per_sample = torch.stack(values).double().clamp(max=inf if self.ceiling is None else self.ceiling)
        self._refuse_non_finite(per_sample, index)
        return per_sample

    def _score(self, sample_FCHW: Tensor, reference_FCHW: Tensor) -> Tensor:
        self.metric.reset()
        self.metric.update(sample_FCHW, reference_FCHW)
        return self.metric.compute()

    def _refuse_non_finite(self, per_sample: Tensor, index: Tensor) -> None:
        bad = (~per_sample.isfinite()).nonzero()
        if len(bad):
            first = int(bad[0])
            raise UserError(
                f"{self.name} of prompt {int(index[first])} is {per_sample[first].item()}. Metrics must be "
                f"finite: set `ceiling` of this metric (now {self.ceiling}), or leave the metric out."
            )


def relative_l2(samples_BFCHW: Tensor, references_BFCHW: Tensor) -> Tensor:
    """||s - r|| / ||r|| per clip of float pixels in [0, 1], [B].

    An all-black reference counts as one value one 8-bit step above black, the smallest norm a clip can have.
    """
    difference = (samples_BFCHW - references_BFCHW).flatten(1).double().norm(dim=1)
    return difference / references_BFCHW.flatten(1).double().norm(dim=1).clamp(min=1 / 255)


class RelativeL2(PerSampleMetric):
    """Norm of the pixel error relative to the norm of the float model's pixels."""

    higher_is_better = False

    def __init__(self, name: str) -> None:
        super().__init__(name, unit="")

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """One value per pair, [B]."""
        return {"per_sample": relative_l2(to_unit(batch.samples), to_unit(batch.references))}

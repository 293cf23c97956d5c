"""Statistics and inputs of blocks from one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from viditq.quant.calibration.calibrator import Calibrator
from viditq.quant.reconstruction.collect import PREFIX, BlockInputs


class JointCalibrator:
    """A Calibrator and BlockInputs as one."""

    def __init__(self, calibrator: Calibrator, inputs: BlockInputs) -> None:
        self.calibrator, self.inputs = calibrator, inputs
        self._stack = ExitStack()

    def set_sample_seeds(self, seeds: Sequence[int]) -> None:
        """Those of the coming batch."""
        self.calibrator.set_sample_seeds(seeds)
        self.inputs.set_sample_seeds(seeds)

    def state(self) -> dict[str, Tensor]:
        """Both states; `divided` is the inverse."""
        return self.calibrator.state() | self.inputs.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a `state()`."""
        statistics, inputs = divided(state)
        self.calibrator.load_state(statistics)
        self.inputs.load_state(inputs)

    def __enter__(self) -> JointCalibrator:
        with ExitStack() as stack:
            stack.enter_context(self.calibrator)
            stack.enter_context(self.inputs)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def divided(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What of a state is statistics, and what belongs to the inputs of blocks."""
    inputs = {key: value for key, value in state.items() if key.startswith(PREFIX)}
    return {key: value for key, value in state.items() if key not in inputs}, inputs

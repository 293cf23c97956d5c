"""A diagnosis that also gathers statistics of the layers' inputs, for recipes that took none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from torch import Tensor

from viditq.quant.calibration.calibrator import Calibrator
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.diagnosis import error_sums
from viditq.quant.diagnosis.diagnosis import Diagnosis

INPUTS = "inputs//"


class ObservedDiagnosis:
    """Context manager: `diagnosis` and `calibrator` attached to the same float denoiser, with one state.

    Call `set_sample_seeds` before each batch and `add_prompts` once per sampled batch, as both of them demand.
    """

    def __init__(self, diagnosis: Diagnosis, calibrator: Calibrator) -> None:
        self._diagnosis, self._calibrator = diagnosis, calibrator

    def set_sample_seeds(self, seeds: Sequence[int]) -> None:
        """One whole number per prompt of the coming batch."""
        self._calibrator.set_sample_seeds(seeds)

    def add_prompts(self, count: int) -> None:
        """Says that `count` prompts have been sampled."""
        self._diagnosis.add_prompts(count)

    def state(self) -> dict[str, Tensor]:
        """Everything measured so far, as flat tensors for safetensors."""
        return _joined(self._diagnosis.state(), self._calibrator.state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a `state()`; raises UserError when it was made with other layers or sizes."""
        errors, inputs = separated(state)
        self._diagnosis.load_state(errors)
        self._calibrator.load_state(inputs)

    def __enter__(self) -> ObservedDiagnosis:
        self._diagnosis.__enter__()
        self._calibrator.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calibrator.__exit__(kind, error, trace)
        self._diagnosis.__exit__(kind, error, trace)


def separated(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state's two parts: that of the diagnosis, and the statistics."""
    inputs = {key.removeprefix(INPUTS): value for key, value in state.items() if key.startswith(INPUTS)}
    return {key: value for key, value in state.items() if not key.startswith(INPUTS)}, inputs


def merge_states(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two `state()`s of the same layers and sizes, made on different prompts, as one."""
    (my_errors, my_inputs), (their_errors, their_inputs) = separated(mine), separated(theirs)
    stats = CalibrationStats.from_tensors(my_inputs)
    stats.merge(CalibrationStats.from_tensors(their_inputs))
    return _joined(error_sums.merge_states(my_errors, their_errors), stats.to_tensors())


def _joined(errors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**errors, **{f"{INPUTS}{key}": value for key, value in inputs.items()}}

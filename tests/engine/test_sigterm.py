"""SIGTERM ends a loop over batches, also where Lightning takes it: between batches, and after the last."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torchmetrics import Metric

from viditq import ending
from viditq.engine.evaluation import Pairs, measure
from viditq.engine.sampling import PipelineModule, run_batches

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}


class Told(Metric):
    """Sent SIGTERM at an update."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.updates = at, 0

    def update(self, batch: Any) -> None:
        self.updates += 1
        if self.updates == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def compute(self) -> dict[str, torch.Tensor]:
        return {}


class Batches(PipelineModule):
    """Sent SIGTERM in a batch."""

    def __init__(self, told: Told) -> None:
        L.LightningModule.__init__(self)
        self.told = [told]

    def let_go(self) -> None:
        pass

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        self.told[0].update(batch)
        return 0


@pytest.fixture(params=[signal.SIG_DFL, ending.stop], ids=["alone", "with the command line's own"])
def handler(request: pytest.FixtureRequest) -> Any:
    before = signal.signal(signal.SIGTERM, request.param)
    yield request.param
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("loop", ["predict", "test"])
def test_the_batch_is_finished_and_no_other_begun(
    loop: str, at: int, handler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told, trainer = Told(at), L.Trainer(**QUIET)
    monkeypatch.setattr(Pairs, "__getitem__", lambda self, number: self.batches[number])
    monkeypatch.setattr("viditq.engine.evaluation.Evaluation.transfer_batch_to_device", lambda self, batch, *_: batch)
    with pytest.raises(SystemExit) as end:
        if loop == "predict":
            run_batches(trainer, Batches(told), [[0], [1], [2]])
        else:
            measure(trainer, {"told": told}, Pairs(tmp_path, tmp_path, None, "image", [[0], [1], [2]]))  # type: ignore[arg-type]
    assert end.value.code == 143 and told.updates == at
    assert ("stopped by SIGTERM, after this batch" in capfd.readouterr().err) == (handler is ending.stop)

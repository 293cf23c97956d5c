"""A run that its logger sees while it runs: stages, how it ends, which run of W&B it is."""

import os
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import Logger
from PIL import Image
from wandb_records import OfflineRun, away, offline_runs

from viditq.engine.logged_run import follows, logged
from viditq.engine.logger_packages import NEEDED, check_package
from viditq.engine.logging import csv_logger, mlflow_logger, tensorboard_logger, wandb_logger
from viditq.engine.progress import Forecast, Progress
from viditq.engine.wandb_settings import check_wandb, logged_as
from viditq.errors import UserError
from viditq.run_dir import RunDir

CONFIG = {"seed": 1, "quant": {"weight": {"bits": 4}}}
SETTINGS: dict[str, Any] = {"group": None, "run_id": "0123456789abcdef", "project": "viditq", "entity": None}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away(tmp_path / "home", monkeypatch)


def begun(folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    return logged(wandb_logger(folder, "w4a8", **SETTINGS), CONFIG, ["tiny_image", "w4a8", "W4A8"])


def test_stages_and_batches_are_there_while_it_runs(tmp_path: Path) -> None:
    progress = Progress(["reference", "generate"])
    with begun(tmp_path / "run") as live:
        progress.listen = live.tell
        progress.begin(1, Forecast(prompts={"reference": 8, "generate": 8}, per_prompt=30.0))
        progress.begin_loop()
        for done in (1, 2, 3, 4):  # at once: what is told is held back, but for the last
            progress.batch(done, 4)
        progress.begin(2, Forecast())
        assert live.logger.experiment.summary["stage"] == "generate"
    (run,) = offline_runs(tmp_path / "run")
    told = [{key: row[key] for key in row if not key.startswith("_")} for row in run.history]
    assert [row["progress/stage"] for row in told] == [1, 1, 2]
    assert told[0]["progress/minutes_left"] == pytest.approx(8, abs=0.1) and "sampling/reference" not in told[0]
    assert told[1]["sampling/reference"] == 1 and "progress/minutes_left" not in told[2]
    assert run.summary["stage"] == "done" and run.exit_code == 0
    assert not [key for key in run.summary if key.startswith(("progress/", "sampling/"))], "they would stand in tables"
    assert run.config["quant"] == {"weight": {"bits": 4}} and list(run.run.tags) == ["tiny_image", "w4a8", "W4A8"]


@pytest.mark.parametrize(
    ("error", "code"), [(SystemExit(130), 130), (UserError("the disk is full"), 2), (ZeroDivisionError(), 1)]
)
def test_a_run_that_does_not_get_through_is_marked_so(error: BaseException, code: int, tmp_path: Path) -> None:
    progress = Progress(["reference"])
    with pytest.raises(type(error)), begun(tmp_path / "run") as live:
        progress.listen = live.tell
        progress.begin(1, Forecast())
        raise error
    assert wandb.run is None
    (run,) = offline_runs(tmp_path / "run")
    assert run.exit_code == code and run.summary["stage"] == "reference"


def test_a_resumed_run_goes_on_in_the_same_one_and_a_new_folder_is_another(tmp_path: Path) -> None:
    runs: list[OfflineRun] = []
    for folder in ("a", "a", "b"):
        with begun(tmp_path / folder):
            pass
        wandb.teardown()
    runs = [*offline_runs(tmp_path / "a"), *offline_runs(tmp_path / "b")]
    first, second, other = (run.run.run_id for run in runs)
    assert first == second == (tmp_path / "a/wandb/id").read_text() and other != first
    assert all(run.run.resume for run in runs)


def test_a_run_that_an_earlier_version_has_logged_keeps_its_id(tmp_path: Path) -> None:
    (tmp_path / "run/wandb/offline-run-20260101_000000-0123456789abcdef").mkdir(parents=True)
    with begun(tmp_path / "run") as live:
        assert live.logger.experiment.id == "0123456789abcdef"


def test_in_a_sweep_the_agent_says_which_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Project, entity and id of our own would be warned of."""
    for name, value in {"SWEEP_ID": "swept", "RUN_ID": "trial7", "MODE": "offline", "PROJECT": "theirs"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # a process reads these variables once
    with begun(tmp_path / "run") as live:
        assert live.logger.experiment.id == "trial7"
    (run,) = offline_runs(tmp_path / "run")
    assert (run.run.run_id, run.run.sweep_id, run.run.project) == ("trial7", "swept", "theirs")
    assert not (tmp_path / "run/wandb/id").exists() and "Ignoring" not in "".join(capfd.readouterr())
    assert logged_as("viditq.engine.logging.wandb_logger") == "viditq.engine.logging.wandb_logger:trial7"
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(UserError, match="WANDB_MODE=online needs a key"):  # a sweep waits for numbers
        check_wandb("viditq", None)


def test_where_wandb_cannot_begin_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"no route to host\. With WANDB_MODE=offline"):
        wandb_logger(tmp_path / "run", "w4a8", **SETTINGS)


class Kept(Logger):
    """Keeps what it is given, by Lightning's interface alone."""

    name = version = "kept"

    def __init__(self) -> None:
        self.steps: list[int | None] = []
        self.values: dict[str, float] = {}
        self.config: Any = None
        self.status = ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.config = params

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.append(step)
        self.values |= metrics

    def finalize(self, status: str) -> None:
        self.status = status


METRICS: dict[str, Any] = {
    **{"metrics": {"psnr": 31.5}, "standard_errors": {"psnr": 0.5}, "float_metrics": {}, "seconds": {"generate": 3.0}},
    **{"average_weight_bits": 4.5, "average_activation_bits": 8.5, "size_bytes": 1000, "float_size_bytes": 3000},
}


def go_through(logger: Any, run_dir: RunDir) -> None:
    """A run of one stage."""
    progress = Progress(["generate"])
    with logged(logger, CONFIG, ["tiny_image", "W4A8"]) as live:
        assert live is not None
        progress.listen = live.tell
        progress.begin(1, Forecast())
        progress.batch(2, 2)
        live.send(run_dir, METRICS)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "a run", CONFIG)
    found.claim()
    Image.new("RGB", (8, 6), "red").save(found.picture)
    return found


def test_any_logger_of_lightning_sees_the_run(run_dir: RunDir) -> None:
    kept = Kept()
    go_through(kept, run_dir)
    assert kept.config == CONFIG and kept.status == "success" and kept.steps == [1, 2, 3]
    assert kept.values["sampling/generate"] == 1 and kept.values["psnr/value"] == 31.5
    with pytest.raises(ZeroDivisionError), logged(kept, CONFIG):
        raise ZeroDivisionError
    assert kept.status == "failed" and follows(kept)
    assert not follows(csv_logger(run_dir.path, "", None, "")), "a csv file holds results alone"


def test_tensorboard(run_dir: RunDir) -> None:
    pytest.importorskip("tensorboard", reason="logger=tensorboard comes with an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go_through(tensorboard_logger(run_dir.path, "w4a8", None, "id"), run_dir)
    events = EventAccumulator(str(run_dir.path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("psnr/value")] == [31.5]
    assert [event.value for event in events.Scalars("sampling/generate")] == [1]
    (image,) = events.Images("comparison")
    assert (image.width, image.height) == (8, 6) and "hp_metric" not in events.Tags()["scalars"]


def test_mlflow(run_dir: RunDir) -> None:
    pytest.importorskip("mlflow", reason="logger=mlflow comes with an extra")
    from mlflow.tracking import MlflowClient

    settings: dict[str, Any] = {"project": "viditq", "tracking_uri": None}
    for _ in range(2):
        go_through(mlflow_logger(run_dir.path, "w4a8", "a sweep", "id", **settings), run_dir)
    client = MlflowClient(f"sqlite:///{run_dir.path}/mlflow/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "viditq"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (run_dir.path / "mlflow/id").read_text() and run.info.status == "FINISHED"
    assert run.data.metrics["psnr/value"] == 31.5 and run.data.params["quant/weight/bits"] == "4"
    assert run.data.tags["tags"] == "tiny_image, W4A8" and run.data.tags["group"] == "a sweep"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["comparison.png"]


@pytest.mark.parametrize("logger", NEEDED)
def test_a_logger_without_its_package_is_refused(logger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, _ = NEEDED[logger]
    monkeypatch.setattr("viditq.engine.logger_packages.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"logger={extra} needs the package {extra}: pip install"):
        check_package(logger)
    monkeypatch.setattr("viditq.engine.logger_packages.find_spec", lambda name: object())
    check_package(logger)
    assert os.environ.get("WANDB_MODE") is None

"""What a run still has to do, as the files tell."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from viditq.experiment import build
from viditq.forecast import NOT_SAMPLING, forecast
from viditq.job import Job
from viditq.run_dir import RunDir


@pytest.fixture(scope="module")
def make_job(tmp_path_factory: pytest.TempPathFactory, configure: Callable[..., Any]) -> Job:
    outputs = tmp_path_factory.mktemp("forecast")
    overrides = ["experiment=smoke", "logger=none", f"cache_dir='{outputs}/cache'", "diagnosis.num_prompts=4"]
    experiment = build(configure(*overrides))
    return Job(experiment, RunDir(outputs / "runs/mine", experiment.tracked))


def beside(job: Job, name: str, age: int, **changes: Any) -> None:
    """Another finished run."""
    folder = job.run_dir.path.parent / name
    folder.mkdir(parents=True)
    seconds = dict.fromkeys(NOT_SAMPLING, 1.0) | {"reference": 16.0, **changes.pop("seconds", {})}
    metrics = {"model": "tiny_image", "experiment": name, "prompts": 8, "seconds": seconds, **changes}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    os.utime(folder / "metrics.json", (1e9 - age, 1e9 - age))


def test_a_first_run_knows_how_much_it_samples(make_job: Job) -> None:
    found = forecast(make_job)
    assert found.prompts == {"reference": 8, "noise_floor": 24, "calibrate": 2, "generate": 8, "diagnose": 8}
    assert found.per_prompt is None and not found.seconds


def test_what_is_there_is_not_made_again_and_what_was_measured_counts(make_job: Job) -> None:
    folder = make_job.reference.path
    folder.mkdir(parents=True)
    for index in range(6):
        (folder / f"{index:06d}.png").touch()
    (folder / "seconds.json").write_text('{"reference": 12.0}')
    found = forecast(make_job)
    assert found.prompts["reference"] == 2 and found.per_prompt == 2.0


def test_other_stages_take_what_they_took_beside_it(make_job: Job) -> None:
    (make_job.run_dir.path.parent / "damaged").mkdir(parents=True)
    (make_job.run_dir.path.parent / "damaged/metrics.json").write_text("{")
    beside(make_job, "newest", 0, seconds={"quantize": 5.0})
    assert forecast(make_job).seconds["quantize"] == 5.0
    beside(make_job, "smoke", 50, seconds={"quantize": 7.0})
    beside(make_job, "longer", -50, prompts=256, seconds={"quantize": 9.0})
    found = forecast(make_job)
    assert found.seconds["quantize"] == 7.0, "of the same name, of as many prompts"
    assert "reference" not in found.seconds and found.of("generate", 2.0) == 16
    for age, quantize, generate, prompts in ((10, 70.0, 16.0, 99.0), (20, 6.0, 4.0, 3.0), (60, 8.0, 6.0, 2.0)):
        took = {"quantize": quantize, "generate": generate, "prompts": prompts}
        beside(make_job, f"smoke{age}", age, experiment="smoke", seconds=took)
    found = forecast(make_job)
    assert found.seconds["quantize"] == 7.5, "the median: one was run on a busy machine"
    assert found.seconds["generate"] == 6.0 and found.seconds["prompts"] == 2.0, "the latter of any name"
    assert found.batch == 4
    make_job.run_dir.path.mkdir()
    make_job.run_dir.metrics.write_text("{}")
    assert forecast(make_job).seconds["evaluate"] == 0

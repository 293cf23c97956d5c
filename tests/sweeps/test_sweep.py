"""Sweeps: a failed job is listed and the rest goes on, with every launcher; a tuning survives a kill."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from viditq import cli, ending, runner
from viditq.errors import GateFailed, UserError
from viditq.files import lock
from viditq.models.adapter import ModelAdapter
from viditq.sweeps.records import (
    SWEEP_VARIABLE,
    JobRecord,
    SweepFolder,
    exit_status,
    planned_jobs,
    read_jobs,
    sweep_folder,
)
from viditq.sweeps.table import print_sweep
from viditq.sweeps.tuning import Range, Tuning, contiguous, tune

ROOT = Path(__file__).parents[2]
# No report, noise floor or diagnosis, one metric: enough to see what a job did.
MEASURE_ONLY = [
    "stages=[prompts,reference,calibrate,quantize,generate,evaluate]",
    "noise_floor.num_prompts=0",
    "diagnosis.num_prompts=0",
    "metric=psnr",
]
Sweep = Callable[..., int]


class Killed(BaseException):
    """Like SIGKILL, nothing of ours catches it."""


def records(folder: Path) -> list[JobRecord]:
    """The jobs of the one sweep below `folder`."""
    (found,) = (folder / "_sweeps").iterdir()
    return read_jobs(found)


@pytest.fixture
def sweep_here(shrunk: list[str], shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Arguments -> exit status of `python run.py`, run in this process with sweeps below tmp_path."""

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
    def main(cfg: DictConfig) -> None:  # run.py's, which Hydra finds its folder for only where it is the main module
        cli.guarded_run(cfg, Path(HydraConfig.get().runtime.output_dir))

    for variable in ("VIDITQ_COMMAND", "HYDRA_FULL_ERROR", SWEEP_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(variable, "")  # so that what main() sets is undone

    def run_py(*arguments: str) -> int:
        os.environ["HYDRA_FULL_ERROR"] = ""
        where = [f"hydra.sweep.dir='{tmp_path}'", f"cache_dir='{shared_cache}'"]
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, *where])
        return cli.guarded_main(main)

    return run_py


# What jobs leave and what is printed ----------------------------------------------------------------------------------


def test_failures_are_listed_and_a_rerun_does_only_what_is_missing(
    sweep_here: Sweep,
    shrunk: list[str],
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One job with bad input, one that meets a bug of ours, one good; then again, mended."""
    arguments = ["-m", *shrunk, *MEASURE_ONLY, "quant.weight.bits=four,4,8"]
    real = runner.run

    def buggy(cfg: Any, folder: Path, **arguments: Any) -> Any:
        if cfg.quant.weight.bits == 8:
            raise ZeroDivisionError("a bug")
        return real(cfg, folder, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", buggy)
        assert sweep_here(*arguments) == 2
    captured = capfd.readouterr()
    assert captured.err.count("Traceback") == 1 and captured.err.count("\nerror: ") == 2
    table = captured.out[captured.out.index("\nsweep experiment=smoke") :]
    assert "job 0, quant.weight.bits=four: failed: bits='four' is not possible" in table
    assert "job 2, quant.weight.bits=8: failed: ZeroDivisionError: a bug" in table
    assert "3 jobs: 1 done, 2 failed" in table and "PSNR dB" in table
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert f"{metrics['metrics']['psnr']:.2f} ± " in table and "5.61 / 8.81" in table
    assert [job.status for job in records(tmp_path)] == ["failed", "done", "failed"]

    assert sweep_here(*arguments) == 2  # the mended bug is run, the good job found
    assert "3 jobs: 2 done, 1 failed" in capfd.readouterr().out
    for name in ("load", "load_text_part", "load_complete"):
        monkeypatch.setattr(ModelAdapter, name, lambda *_, **__: pytest.fail("work was done twice"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("samples/*.png")}
    assert sweep_here(*arguments) == 2
    assert "3 jobs: 2 done, 1 failed" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("samples/*.png")} and len(before) == 4


def test_killed_job_is_shown_as_unfinished(
    sweep_here: Sweep, shrunk: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def kill(cfg: Any, folder: Path, **arguments: Any) -> None:
        if cfg.seed == 1:
            raise Killed

    monkeypatch.setattr(runner, "run", kill)
    with pytest.raises(Killed):
        sweep_here("-m", *shrunk, "seed=0,1,2")
    out = capfd.readouterr().out
    assert "job 1, seed=1: unfinished" in out and "3 jobs: 1 done, 1 unfinished, 1 not begun (" in out
    assert "\nnot begun: seed=2\ngo on with: python run.py -m " in out
    monkeypatch.setattr(runner, "run", lambda cfg, folder, **_: None)
    assert sweep_here("-m", *shrunk, "seed=0,1,2") == 0
    assert "3 jobs: 3 done (" in capfd.readouterr().out


def test_a_sweep_that_is_stopped_says_what_is_done_what_remains_and_how_to_go_on(
    sweep_here: Sweep,
    shrunk: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = {name: signal.getsignal(name) for name in ending.SIGNALS}

    def stopped(cfg: Any, folder: Path, **arguments: Any) -> None:
        if cfg.seed == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner, "run", stopped)
    monkeypatch.setattr("viditq.sweeps.table.NAMED", 1)
    try:
        with pytest.raises(SystemExit) as end:
            sweep_here("-m", *shrunk, "seed=range(0,4)")
    finally:
        monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
        for name, handler in before.items():
            signal.signal(name, handler)
    assert end.value.code == 143
    out, err = capfd.readouterr()
    assert "\nstopped by SIGTERM. Finished work is kept" in err
    assert "job 1, seed=1: unfinished: interrupted by SIGTERM. The same command continues it." in out
    assert "4 jobs: 1 done, 1 unfinished, 2 not begun (" in out
    assert "\nnot begun: seed=2, and 1 more\ngo on with: python run.py -m " in out and "'seed=range(0,4)' " in out
    with lock(Path(records(tmp_path)[1].folder), lambda: None):
        print_sweep(next((tmp_path / "_sweeps").iterdir()), records(tmp_path))
    out = capfd.readouterr().out
    assert "job 1, seed=1: running now" in out and "2 jobs: 1 done, 1 running now (" in out and "go on" not in out


def test_which_jobs_there_are_of_a_grid_and_of_a_tuning() -> None:
    def planned(*overrides: str) -> list[list[str]]:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", [*overrides], return_hydra_config=True)
        SweepFolder().on_multirun_start(cfg)
        return planned_jobs()

    params = ["hydra.sweeper.params.seed='3,4'", "hydra.sweeper.params.experiment=naive"]
    jobs = planned("experiment=bench", *params, "batch_size=2")
    assert all({"experiment=naive", "batch_size=2"} <= {*job} for job in jobs)
    assert sum("seed=4" in job for job in jobs) == len(jobs) / 2 > 1
    trials = planned("experiment=tune_alpha", "hydra.sweeper.n_trials=2")
    assert trials == [["experiment=tune_alpha", f"trial {number}"] for number in range(2)]
    assert planned("seed=9") == [["seed=9"]]


def test_options_that_do_not_exist_are_refused_before_any_job(
    sweep_here: Sweep, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "run", lambda cfg, folder, **_: pytest.fail("a job was started"))
    assert sweep_here("-m", "quant=w8a8,w3a3") == 2
    captured = capfd.readouterr()
    assert "w3a3" in captured.err and "w4a8_naive" in captured.err and "\nsweep" not in captured.out


def test_a_sweep_without_jobs_says_so(sweep_here: Sweep, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep_here("-m", "seed=range(0,0)") == 2
    assert "The sweep has no jobs" in capfd.readouterr().err


def test_launcher_that_is_not_installed(sweep_here: Sweep, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep_here("-m", "quant=w8a8,w4a8", "hydra/launcher=ray") == 2
    assert '--editable ".[sweeps]"' in capfd.readouterr().err


def test_process_of_a_job_that_died() -> None:
    """As joblib and submitit report it, without a traceback."""
    from joblib.externals.loky.process_executor import TerminatedWorkerError
    from submitit.core.utils import UncompletedJobError

    for error in (TerminatedWorkerError("killed by SIGKILL.\nmore"), UncompletedJobError("Job 1")):
        message = cli.user_message(error)
        assert message and "The same command continues" in message and "more" not in message.split(": ")[1]


def test_optuna_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r'--editable "\.\[sweeps\]"'):
        tune(TUNING, tmp_path, [], FakeJobs(tmp_path))


def test_failed_gate_is_a_finished_job(
    sweep_here: Sweep, shrunk: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit status 3 if gates are all that went wrong; the numbers are there all the same."""

    def fail_gate(cfg: Any, folder: Path, **arguments: Any) -> None:
        numbers = {
            "metrics": {"psnr": 28.5},
            "standard_errors": {},
            "labels": {"psnr": {"label": "PSNR", "unit": "dB"}},
        }
        numbers |= {"average_weight_bits": 5.0, "average_activation_bits": 8.0, "size_bytes": 10**6, "seconds": {}}
        (folder / "metrics.json").write_text(json.dumps(numbers))
        raise GateFailed("psnr: wanted >= 30, found 28.5\nssim: wanted >= 1, found 0.9")

    monkeypatch.setattr(runner, "run", fail_gate)
    assert sweep_here("-m", *shrunk, "seed=5,6") == 3
    out = capfd.readouterr().out
    assert "job 1, seed=6: gate failed: psnr: wanted >= 30, found 28.5" in out and "28.50" in out
    assert "gate failed: ssim: wanted >= 1" in out and "2 jobs: 2 done (" in out


def test_exit_status() -> None:
    done, failed = JobRecord(0, [], "", "done"), JobRecord(1, [], "", "failed")
    gated = JobRecord(2, [], "", "done", gate_failures=["psnr 28 is not >= 30"])
    assert [exit_status(jobs) for jobs in ([], [done], [done, gated], [gated, failed], [JobRecord(3, [], "")])] == [
        *(0, 0, 3, 2, 2)
    ]


def test_record_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(SWEEP_VARIABLE, str(tmp_path))
    job = JobRecord(3, ["seed=1"], "folder")
    job.write()
    assert read_jobs(tmp_path) == [job] and job.status == "running"
    job.done({"metrics": {"psnr": 30.0}}, ["psnr"])
    (again,) = read_jobs(tmp_path)
    assert (again.status, again.metrics["metrics"], again.gate_failures) == ("done", {"psnr": 30.0}, ["psnr"])
    job.failed("two\nlines")
    assert read_jobs(tmp_path)[0].message == "two\nlines" and len(list(tmp_path.iterdir())) == 1
    for other in ("[]", "{}", '{"more": 1}'):
        next(tmp_path.iterdir()).write_text(other)
        with pytest.raises(UserError, match=r"0003\.json is no record of a job"):
            read_jobs(tmp_path)
    assert cli.summary_of_sweep("again") is None and "is no record of a job" in capsys.readouterr().err
    assert exit_status(None) == 2


def test_table_shows_what_is_measured_and_takes_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def metrics(name: str, value: float | None) -> dict[str, Any]:
        numbers = {"average_weight_bits": 5.0, "average_activation_bits": 8.0, "size_bytes": 2_340_000}
        labels = {name: {"label": name.upper(), "unit": "dB", "higher_is_better": True}}
        return {"metrics": {name: value}, "standard_errors": {name: 0.5}, "labels": labels, "seconds": {}, **numbers}

    both = ["experiment=x", "model=[a]"]
    jobs = [JobRecord(0, [*both, "seed=[0]"], "f", "done", metrics=metrics("psnr", 31.42))]
    jobs += [JobRecord(1, [*both, "seed=1"], "f", "done", metrics=metrics("ssim", None), gate_failures=["ssim 0 < 1"])]
    jobs += [JobRecord(2, [*both, "seed=2"], "f", "done")]
    print_sweep(tmp_path, jobs)
    out = capsys.readouterr().out
    for words in ("sweep experiment=x model=[a]", "seed=[0]", "PSNR dB 31.42 ± 0.50", "SSIM dB undefined", "2.34"):
        assert words in out
    assert "job 1, seed=1: gate failed: ssim 0 < 1" in out and "3 jobs: 3 done (" in out


# Launchers with processes of their own --------------------------------------------------------------------------------


def launched(launcher: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python run.py -m` through a launcher, with a logger that leaves the W&B group it was given."""
    command = [sys.executable, "run.py", "-m", f"launcher={launcher}", *arguments, f"hydra.sweep.dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    group = ["logger=none", "logger._target_=sweep_logger.group_logger", *MEASURE_ONLY[1:]]
    return subprocess.run([*command, *group], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def groups(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("group.txt")}


@pytest.fixture(scope="module")
def joblib_sweep(shrunk: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two jobs that need the same reference and statistics at once, and one that fails; folder and output."""
    folder = tmp_path_factory.mktemp("joblib")
    done = launched("joblib", folder, *shrunk, f"cache_dir='{folder}/cache'", "quant.weight.bits=4,8,four")
    assert done.returncode == 2, done.stdout + done.stderr
    return folder, done.stdout


def test_joblib(joblib_sweep: tuple[Path, str]) -> None:
    folder, out = joblib_sweep
    assert [job.status for job in records(folder)] == ["done", "done", "failed"]
    assert "job 2, quant.weight.bits=four: failed: bits='four'" in out and "3 jobs: 2 done, 1 failed" in out
    (group,) = groups(folder)
    assert group.startswith("launcher=joblib experiment=smoke") and len(list(folder.rglob("group.txt"))) == 2


def test_shared_stages_are_computed_once(joblib_sweep: tuple[Path, str]) -> None:
    """Both jobs start on an empty cache; one of them samples and calibrates, the other waits and finds it."""
    folder, out = joblib_sweep
    assert len(re.findall(r"2 of 2 float samples generated", out)) == 1
    for kind in ("reference", "stats"):
        assert len(list((folder / "cache" / kind).iterdir())) == 1
    (seconds,) = (json.loads(path.read_text()) for path in (folder / "cache" / "stats").glob("*/seconds.json"))
    metrics = [job.metrics for job in records(folder) if job.metrics]
    assert [m["seconds"]["calibrate"] for m in metrics] == [seconds["calibrate"]] * 2  # a second time would add to it


# Slow: a second launcher of processes; test_joblib has the first, test_launchers_compose all.
@pytest.mark.slow
def test_submitit(shrunk: list[str], shared_cache: Path, finished_run: Path, tmp_path: Path) -> None:
    """submitit's local executor, which runs jobs as its Slurm executor does, and keeps their output in files."""
    bits = "quant.weight.bits=four,4"
    done = launched("submitit_local", tmp_path, *shrunk, f"cache_dir='{shared_cache}'", bits)
    assert done.returncode == 2 and "2 jobs: 1 done, 1 failed" in done.stdout, done.stdout + done.stderr
    assert [job.status for job in records(tmp_path)] == ["failed", "done"]
    assert len(groups(tmp_path)) == 1
    logs = [path.read_text() for path in (tmp_path / "_sweeps").glob("*/submitit/*/*_log.out")]
    assert len(logs) == 2 and any("error: bits='four'" in log for log in logs)


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local", "submitit_slurm"])
def test_launchers_compose(launcher: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["experiment=w8a8", f"launcher={launcher}"], return_hydra_config=True)
    name = {"submitit_local": "LocalLauncher", "submitit_slurm": "SlurmLauncher"}.get(launcher, launcher)
    assert name.lower() in cfg.hydra.launcher._target_.lower()
    if launcher.startswith("submitit"):
        assert OmegaConf.to_container(cfg.hydra.launcher)["submitit_folder"].endswith("/submitit/%j")


def test_records_do_not_depend_on_the_launcher_or_the_number_of_trials() -> None:
    folders = []
    for changes in (
        [],
        ["launcher=joblib"],
        ["hydra.sweeper.n_trials=99"],
        ["hydra.sweeper.objective=ssim"],
        ["seed=1"],
    ):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", ["experiment=tune_alpha", *changes], return_hydra_config=True)
        folders.append(sweep_folder(cfg.hydra))
    assert folders[0] == folders[1] == folders[2] and len(set(folders)) == 3
    assert folders[0].parent == Path.cwd() / "outputs" / "_sweeps"


# Tuning ---------------------------------------------------------------------------------------------------------------

TUNING = Tuning(
    objective="psnr",
    direction="maximize",
    n_trials=8,
    max_batch_size=2,
    seed=0,
    startup_trials=3,
    params={"a": Range(0.0, 1.0, 0.05, 0.3), "b": Range(-1.0, 1.0, 0.1, 0.0)},
    overrides=["x.a=[{a},{b}]", "x.b={b}"],
)


class FakeJobs:
    """Jobs that measure a known function; the one numbered `die_at` kills everything, the one at `fail_at` fails."""

    def __init__(self, folder: Path, die_at: int = -1, fail_at: int = -1) -> None:
        self.folder, self.die_at, self.fail_at, self.ran = folder, die_at, fail_at, list[int]()

    def __call__(self, jobs: list[list[str]], first: int) -> None:
        for number, overrides in enumerate(jobs, first):
            job = JobRecord(number, overrides, str(self.folder))
            job.write()
            if number == self.die_at:
                raise Killed
            self.ran.append(number)
            if number == self.fail_at:
                job.failed("bad luck")
                continue
            a, b = (float(text) for text in overrides[1].removeprefix("x.a=")[1:-1].split(","))
            job.done({"metrics": {"psnr": 40 - (a - 0.7) ** 2 - (b + 0.4) ** 2}})


@pytest.mark.parametrize("die_at", range(8))
def test_killed_and_repeated_study_equals_an_undisturbed_one(
    die_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name, at in (("undisturbed", -1), ("killed", die_at)):
        folder = tmp_path / name
        monkeypatch.setenv(SWEEP_VARIABLE, str(folder))
        if at >= 0:
            with pytest.raises(Killed):
                tune(TUNING, folder, ["base=1"], FakeJobs(folder, at))
        fake = FakeJobs(folder)
        tune(TUNING, folder, ["base=1"], fake)
        assert fake.ran == list(range(at if at > 0 else 0, 8))  # finished trials are not run again
        results.append(json.loads((folder / "trials.json").read_text()))
    assert results[0] == results[1] and len(results[0]) == 8


def test_study_learns_goes_on_after_failures_and_can_be_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWEEP_VARIABLE, str(tmp_path))
    tuning = Tuning(**{**vars(TUNING), "n_trials": 30})
    fake = FakeJobs(tmp_path, fail_at=0)
    tune(TUNING, tmp_path, ["base=1"], fake)
    assert [job.status for job in read_jobs(tmp_path)] == ["failed", *["done"] * 7]
    tune(tuning, tmp_path, ["base=1"], fake)  # the failed one again, and 22 more
    assert fake.ran == [*range(8), 0, *range(8, 30)]
    best = json.loads((tmp_path / "best.json").read_text())
    jobs = read_jobs(tmp_path)
    trials = json.loads((tmp_path / "trials.json").read_text())
    assert trials[0] == {"a": 0.3, "b": 0.0} and all(round(t["a"] / 0.05, 6).is_integer() for t in trials)
    assert len({json.dumps(t) for t in trials}) == 30  # no trial repeats another
    values = [job.metrics["metrics"]["psnr"] for job in jobs if job.metrics]
    assert best["value"] == max(values) > 39.97
    a, b = best["params"]["a"], best["params"]["b"]
    assert best["overrides"] == ["base=1", "hydra.mode=RUN", f"x.a=[{a:g},{b:g}]", f"x.b={b:g}"]
    assert best["command"].startswith("python run.py base=1 hydra.mode=RUN")


def test_batches_are_numbered_one_after_another() -> None:
    assert contiguous([3]) == [(3, [3])]
    assert contiguous([0, 2, 3, 7]) == [(0, [0]), (2, [2, 3]), (7, [7])]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"direction": "up"}, "direction=up. Give maximize or minimize"),
        ({"n_trials": 0}, "n_trials=0"),
        ({"params": {}}, "nothing to tune"),
        ({"n_trials": 2.5}, "n_trials=2.5. Give a whole number of 1 or more"),
        ({"n_trials": None}, "n_trials=None"),
        ({"n_trials": True}, "n_trials=True"),
        ({"max_batch_size": "two"}, "max_batch_size=two"),
        ({"seed": -30}, "seed=-30. Give a whole number of 0 or more"),
        ({"startup_trials": "a"}, "startup_trials=a"),
        ({"params": 3}, "params=3"),
        ({"params": {"a": 3}}, "params.a=3 must have the keys low, high, step, start"),
        ({"params": {"a": {"low": 0, "high": 1, "step": 0.1}}}, "must have the keys low, high, step, start"),
        ({"overrides": "x={a}"}, "overrides=x={a}. See"),
        ({"overrides": []}, "does not use a, b"),
        ({"overrides": [3]}, "3 is no override"),
        ({"overrides": ["x={c}"]}, "'c', which is no parameter. There are a, b"),
        ({"overrides": ["x={}"]}, "which is no parameter"),
        ({"overrides": ["x={"]}, "Braces hold a name alone: a, b"),
        ({"overrides": ["x={a.real_part}"]}, "Braces hold a name alone"),
        ({"overrides": ["x={a:d}"]}, "Braces hold a name alone"),
        ({"overrides": ["x={a}"]}, "does not use b"),
        ({"overrides": ["x={a}", "+x={b}"]}, "sets x twice"),
        ({"what": 3}, "Unknown key hydra.sweeper.what"),
    ],
)
def test_bad_tunings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        Tuning.parse({**asdict(TUNING), **changes})


def test_missing_settings_are_refused() -> None:
    with pytest.raises(UserError, match=re.escape("Missing key hydra.sweeper.objective")):
        Tuning.parse({key: value for key, value in asdict(TUNING).items() if key != "objective"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": 2.0}, "low <= start <= high"),
        ({"low": 1.0, "high": 0.0}, "low <= start <= high"),
        ({"step": 0.0}, "step > 0"),
        ({"low": "a"}, "low must be a number"),
        ({"high": float("nan")}, "high must be a number"),
        ({"high": float("inf")}, "high must be a number"),
        ({"step": None}, "step must be a number"),
        ({"low": 1 / 3}, "at most 10 digits"),
        ({"start": 0.32}, "start must be a whole number of steps above low, such as 0.3 or 0.4"),
        ({"high": 0.95}, "high must be a whole number of steps above low, such as 0.9 or 1.0"),
    ],
)
def test_bad_ranges_are_refused(changes: dict[str, Any], words: str) -> None:
    """A start off the grid ended the study after its first trial."""
    given = {"low": 0.0, "high": 1.0, "step": 0.1, "start": 0.3}
    Range.parse("a", given)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        Range.parse("a", {**given, **changes})
    assert str(error.value).startswith("hydra.sweeper.params.a={")


def test_tune_alpha_killed_after_one_trial_and_repeated(
    sweep_here: Sweep,
    shrunk: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Three real trials; the edge stays where both of the two steps' noise levels (0.999 and 0.666) have a segment."""
    small = [text for text in shrunk if not text.startswith(("experiment=", "quant."))]
    space = ["hydra.sweeper.params.edge={low: 0.7, high: 0.9, step: 0.05, start: 0.8}", "hydra.sweeper.n_trials=3"]
    arguments = ["experiment=tune_alpha", "model=tiny_image", *MEASURE_ONLY, *small]
    arguments.append("data.num_calibration_prompts=2")
    real, started = runner.run, list[str]()

    def run(cfg: Any, folder: Path, **arguments: Any) -> Any:
        started.append(folder.name)
        if len(started) == 2:
            raise Killed
        return real(cfg, folder, **arguments)

    monkeypatch.setattr(runner, "run", run)
    with pytest.raises(Killed):
        sweep_here(*arguments, *space)
    assert [job.status for job in records(tmp_path)] == ["done", "running"]
    assert sweep_here(*arguments, *space) == 0
    assert started[2] == started[1] and len(started) == 4  # the trial that was cut off, then the third
    jobs = records(tmp_path)
    assert [job.status for job in jobs] == ["done"] * 3 and len({job.folder for job in jobs}) == 3
    assert "quant.smoothing.alpha=[0.3,0.3]" in jobs[0].overrides
    out = capfd.readouterr().out
    values = [job.metrics["metrics"]["psnr"] for job in jobs]
    assert f"best psnr: {max(values):.6g} in trial {values.index(max(values))}" in out
    command = re.findall(r"run it: python run.py (.*)", out)[-1]
    assert "hydra.mode=RUN" in command and "quant.smoothing.alpha=[" in command
    assert torch.isfinite(torch.tensor(values)).all()


# The bench's grid -----------------------------------------------------------------------------------------------------


def test_settings_of_a_grid_on_the_command_line(
    sweep_here: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs are composed without the grid, and were refused with the overrides meant for it."""
    monkeypatch.setattr(runner, "run", lambda cfg, folder, **_: None)
    settings = ["'naive,viditq'", "w8a8", "tiny_image"]
    pairs = zip(("experiment", "bits", "model"), settings, strict=True)
    arguments = [f"hydra.sweeper.params.{key}={value}" for key, value in pairs]
    assert (
        sweep_here("experiment=bench", *arguments, "hydra.sweeper.params.seed=4", "hydra.sweeper.max_batch_size=1") == 0
    )
    jobs = [job.overrides for job in records(tmp_path)]
    assert [words[:4] for words in jobs] == [
        [f"experiment={name}", "bits=w8a8", "model=tiny_image", "seed=4"] for name in ("naive", "viditq")
    ]


# Settings of both on the command line --------------------------------------------------------------------------------

BAD_TUNINGS = [
    ("model=tiny_image,tiny_video", "a tuning takes one value"),
    ("hydra.sweeper.objective=lpips", "objective=lpips is not measured here. Choose one of psnr"),
    ("hydra.sweeper.n_trials=0", "n_trials=0"),
    ("hydra.sweeper.params.edge.start=0.51", "such as 0.5 or 0.55"),
    ("hydra.sweeper.params=3", "params=3"),
    ("+hydra.sweeper.what=3", "Unknown key hydra.sweeper.what"),
    ("hydra.sweeper.overrides=['no.key=[{edge},{alpha_low},{alpha_high}]']", "no.key"),
    ("hydra.sweeper.overrides=['seed={edge},{alpha_low},{alpha_high}']", "seed=0.5,0.3,0.3"),
    ("hydra.sweeper.overrides=['seed=[{edge},{alpha_low},{alpha_high}']", "input '[0.5,0.3,0.3'"),
    ("stages=[prompts,reference]", "measures nothing to tune by. Add evaluate"),
    ("quant.segments=[0.0,0.6,1.0]", "this tuning sets quant.segments itself"),
]
BAD_GRIDS = [
    ("hydra.sweeper.params.experiment=", "hydra.sweeper.params.experiment=: give one value, or several in quotes"),
    ("hydra.sweeper.params.experiment=null", "params.experiment=None: give one value"),
    ("hydra.sweeper.params.experiment=[naive]", "params.experiment=['naive']: give one value"),
    ("hydra.sweeper.params.experiment=nope", "nope"),
    ("hydra.sweeper.params.seed=1.5", "seed=1.5"),
    ("hydra.sweeper.params.bits=w9a9", "w9a9"),
    ("hydra.sweeper.params.seed='0,,1'", "seed=0,,1"),
    ("hydra.sweeper.params=null", "params is empty"),
    ("hydra.sweeper.params=3", "params = 3 holds no keys"),
    ("hydra.sweeper.max_batch_size=0", "max_batch_size=0. Give a whole number of 1 or more"),
    ("hydra.sweeper.max_batch_size=a", "max_batch_size=a"),
    ("+hydra.sweeper.what=3", "hydra.sweeper.what"),
]
# Slow: second values of keys that stay; those of a tuning are refused without Hydra above.
SELDOM = (
    *("hydra.sweeper.n_trials=0", "hydra.sweeper.params=3", "hydra.sweeper.params.experiment=null"),
    *("hydra.sweeper.params.experiment=[naive]", "hydra.sweeper.params.bits=w9a9", "hydra.sweeper.max_batch_size=a"),
)
BAD = [(["experiment=tune_alpha"], *bad) for bad in BAD_TUNINGS] + [(["-m", "experiment=bench"], *b) for b in BAD_GRIDS]


@pytest.mark.parametrize(
    ("what", "setting", "words"), [pytest.param(*b, marks=[pytest.mark.slow] * (b[1] in SELDOM)) for b in BAD]
)
def test_bad_settings_on_the_command_line(
    what: list[str],
    setting: str,
    words: str,
    sweep_here: Sweep,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner, "run", lambda cfg, folder, **_: pytest.fail("a job was started"))
    assert sweep_here(*what, setting) == 2
    err = capfd.readouterr().err
    assert words in err and "Traceback" not in err

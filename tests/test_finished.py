"""A finished run is told from stat alone, as the run itself would tell it; in any doubt the run looks for itself."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from shrunk import ROOT, SHRUNK, compose_config, run_shrunk

from viditq import finished, runner
from viditq.assets import SHIPPED
from viditq.cli import guarded_run
from viditq.config import STAGES
from viditq.data import prompts
from viditq.files import lock
from viditq.finished import RECORD, Finished, find_finished, write_finished
from viditq.run_dir import RunDir

HEAVY = ("torch", "lightning", "diffusers", "transformers", "torchmetrics", "wandb", "numpy")
COMMAND = """
import atexit, runpy, sys
sys.argv = {argv!r}
atexit.register(lambda: print("imported", [name for name in {heavy!r} if name in sys.modules]))
runpy.run_path("run.py", run_name="__main__")
"""


@dataclass(frozen=True)
class Run:
    """`<base>/run`, with the cache, the model and the prompts beside it. said: by a run that had nothing to do."""

    base: Path
    said: str = ""

    @property
    def folder(self) -> Path:
        return self.base / "run"

    @property
    def words(self) -> list[str]:
        places = [f"cache_dir='{self.base / 'cache'}'", f"model.path='{self.base / 'model'}'"]
        captions = ["data=prompt_file", f"data.path='{self.base / 'prompts.txt'}'", "data.num_prompts=2"]
        few = ["data.num_calibration_prompts=1", "noise_floor.num_prompts=2", "diagnosis.num_prompts=1"]
        return [*SHRUNK, *places, *captions, *few, "benchmark.max_seconds=0", "metric=[psnr,ssim]"]

    def find(self, *overrides: str, stages: tuple[str, ...] = STAGES) -> Finished | None:
        return find_finished(compose_config(*self.words, *overrides), self.folder, stages)

    def in_cache(self, pattern: str) -> Path:
        return min((self.base / "cache").glob(pattern))


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run twice, so that `said` is what a run says that has nothing left to do."""
    run = Run(tmp_path_factory.mktemp("through"))
    shutil.copytree(SHIPPED / "tiny_image", run.base / "model")
    (run.base / "prompts.txt").write_text("a large red circle on black\na small blue square on white\na green cross\n")
    run_shrunk(run.folder, run.base / "cache", *run.words[len(SHRUNK) :])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run_shrunk(run.folder, run.base / "cache", *run.words[len(SHRUNK) :])
    return Run(run.base, said.getvalue())


@pytest.fixture
def copy(through: Run, tmp_path: Path) -> Run:
    """The same in another place, as if it had been run there."""
    run = Run(Path(shutil.copytree(through.base, tmp_path / "copy")))
    for name in (RECORD, "run.json"):
        (run.folder / name).write_text((run.folder / name).read_text().replace(str(through.base), str(run.base)))
    record = Finished(**json.loads((run.folder / RECORD).read_text()))
    others = [Path(name) for name in record.folders if Path(name) != run.folder]
    of_run = (compose_config(*run.words), RunDir(run.folder, {}), record.heading, record.stages)
    write_finished(*of_run, others, [run.base / "prompts.txt"], map(Path, record.files), time.time_ns())
    return run


def test_what_is_said_is_what_the_run_itself_says(
    through: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("the run looked for itself"))
    guarded_run(compose_config(*through.words), through.folder)
    assert capsys.readouterr().out == re.sub(r"threads: .*\n", "", through.said)
    assert "[9/11] benchmark: left out: " in through.said and "[10/11] evaluate: already done (" in through.said


def test_of_some_stages_and_with_a_gate(
    through: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("the run looked for itself"))
    with pytest.raises(SystemExit, match="3"):
        guarded_run(compose_config(*through.words, "stages=[report]", 'gate={psnr: ">= 90"}'), through.folder)
    said = capsys.readouterr()
    assert "[1/1] report: already done (" in said.out and "gate failed\npsnr: wanted >= 90, found" in said.err
    guarded_run(compose_config(*through.words, 'gate={psnr: ">= 1"}'), through.folder)
    with pytest.raises(SystemExit, match="2"):
        guarded_run(compose_config(*through.words, 'gate={psn: ">= 1"}'), through.folder)


@pytest.mark.parametrize("sweep", [False, True])
def test_nothing_heavy_is_imported(through: Run, sweep: bool) -> None:
    """A job of a sweep too, whose record and table are made all the same."""
    swept = ["-m", f"hydra.sweep.dir='{through.base}'", "hydra.sweep.subdir=run"]
    argv = ["run.py", *(swept if sweep else [f"hydra.run.dir='{through.folder}'"]), *through.words]
    command = COMMAND.format(argv=argv, heavy=HEAVY)
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode and done.stdout.endswith("imported []\n"), done.stdout + done.stderr
    assert "[11/11] report: already done (" in done.stdout and done.stderr == ""
    assert ("1 job: 1 done" in done.stdout) == sweep


def test_a_record_is_found_as_long_as_nothing_has_changed(copy: Run) -> None:
    assert copy.find() is not None and copy.find('gate={psnr: ">= 30"}', stages=("report",)) is not None
    (copy.folder / "hydra").mkdir(exist_ok=True)
    (copy.folder / "hydra" / "config.yaml").write_text("of Hydra, at every start")
    (copy.folder / "viditq.log").touch()
    (copy.folder / "wandb").mkdir()
    (copy.in_cache("prompts/*") / "of_others.safetensors").touch()
    assert copy.find() is not None


def rewrite(path: Path) -> None:
    """Other content of the same size, its times set back as far as they can be."""
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Run], object]] = {
    "sample": lambda run: rewrite(run.folder / "samples" / "000001.png"),
    "sample gone": lambda run: (run.folder / "samples" / "000000.png").unlink(),
    "checksum gone": lambda run: (run.folder / "samples" / ".000000.png.sha256").unlink(),
    "sample cut off": lambda run: os.truncate(run.folder / "samples" / "000000.png", 100),
    "artifact": lambda run: rewrite(run.folder / "quantized" / "model.safetensors"),
    "artifact gone": lambda run: shutil.rmtree(run.folder / "quantized"),
    "configuration of the folder": lambda run: rewrite(run.folder / "run.json"),
    "numbers gone": lambda run: (run.folder / "metrics.json").unlink(),
    "page": lambda run: (run.folder / "report.html").write_text("<html>"),
    "logged": lambda run: (run.folder / "logged.json").write_text("[]"),
    "left by a kill": lambda run: (run.folder / ".plan.json.17.tmp").touch(),
    "reference": lambda run: rewrite(run.in_cache("reference/*/000000.png")),
    "a floor's sample gone": lambda run: [p.unlink() for p in (run.base / "cache").glob("reference/*/000001.png")],
    "statistics": lambda run: rewrite(run.in_cache("stats/*/stats.safetensors")),
    "embeddings gone": lambda run: run.in_cache("prompts/*/*.safetensors").unlink(),
    "cache gone": lambda run: shutil.rmtree(run.base / "cache"),
    "prompts": lambda run: rewrite(run.base / "prompts.txt"),
    "prompts gone": lambda run: (run.base / "prompts.txt").unlink(),
    "weights": lambda run: rewrite(run.base / "model" / "transformer" / "diffusion_pytorch_model.safetensors"),
    "more in the model": lambda run: (run.base / "model" / "vae" / "other.safetensors").touch(),
    "part of the model gone": lambda run: shutil.rmtree(run.base / "model" / "text_encoder"),
    "record cut off": lambda run: os.truncate(run.folder / RECORD, 1000),
    "no record": lambda run: (run.folder / RECORD).write_text("[]"),
    "record of nothing": lambda run: (run.folder / RECORD).write_text('{"made_by": {}}'),
}


# Slow: more files of each kind.
QUICK = ("sample", "sample gone", "artifact", "reference", "cache gone", "prompts", "weights", "no record")


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] * (w not in QUICK)) for w in CHANGES])
def test_a_changed_file_is_a_doubt(copy: Run, what: str) -> None:
    assert copy.find() is not None
    CHANGES[what](copy)
    assert copy.find() is None


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "logger=csv",
        "backend=fake",
        "estimate=true",
        "fit=16GB",
        "benchmark.max_seconds=1",
        "+trainer.log_every_n_steps=9",
    ],
)
def test_another_configuration_is_a_doubt(through: Run, override: str) -> None:
    assert through.find() is not None and through.find(override) is None


def test_another_version_is_a_doubt(through: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "versions", lambda: {"torch": "1.0"})
    assert through.find() is None
    monkeypatch.undo()
    monkeypatch.setattr(finished, "PACKAGE", finished.PACKAGE / "quant")  # the same as other sources
    assert through.find() is None


def test_another_place_is_a_doubt(copy: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Relative paths of the configuration name other files there; and what is said holds the folder's name."""
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        assert copy.find() is None
    moved = copy.folder.rename(copy.base / "moved")
    assert find_finished(compose_config(*copy.words), moved, STAGES) is None


def test_a_stage_that_was_not_asked_for_is_a_doubt(copy: Run) -> None:
    record = json.loads((copy.folder / RECORD).read_text())
    del record["stages"]["calibrate"]
    (copy.folder / RECORD).write_text(json.dumps(record))
    assert copy.find() is None and copy.find(stages=("quantize", "generate")) is not None


def test_a_folder_that_another_process_holds_is_a_doubt(through: Run) -> None:
    with lock(through.folder, lambda: None):
        assert through.find() is None
    assert through.find() is not None


def test_one_of_several_processes_looks_with_the_others(through: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert through.find() is None


@dataclass
class PromptFile(prompts.PromptFile):
    """As anybody may write one, who does not say what is read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        del self.files


@pytest.mark.parametrize("why", ["nothing", "memory", "prompts", "hub", "edited meanwhile", "model edited meanwhile"])
def test_no_record_where_something_may_change_unseen(copy: Run, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """Such as a benchmark that was left out for want of memory."""
    words = copy.words[len(SHRUNK) :]
    if why == "memory":
        words += ["benchmark.max_seconds=null"]
        monkeypatch.setattr("viditq.stages.benchmark.free_bytes", lambda device: 1)
    if why == "prompts":
        words += [f"data._target_={__name__}.PromptFile"]
    if why == "hub":
        monkeypatch.setattr("viditq.models.adapter.ModelAdapter.of_hub", True)
    if "edited" in why:  # after it was read: what is on disk is not what the run was made by
        file = copy.base / ("model/vae/config.json" if "model" in why else "prompts.txt")
        monkeypatch.setattr(runner, "log", lambda *_: file.write_text(file.read_text() + "\n"))
    (copy.folder / RECORD).unlink()
    run_shrunk(copy.folder, copy.base / "cache", *words)
    assert (copy.folder / RECORD).exists() == (why == "nothing")

"""model.compile: the run compiles what samples, one graph for each segment; a machine without a compiler is told.

Graphs are traced for real and run as they are, without the compiler, which takes a minute each.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from viditq.errors import UserError
from viditq.experiment import build
from viditq.job import Job
from viditq.loading import load_artifact
from viditq.models.compiling import check_compiler, compiled_twin
from viditq.run_dir import RunDir

Run = Callable[..., dict[str, Any] | None]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that torch.compile has traced since."""
    traced: list[torch.fx.GraphModule] = []
    compile_ = torch.compile

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=keep))
    return traced


def job_of(configure: Callable[..., Any], shrunk: list[str], cache: Path, folder: Path, *overrides: str) -> Job:
    experiment = build(configure(*shrunk, f"cache_dir='{cache}'", *overrides))
    return Job(experiment, RunDir(folder, experiment.tracked))


def test_a_twin_is_compiled_and_the_denoiser_is_not(finished_run: Path, graphs: list[Any]) -> None:
    pipeline = load_artifact(finished_run / "quantized", "fake", complete=False)
    denoiser = pipeline.transformer
    twin = compiled_twin(torch.nn.ModuleDict({"transformer": denoiser}))["transformer"]
    assert "forward" not in vars(denoiser) and "forward" in vars(twin)
    assert next(twin.parameters()) is next(denoiser.parameters())


def test_a_compiled_run(
    run: Run,
    configure: Callable[..., Any],
    shrunk: list[str],
    finished_run: Path,
    shared_cache: Path,
    tmp_path: Path,
    graphs: list[Any],
) -> None:
    """Float samples are other ones, statistics are those of any run; the artifact does not know of it."""
    plain, compiled = (
        job_of(configure, shrunk, shared_cache, tmp_path / "run", f"model.compile={value}") for value in (False, True)
    )
    assert compiled.reference.path != plain.reference.path and compiled.stats.path == plain.stats.path
    assert compiled.embeds.path == plain.embeds.path
    assert compiled.floors["bfloat16"].path != plain.floors["bfloat16"].path
    assert "compile" not in plain.experiment.tracked["model"] and compiled.experiment.tracked["model"]["compile"]
    run(tmp_path / "run", shared_cache, "model.compile=true", "stages=[prompts,reference,calibrate,quantize,generate]")
    assert len(graphs) == 3  # of the float model one; two prompts of two steps, each in a segment of its own
    quantized = "quantized/model.safetensors"
    assert (tmp_path / "run" / quantized).read_bytes() == (finished_run / quantized).read_bytes()
    assert '"compile"' not in (tmp_path / "run" / "quantized" / "meta.json").read_text()
    for name in ("000000.png", "000001.png"):
        assert (tmp_path / "run/samples" / name).read_bytes() == (finished_run / "samples" / name).read_bytes()


def test_no_compiler_is_told_before_any_work(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"model\.compile=true needs a C\+\+ compiler, and g\+\+ is not there"):
        run(tmp_path / "run", tmp_path / "cache", "model.compile=true")
    monkeypatch.setenv("CXX", "/nowhere/clang++")
    with pytest.raises(UserError, match=r"/nowhere/clang\+\+ is not there"):
        run(tmp_path / "run", tmp_path / "cache", "model.compile=true")
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_what_cannot_be_compiled_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"model\.compile='yes' must be true or false"):
        run(tmp_path / "run", tmp_path / "cache", "model.compile='yes'")
    with pytest.raises(UserError, match=r"trainer\.offload=model: .* Choose one of the two"):
        check_compiler(torch.device("cuda"), "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package triton"):
        check_compiler(torch.device("cuda"), None)

"""quant/policy=sensitivity as part of a run, and on its own."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from viditq.errors import UserError
from viditq.experiment import build
from viditq.quant.plan import QuantPlan
from viditq.stages import search_result, search_table

SEARCH = (
    "quant/policy=sensitivity",
    "quant/smoothing=none",
    "quant.policy.num_prompts=1",
    "quant.policy.weight_choices=[4,8]",
    "quant.policy.budget.weight_bits=5",
    "noise_floor.num_prompts=0",
    "diagnosis.num_prompts=0",
    "metric=psnr",
)
Run = Callable[..., dict[str, Any] | None]


@pytest.fixture(scope="module")
def searched(run: Run, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that has searched its plan."""
    folder = tmp_path_factory.mktemp("search") / "run"
    run(folder, shared_cache, *SEARCH, "quant.policy.curve=[0,1]")
    return folder


def load_script(path: str) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parents[1] / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "search.json").read_text())


def test_the_run_uses_the_plan_it_has_found(searched: Path) -> None:
    plan = QuantPlan.from_json((searched / "plan.json").read_text())
    assert (searched / "quantized" / "plan.json").read_text() == (searched / "plan.json").read_text()
    assert {name for names in plan.layers.values() for name in names} == {"w4a8", "w8a8"}
    found = read(searched)
    assert found["used"]["weight_bits"] == pytest.approx(5, abs=0.2) and found["used"]["weight_bits"] <= 5 + 1e-6
    metrics = json.loads((searched / "metrics.json").read_text())
    assert 5 < metrics["average_weight_bits"] < 6.6  # Linears kept in float count 16
    assert (searched / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert (searched / "budget_curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_and_what_was_predicted(searched: Path) -> None:
    found = read(searched)
    measured = [c for c in found["candidates"] if c["measured"]]
    assert {(c["side"], c["bits"]) for c in measured} == {("weight", 4)}
    assert 6 <= len(measured) < len(found["groups"]) * 2  # the least sensitive parts are not generated
    assert min(c["proxy"] for c in measured) > 0
    assert all(c["output"] > 0 for c in measured)
    by_cell = {(c["group"], c["segment"], c["bits"]): c for c in found["candidates"] if c["side"] == "weight"}
    for (group, segment, bits), c in by_cell.items():
        if bits == 8:
            narrow = by_cell[group, segment, 4]
            assert c["output"] == pytest.approx(narrow["output"] * c["proxy"] / narrow["proxy"])
    low, high = found["curve"]
    assert high["weight_bits"] == 8 and high["measured"] < low["measured"] and high["predicted"] < low["predicted"]


def test_other_budgets_take_everything_from_the_table(
    run: Run, searched: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_table, "Probing", lambda *_, **__: pytest.fail("a candidate was generated again"))
    monkeypatch.setattr(search_table, "ProxyPass", lambda *_, **__: pytest.fail("proxies were computed again"))
    others = ("quant.policy.budget.weight_bits=6", "quant.policy.solver=greedy", "quant.policy.objective=output")
    run(tmp_path / "run", shared_cache, *SEARCH, *others, "stages=[prompts,search]")
    assert read(tmp_path / "run")["used"]["weight_bits"] > read(searched)["used"]["weight_bits"]
    run(tmp_path / "run", shared_cache, *SEARCH, *others, "stages=[prompts,search]")  # finds plan.json


def test_a_killed_search_goes_on_where_it_stopped(
    run: Run, searched: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    written: list[Path] = []
    real = search_table.write_json

    def spy(path: Path, value: Any) -> None:
        if len(written) == 5 and not (tmp_path / "tried").exists():
            raise Killed
        written.append(path)
        real(path, value)

    for module in (search_table, search_result):
        monkeypatch.setattr(module, "write_json", spy)
    overrides = (*SEARCH, "seed=3", "stages=[prompts,calibrate,search]")
    with pytest.raises(Killed):
        run(tmp_path / "run", shared_cache, *overrides)
    assert not (tmp_path / "run" / "plan.json").exists()
    (tmp_path / "tried").touch()
    run(tmp_path / "run", shared_cache, *overrides)
    assert len(set(written)) == len(written), "something was made twice"
    assert sum(c["measured"] for c in read(tmp_path / "run")["candidates"]) == len(written) - 2  # proxies, search.json


def test_proxy_alone_generates_nothing(
    run: Run, searched: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_table, "Probing", lambda *_, **__: pytest.fail("a candidate was generated"))
    run(tmp_path / "run", shared_cache, *SEARCH, "quant.policy.measure=proxy", "stages=[prompts,search]")
    found = read(tmp_path / "run")
    assert not any(c["measured"] for c in found["candidates"])
    assert found["used"]["weight_bits"] <= 5 + 1e-6


def test_quantize_without_a_found_plan_says_so(run: Run, shared_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Run the stage search before"):
        run(tmp_path / "run", shared_cache, *SEARCH, "seed=4", "stages=[prompts,quantize]")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quant.policy.weight_choices=[4,9]"], "different bit-widths from 2 to 8"),
        (["quant.policy.measure=some"], "choose one of all, pruned, proxy"),
        (["quant.policy.solver=fast"], "choose one of exact, greedy"),
        (["quant.policy.num_prompts=0"], "at least 1"),
        (["quant.policy.prune=1"], "from 0 to below 1"),
        (["quant.policy.curve=[2]"], "numbers from 0 to 1"),
        (["quant.policy.budget.weight_bits=null"], "has no budget"),
        (["+quant.policy.budget.watts=3"], "no field 'watts'"),
        (["~quant.policy.metrics.default"], "needs the entry 'default'"),
        (["quant=none"], "changes the bits of a recipe"),
    ],
)
def test_bad_settings_are_refused_before_slow_work(
    overrides: list[str], words: str, configure: Callable[..., DictConfig]
) -> None:
    with pytest.raises(Exception) as error:
        build(configure("name=x", "quant/policy=sensitivity", *overrides))
    causes = [error.value, error.value.__cause__]
    assert any(isinstance(cause, UserError) and words in str(cause) for cause in causes), error.value


def test_search_plan_script(
    searched: Path,
    shared_cache: Path,
    shrunk: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*shrunk, *SEARCH, f"cache_dir='{shared_cache}'", "--weight-bits", "5", "6", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["search_plan.py", *arguments])
    with pytest.raises(SystemExit) as done:
        load_script("scripts/search_plan.py").main()
    assert done.value.code == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split("|")[1].strip()[0] for line in table if line.startswith("| ")][-2:] == ["5", "6"]
    assert (tmp_path / "tiny_image" / "weight_bits=6" / "plan.json").is_file()
    assert (tmp_path / "tiny_image" / "budget_curve.png").is_file()

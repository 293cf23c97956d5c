"""quant/policy=sensitivity as part of a run, and on its own."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig

from viditq.assets import resolve_plan
from viditq.errors import UserError
from viditq.experiment import build
from viditq.quant.description.plan import QuantPlan
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
GOLDEN = Path(__file__).parent / "data" / "golden" / "open_sora"
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
    predicted = [p["predicted"] for p in found["predicted_curve"]]
    assert len(predicted) > 5 and predicted == sorted(predicted, reverse=True)
    bits = [p["weight_bits"] for p in found["predicted_curve"]]
    assert bits[0] == pytest.approx(4) and bits[-1] == pytest.approx(8)
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


# Slow: that a search of bits is shared out; what processes share and how is in test_processes.py.
@pytest.mark.slow
def test_two_processes_share_the_candidates(run: Run, searched: Path, tmp_path: Path) -> None:
    processes = ("trainer=ddp_cpu", "trainer.devices=2", "stages=[prompts,calibrate,search]")
    run(tmp_path / "run", tmp_path / "cache", *SEARCH, *processes)
    found, alone = read(tmp_path / "run"), read(searched)
    assert found["bits"] == alone["bits"]
    for one, other in zip(found["candidates"], alone["candidates"], strict=True):
        assert one["measured"] == other["measured"] and one["group"] == other["group"]
        for score in ("proxy", "output", "metric"):
            assert one[score] == pytest.approx(other[score], rel=1e-5)


def test_activations_are_generated_and_searched_with_the_weights(run: Run, shared_cache: Path, tmp_path: Path) -> None:
    """Weights and activations in one knapsack; both sides' fewest bits are scored by real samples."""
    both = ("quant.policy.activation_choices=[4,8]", "quant.policy.budget.activation_bits=6", "quant.policy.prune=0")
    run(tmp_path / "run", shared_cache, *SEARCH, *both, "stages=[prompts,calibrate,search,quantize]")
    found = read(tmp_path / "run")
    measured = [c for c in found["candidates"] if c["measured"]]
    assert {(c["side"], c["bits"]) for c in measured} == {("weight", 4), ("activation", 4)}
    assert len(measured) == len(found["groups"]) * 2 * 2 and all(c["output"] > 0 for c in measured)
    for side, limit in (("weight", 5), ("activation", 6)):
        assert limit - 0.5 < found["used"][f"{side}_bits"] <= limit + 1e-6
    plan = QuantPlan.from_json((tmp_path / "run" / "quantized" / "plan.json").read_text())
    assert {"w4a4", "w8a8"} < set(plan.schemes)
    assert found["proxy_correlation"]["activation"] > 0.3


def test_a_table_of_latencies(run: Run, searched: Path, shared_cache: Path, tmp_path: Path) -> None:
    """w8a8 is the fastest, so bytes are what w4a8 is for: both limits hold, from the table that is already there."""
    costs = "quant.policy.budget.latency_costs={w4a8:0.72,w8a8:0.58}"
    limits = ("quant.policy.budget.latency=0.66", "quant.policy.budget.size_bytes=1.9e+6")
    without = ("quant.policy.budget.weight_bits=null", "stages=[prompts,search]")
    run(tmp_path / "run", shared_cache, *SEARCH[:4], *SEARCH[5:], costs, *limits, *without)
    found = read(tmp_path / "run")
    assert 0.58 < found["used"]["latency"] <= 0.66 + 1e-6 and found["used"]["size_bytes"] <= 1.9e6
    table = {4: 0.72, 8: 0.58}
    assert {b for *_, b, _ in found["bits"]} == set(table)
    with pytest.raises(UserError, match="latency_costs has no w8a8"):
        run(
            tmp_path / "other",
            shared_cache,
            *SEARCH[:4],
            *SEARCH[5:],
            costs.replace(",w8a8:0.58", ""),
            *limits,
            *without,
        )


def test_a_shipped_plan_and_a_model_without_one(configure: Callable[..., DictConfig]) -> None:
    for model in ("tiny_video", "tiny_image"):
        plan = build(configure("experiment=w4a8_mp", f"model={model}")).plan
        assert plan.num_segments == 4 and plan.bits_vary and {"w4a8", "w6a8"} <= set(plan.schemes)
    with pytest.raises(Exception, match=r"shipped:pixart_alpha/w4a8_mp.*experiment=w4a8_mp_search"):
        build(configure("experiment=w4a8_mp", "model=pixart_alpha", "model.path=shipped:tiny_image"))


def test_the_shipped_plan_of_open_sora_is_the_published_one() -> None:
    plan = QuantPlan.from_json(resolve_plan("shipped:opensora_v1/w4a8_mp").read_text())
    for side, name in (("weight", "t20_weight_4_mp"), ("activation", "t20_act_8_mp")):
        table = yaml.safe_load((GOLDEN / f"{name}.yaml").read_text())
        for segment, span in enumerate(("4-0", "9-5", "14-10", "19-15")):
            for layer, bits in table[span].items():
                scheme = plan.scheme(layer.removeprefix("model."), segment)
                assert scheme is not None and getattr(scheme, side).bits == bits


def test_proxy_alone_generates_nothing(
    run: Run, searched: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_table, "Probing", lambda *_, **__: pytest.fail("a candidate was generated"))
    run(tmp_path / "run", shared_cache, *SEARCH, "quant.policy.measure=proxy", "stages=[prompts,search]")
    found = read(tmp_path / "run")
    assert not any(c["measured"] for c in found["candidates"])
    assert found["used"]["weight_bits"] <= 5 + 1e-6


def test_proxies_do_not_hang_on_what_other_choices_left(
    run: Run, searched: Path, shared_cache: Path, tmp_path: Path
) -> None:
    """A wide candidate follows the narrowest choice, which another search may not have had."""

    def of_eight_bits(folder: Path) -> dict[tuple[str, int], float]:
        found = read(folder)["candidates"]
        return {(c["group"], c["segment"]): c["proxy"] for c in found if (c["side"], c["bits"]) == ("weight", 8)}

    for choices in ("[6,8]", "[4,8]"):  # in the cache of the search of [4,8]
        others = (f"quant.policy.weight_choices={choices}", "quant.policy.measure=proxy", "stages=[prompts,search]")
        run(tmp_path / choices, shared_cache, *SEARCH, "quant.policy.budget.weight_bits=7", *others)
    assert of_eight_bits(tmp_path / "[4,8]") == of_eight_bits(searched) != of_eight_bits(tmp_path / "[6,8]")


@pytest.mark.parametrize(
    ("metric", "why"), [("fid", "has no score per prompt"), ("log_mel", "compares sound, and a search frames alone")]
)
def test_a_metric_that_a_search_cannot_judge_by_is_refused_at_once(
    metric: str, why: str, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"metrics.default {why}"):
        run(tmp_path / "run", tmp_path / "cache", *SEARCH, f"metric@quant.policy.metrics.default={metric}")
    assert not (tmp_path / "cache").exists()


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
        (["quant.policy.budget.weight_bits=3"], "weight_bits=3 is not possible: the least that the choices allow is 4"),
        (["quant=w4", "quant.policy.budget.activation_bits=8"], "activation_bits=8 is not possible"),
        (["quant.policy.budget.size_bytes=1000"], "size_bytes=1000 is not possible"),
        (
            ["quant.policy.budget.latency=0.6", "quant.policy.budget.latency_costs={w4a8:0.7}"],
            "latency_costs has no w6a8",
        ),
        (["+metric@quant.policy.metrics.mpl=ssim"], "metrics names 'mpl', which is no role: cross_attention"),
        (["quant.policy.prune=1"], "from 0 to below 1"),
        (["quant.policy.curve=[2]"], "numbers from 0 to 1"),
        (["quant.policy.budget.weight_bits=null"], "has no budget"),
        (["quant.policy.budget.latency=0.6"], "needs latency_costs"),
        (
            ["quant.policy.budget.latency=0.6", "quant.policy.budget.latency_costs=w4a8:0.7"],
            "in a shell it needs quotes",
        ),
        (["quant.policy.budget.size_bytes=1e6", "quant.policy.solver=greedy"], "use solver=exact"),
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
    shrunk = [word for word in shrunk if not word.startswith("name=")]  # an experiment need not be given
    arguments = [*shrunk, *SEARCH, f"cache_dir='{shared_cache}'", "--weight-bits", "5", "6", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["search_plan.py", *arguments])
    with pytest.raises(SystemExit) as done:
        load_script("scripts/search_plan.py").main()
    assert done.value.code == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split("|")[1].strip()[0] for line in table if line.startswith("| ")][-2:] == ["5", "6"]
    assert (tmp_path / "tiny_image" / "weight_bits_6" / "plan.json").is_file()
    assert (tmp_path / "tiny_image" / "budget_curve.png").is_file()

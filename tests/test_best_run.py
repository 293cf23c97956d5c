"""quant/policy=treatments as part of a run: the plan keeps to its bytes, and nothing is found twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from viditq.errors import UserError
from viditq.export.exact import exact_targets
from viditq.quant.artifact import size_bytes
from viditq.quant.description.plan import QuantPlan
from viditq.report.treatments_view import treatments_view
from viditq.stages import treatment_table
from viditq.stages.treatments import chosen

SIZE = 1.9e6  # tiny_image: 1.84 MB with 3 bits everywhere
BEST = (
    *("quant=none", "quant/smoothing=none", "quant/policy=treatments", "data.num_calibration_prompts=4"),
    *("quant.policy.held_out=2", "quant.policy.num_steps=2", "quant.policy.step_prompts=1"),
    *("quant.policy.weight_choices=[3,8]", "quant.policy.transforms=[none,rotate]"),
    *("quant.policy.groups=[0]", "quant.policy.low_ranks=[0]", f"quant.policy.budget.size={SIZE}"),
    *("noise_floor.num_prompts=0", "diagnosis.num_prompts=0", "metric=psnr"),
)
Run = Callable[..., dict[str, Any] | None]


@pytest.fixture(scope="module")
def best(run: Run, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is quantized."""
    folder = tmp_path_factory.mktemp("best") / "run"
    run(folder, shared_cache, *BEST, "stages=[prompts,calibrate,search,quantize]")
    return folder


def test_a_finalist_is_passed_over_only_where_prompts_agree() -> None:
    errors = [3e-6 * 1.5**i for i in range(8)]
    noisy = [error * (0.5 if i % 2 else 1.8) for i, error in enumerate(errors)]  # a lower mean, by chance
    assert chosen({"by part": errors, "alike": noisy}) == "by part"
    assert chosen({"by part": errors, "alike": [0.5 * error for error in errors]}) == "alike"
    assert chosen({"by part": errors[:4], "alike": [0.5 * error for error in errors[:4]]}) == "by part"  # too few
    assert chosen({"alike": noisy}) == "alike"


def test_the_artifact_keeps_to_the_budget(best: Path) -> None:
    told = json.loads((best / "treatments.json").read_text())
    plan = QuantPlan.from_json((best / "plan.json").read_text())
    assert (best / "quantized" / "plan.json").read_text() == (best / "plan.json").read_text()
    size = size_bytes(best / "quantized")
    taken = next(one for one in told["finalists"] if one["how"] == told["chosen"])
    assert 0.98 * SIZE < size <= SIZE and size == pytest.approx(taken["size"], rel=0.01)
    assert {plan.schemes[name].weight.bits for names in plan.layers.values() for name in names} == {3, 8}  # type: ignore[index, union-attr]
    assert {one["how"] for one in told["finalists"]} == {"by part", "alike"}
    assert taken["how"] == "by part"  # of two held-out prompts
    predicted = [point["predicted"] for point in told["curve"]]
    assert len(predicted) == 9 and predicted == sorted(predicted, reverse=True)
    view = treatments_view(told, best / "treatments.png")
    assert view.picture.startswith("data:image/png;base64,iVBOR") and view.num_prompts == 2
    assert [treatment for _, treatment, _ in view.parts] == [*taken["parts"].values()]
    assert {how for how, *_ in view.finalists} == {"by part", "alike"}
    assert json.loads((best / "run.json").read_text())["quant"]["policy"]["budget"]["size"] == SIZE


def test_another_budget_finds_no_part_again(
    run: Run, best: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(treatment_table, "Treating", lambda *_, **__: pytest.fail("a part was found again"))
    others = ("quant.policy.budget.size=null", "quant.policy.budget.weight_bits=5", "stages=[prompts,search]")
    run(tmp_path / "run", shared_cache, *BEST, *others)
    told = json.loads((tmp_path / "run" / "treatments.json").read_text())
    assert all(one["weight_bits"] <= 5 + 1e-6 for one in told["finalists"])
    monkeypatch.setattr(treatment_table, "Probing", lambda *_, **__: pytest.fail("a plan was generated again"))
    (tmp_path / "run" / "treatments.json").unlink()  # as after a kill
    run(tmp_path / "run", shared_cache, *BEST, *others)
    assert json.loads((tmp_path / "run" / "treatments.json").read_text()) == told


def test_symmetric_and_quick_where_that_is_asked_for(run: Run, shared_cache: Path, tmp_path: Path) -> None:
    """From the search to samples; what came of it needs no zero points, and other programs hold it exactly."""
    asked = ("quant.policy.symmetric=true", "quant.policy.transforms=[none,convrot]", "quant.policy.budget.latency=0.6")
    costs = "quant.policy.budget.latency_costs={w3a8:0.5,w8a8:0.5,convrot:0.2}"
    metrics = run(
        tmp_path / "run",
        shared_cache,
        *BEST,
        *asked,
        costs,
        "stages=[prompts,reference,search,quantize,generate,evaluate]",
    )
    assert metrics is not None and metrics["metrics"]["psnr"] > 15
    plan = QuantPlan.from_json((tmp_path / "run" / "quantized" / "plan.json").read_text())
    assert all(s.weight.symmetric and s.activation.symmetric for s in plan.schemes.values())  # type: ignore[union-attr]
    told = json.loads((tmp_path / "run" / "treatments.json").read_text())
    assert all(one["latency"] <= 0.6 + 1e-9 for one in told["finalists"])
    assert "comfyui" in exact_targets(tmp_path / "run" / "quantized")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quant.policy.budget.size=0.1"], "size=0.1 is .* bytes, and the least that the choices lead to is"),
        (["quant.policy.budget.weight_bits=2"], "weight_bits=2 is not possible"),
        (["quant.policy.held_out=4"], "held_out=4 leaves none of 4 calibration prompts"),
        (["quant=w8a8"], "quant.weight is set, but the search chooses it"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sampled(
    run: Run, overrides: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        run(tmp_path / "run", tmp_path / "cache", *BEST, *overrides)
    assert not (tmp_path / "cache").exists()

"""The original project's mixed-precision files, as they were published."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from viditq.errors import UserError
from viditq.models.stdit import STDiT
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.description.step_ranges import RENAMES, edges_of, import_plan, linspace_levels, parse_ranges, renamed
from viditq.quant.execution.model_linears import linear_names

FOLDER = Path(__file__).parents[2] / "data" / "golden" / "open_sora"
SCHEME = LayerScheme(QuantSpec(8, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True))
NAMES = (FOLDER / "layer_names.txt").read_text().split()


@pytest.fixture(scope="module")
def files() -> dict[str, Any]:
    return {side: yaml.safe_load((FOLDER / f"t20_{side}_mp.yaml").read_text()) for side in ("weight_4", "act_8")}


@pytest.fixture(scope="module")
def plan(files: dict[str, Any]) -> QuantPlan:
    return import_plan(files["weight_4"], files["act_8"], RENAMES["open_sora"], SCHEME)


def test_every_layer_and_range_has_the_bits_of_the_files(plan: QuantPlan, files: dict[str, Any]) -> None:
    assert len(plan.layers) == len(NAMES) == 364
    for segment, key in enumerate(["4-0", "9-5", "14-10", "19-15"]):  # low noise first
        for name in NAMES:
            scheme = plan.scheme(name.removeprefix("model."), segment)
            assert scheme and scheme.weight and scheme.activation
            assert (scheme.weight.bits, scheme.activation.bits) == (
                files["weight_4"][key][name],
                files["act_8"][key][name],
            )


def test_the_noisiest_quarter_is_w8_and_later_attention_w4(plan: QuantPlan) -> None:
    """As the paper's published plan is described: mlp at W8 throughout; one block's temporal attention excepted."""
    bits = {s: {n: plan.scheme(n, s).weight.bits for n in plan.layers} for s in range(4)}  # type: ignore[union-attr]
    assert set(bits[3].values()) == {8}
    for segment in range(3):
        assert {b for n, b in bits[segment].items() if ".mlp." in n} == {8}
        wide = {n.rpartition(".")[0] for n, b in bits[segment].items() if ".mlp." not in n and b != 4}
        assert len(wide) == (segment == 0) and all("attn_temp" in name for name in wide)


def test_edges_lie_between_the_steps(plan: QuantPlan) -> None:
    levels = linspace_levels(20)
    assert (levels[0], levels[-1], len(levels)) == (0.0, 0.999, 20)
    for low, high, edge in zip(levels[4::5], levels[5::5], plan.edges[1:-1], strict=False):
        assert low < edge < high
    assert QuantPlan.from_json(plan.to_json()) == plan


def test_one_file_alone_leaves_the_other_side(files: dict[str, Any]) -> None:
    plan = import_plan(files["weight_4"], None, RENAMES["open_sora"], SCHEME)
    assert {s.activation.bits for s in plan.schemes.values() if s.activation} == {8} and len(plan.schemes) == 2


def test_patterns_of_layers_left_in_float(files: dict[str, Any]) -> None:
    changed = {**files["weight_4"], "fp_layers": {"19-15": ["blocks.4.attn."], "4-0": ["mlp"]}}
    plan = import_plan(changed, files["act_8"], RENAMES["open_sora"], SCHEME)
    assert plan.layers["blocks.4.attn.q"][3] is None and plan.layers["blocks.4.attn.q"][0] is not None
    assert plan.layers["blocks.7.mlp.fc1"][0] is None and plan.layers["blocks.7.mlp.fc1"][1] is not None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([], "must be a mapping"),
        ({"a-b": {}}, "no range of sampling steps"),
        ({"4-0": {"x": 4}, "9-6": {"x": 4}}, "do not follow each other"),
        ({"9-5": {"x": 4}}, "do not follow each other"),
    ],
)
def test_malformed_files_are_refused(fields: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_ranges(fields, "the weight file")


def test_files_that_do_not_belong_together_are_refused(files: dict[str, Any]) -> None:
    table = RENAMES["open_sora"]
    with pytest.raises(UserError, match="different step ranges"):
        import_plan({"19-0": files["weight_4"]["4-0"]}, files["act_8"], table, SCHEME)
    short = {key: dict(list(bits.items())[:5]) for key, bits in files["act_8"].items()}
    with pytest.raises(UserError, match="do not name the same layers"):
        import_plan(files["weight_4"], short, table, SCHEME)
    with pytest.raises(UserError, match=r"names 'model\.other'"):
        renamed("model.other", table)
    with pytest.raises(UserError, match="20-step run"):
        edges_of([(0, 9), (10, 19)], [0.0, 0.5])
    with pytest.raises(UserError, match="leaves the weight in float"):
        import_plan(files["weight_4"], None, table, LayerScheme(None, SCHEME.activation))


def test_names_are_those_of_the_real_model(plan: QuantPlan) -> None:
    """All Linears of STDiT-XL/2 but those that the original keeps in float."""
    with torch.device("meta"):
        names = linear_names(STDiT(sample_size=4, num_frames=2))
    kept = ("t_embedder.", "t_block.", "y_embedder.", "final_layer.")
    assert set(plan.layers) == {name for name in names if not name.startswith(kept)}

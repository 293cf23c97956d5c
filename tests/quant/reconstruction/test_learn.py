"""Roundings learned on a block's output: gradients, what they gain, segments, and what is refused."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_blocks import BLOCKS, Block, collect, sample

from viditq.errors import UserError
from viditq.quant import (
    AdaRound,
    BlockAdaRound,
    BlockReconstruction,
    BlockStore,
    CalibrationStats,
    Chain,
    LayerScheme,
    Nearest,
    QuantPlan,
    QuantSpec,
    Recipe,
    RotateSpec,
    RoundingSpec,
    SmoothSpec,
    linear_names,
    quantize_denoiser,
)
from viditq.quant.execution.backends import get_backend
from viditq.quant.execution.linear import QuantLinear, quant_linears
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import fake_quantize_activation
from viditq.quant.reconstruction.batches import Batches
from viditq.quant.reconstruction.soft import SOFT, Position, SoftLinear, soft_weights

W4, A8 = QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
STATIC = QuantSpec(8)
QUICK = BlockAdaRound(iterations=60, tokens=384, layer_iterations=100)
FEW = replace(QUICK, iterations=8, layer_iterations=8)  # where it does not matter how well they learn
CPU = torch.device("cpu")


def plan_of(denoiser: nn.Module, rounding: RoundingSpec, **how: Any) -> QuantPlan:
    recipe = {"weight": W4, "activation": A8, **how}
    return Recipe(rounding=rounding, **recipe).resolve([n for n in linear_names(denoiser) if n.startswith("blocks")])


def quantized(
    denoiser: nn.Module, stats: CalibrationStats | None, store: BlockStore | None, rounding: RoundingSpec, **how: Any
) -> tuple[nn.Module, list[dict[str, Any]]]:
    records: list[dict[str, Any]] = []
    out = copy.deepcopy(denoiser)
    reconstruct = None if store is None else BlockReconstruction(store, CPU, records.append)
    quantize_denoiser(out, plan_of(denoiser, rounding, **how), stats, reconstruct=reconstruct)
    return out, records


def block_error(exact: nn.Module, other: nn.Module, block: int, levels: list[int]) -> float:
    """Relative squared error of a block's output, on the float model's inputs for prompts never seen."""
    errors: list[float] = []

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        error = other.blocks[block](*args, **kwargs) - output
        errors.append(float(error.square().sum() / output.square().sum()))

    context = next(iter(quant_linears(other).values())).context
    handles = [exact.blocks[block].register_forward_hook(compare, with_kwargs=True), *context.attach(exact).handles]
    with torch.no_grad():
        sample(exact, [50, 51, 52], levels)
    for handle in handles:
        handle.remove()
    return sum(errors)


# Slow: other ranges; what each kind learns has tests of its own below.
@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (W4, STATIC),
        pytest.param(W4, A8, marks=pytest.mark.slow),
        pytest.param(QuantSpec(3, True, "group", 16), None, marks=pytest.mark.slow),
    ],
)
def test_it_beats_nearest_and_layer_by_layer(
    denoiser: nn.Module, stats: CalibrationStats, store: BlockStore, weight: QuantSpec, activation: QuantSpec | None
) -> None:
    how = {"weight": weight, "activation": activation}
    rounding = replace(QUICK, iterations=100, layer_iterations=300)
    learned, records = quantized(denoiser, stats, store, rounding, **how)
    nearest, _ = quantized(denoiser, stats, None, Nearest(), **how)
    layers, _ = quantized(denoiser, stats, None, AdaRound(), **how)
    assert [record["block"] for record in records] == BLOCKS
    ours, before, alone = (
        sum(block_error(denoiser, model, block, [950, 350]) for block in range(2))
        for model in (learned, nearest, layers)
    )
    assert ours < 0.75 * before and ours < 1.1 * alone
    for record in records:
        assert record["kept"] != "nearest" and record["kept"] == min(record["errors"], key=record["errors"].get)
        assert record["inputs"] and record["steps"] == 100


@pytest.mark.parametrize("chain", [RotateSpec(), SmoothSpec(0.5), None])
def test_through_transforms_and_a_low_rank_branch(
    denoiser: nn.Module, stats: CalibrationStats, store: BlockStore, chain: Any
) -> None:
    how = {"smoothing": chain, "low_rank": 2 if chain is None else None, "activation": None}
    learned, _ = quantized(denoiser, stats, store, QUICK, **how)
    nearest, _ = quantized(denoiser, stats, store, Nearest(), **how)
    ours, before = (sum(block_error(denoiser, m, b, [950, 350]) for b in range(2)) for m in (learned, nearest))
    assert ours < 0.9 * before
    for name, layer in quant_linears(learned).items():
        theirs = quant_linears(nearest)[name].variants[0]
        assert torch.equal(layer.variants[0].weight_scale, theirs.weight_scale)
        change = layer.variants[0].dequantized_weight() - theirs.dequantized_weight()
        assert (change.abs() <= theirs.weight_scale * 1.001).all()  # down or up, no further


def reference(x: Tensor, time: Tensor, block: Block, parts: dict[str, dict[str, Tensor]]) -> Tensor:
    """The toy block with soft weights by plain autograd and activations straight through."""

    def linear(name: str, x: Tensor) -> Tensor:
        p, module = parts[name], getattr(block, name)
        h = (1.2 * p["a"].sigmoid() - 0.1).clamp(0, 1)
        weight = p["scale"] * (((module.weight / p["scale"]).floor() + p["zero"] + h).clamp(0, 15) - p["zero"])
        on_grid = fake_quantize_activation(x.detach(), A8, None)
        return F.linear(x + (on_grid - x).detach(), weight, module.bias)

    y = F.layer_norm(x, (32,)) * (1 + time[:, None])
    y = x + torch.softmax(linear("to_q", y) @ y.mT / 32**0.5, -1) @ linear("to_v", y)
    return y + linear("fc2", F.gelu(linear("fc1", F.layer_norm(y, (32,)))))


def test_gradients_are_those_of_the_formula(denoiser: nn.Module) -> None:
    """Of the squared error and of the pull, against plain autograd."""
    block = denoiser.blocks[0]
    layers = dict(quant_linears_of(denoiser))
    position = Position(rounding=SOFT)
    soft = copy.deepcopy(block)
    for name, layer in layers.items():
        setattr(soft, name, SoftLinear(layer, getattr(block, name).weight, [True], position, False))
    torch.manual_seed(1)
    for weight in soft_weights(soft):
        weight.soft.data.add_(torch.randn_like(weight.soft) * 3)  # some beyond the ends
    x, time = torch.randn(4, 6, 32), torch.randn(4, 32)
    target = torch.randn(4, 6, 32)
    parts = {}
    for name, layer in layers.items():
        variant = layer.variants[0]
        a = getattr(soft, name).variants[0].weight.soft.detach().clone().requires_grad_()
        parts[name] = {"a": a, "scale": variant.weight_scale, "zero": variant.weight_zero_point.float()}
    plain = reference(x, time, block, parts)
    ours = soft(x, None, torch.zeros(4, 3, 32), time=time)
    torch.testing.assert_close(ours, plain)
    h = [(1.2 * p["a"].sigmoid() - 0.1).clamp(0, 1) for p in parts.values()]
    pull = sum((1 - (2 * part - 1).abs() ** 7.5).sum() for part in h)
    ((plain - target).square().sum() + 0.3 * pull).backward()
    (ours - target).square().sum().backward()
    for weight in soft_weights(soft):
        weight.add_pull(0.3, 7.5)
    for name, part in parts.items():
        mine = getattr(soft, name).variants[0].weight.soft.grad
        torch.testing.assert_close(mine, part["a"].grad, rtol=1e-3, atol=1e-5)
        assert (mine != 0).any() and (mine == 0).any()


def quant_linears_of(denoiser: nn.Module) -> list[tuple[str, QuantLinear]]:
    other = copy.deepcopy(denoiser)
    quantize_denoiser(other, plan_of(denoiser, Nearest()), None)
    names = ("to_q", "to_v", "fc1", "fc2")
    return [(name, getattr(other.blocks[0], name)) for name in names]


def test_the_learned_step_follows_lsq() -> None:
    """Inside the range the step's gradient is round(x / s) - x / s, beyond it the code at the end."""
    linear = nn.Linear(4, 1, bias=False)
    nn.init.ones_(linear.weight)
    spec = QuantSpec(3, symmetric=True)
    variant = Variant.fit(LayerScheme(None, spec), linear.weight, Chain(), (torch.tensor([0.5]), torch.tensor([0.0])))
    layer = QuantLinear("fc", None, [variant], [0], 1, None, get_backend("fake"))
    soft = SoftLinear(layer, linear.weight, [False], Position(rounding=SOFT), True)
    x = torch.tensor([[0.6, -0.9, 9.0, -9.0]], requires_grad=True)
    soft(x).sum().backward()
    step = (1 - 1.2) + (-2 + 1.8) + 3 - 4  # d out / d s
    torch.testing.assert_close(soft.variants[0].stretch.grad, torch.tensor([step * 0.5]))  # s = 0.5 exp(stretch)
    assert x.grad.tolist() == [[1, 1, 0, 0]]


def test_learned_activation_scales(denoiser: nn.Module, stats: CalibrationStats, store: BlockStore) -> None:
    how = {"activation": QuantSpec(4), "weight": W4}
    fixed, _ = quantized(denoiser, stats, store, replace(QUICK, iterations=60), **how)
    scaled, _ = quantized(denoiser, stats, store, replace(QUICK, iterations=60, learn_activation_scale=True), **how)
    ours, before = (sum(block_error(denoiser, m, b, [950, 50]) for b in range(2)) for m in (scaled, fixed))
    assert ours < 0.95 * before
    for one, other in zip(quant_linears(scaled).values(), quant_linears(fixed).values(), strict=True):
        assert float(one.variants[0].input_scale) > 0
        assert not torch.equal(one.variants[0].input_scale, other.variants[0].input_scale)


def test_segments_with_weights_of_their_own_learn_from_their_own_inputs(
    denoiser: nn.Module, stats: CalibrationStats, store: BlockStore
) -> None:
    how = {"segments": (0, 0.5, 1), "smoothing": SmoothSpec((0.2, 0.7), per_segment=True)}
    learned, records = quantized(denoiser, stats, store, QUICK, **how)
    nearest, _ = quantized(denoiser, stats, store, Nearest(), **how)
    assert records[0]["steps"] == 2 * QUICK.iterations
    for level in (950, 50):
        ours, before = (sum(block_error(denoiser, m, b, [level]) for b in range(2)) for m in (learned, nearest))
        assert ours < 0.85 * before


def test_segments_that_share_a_weight_go_on_sharing_it(
    denoiser: nn.Module, stats: CalibrationStats, store: BlockStore
) -> None:
    """Static activations give each segment a variant, whose codes are stored once."""
    learned, records = quantized(denoiser, stats, store, FEW, activation=STATIC, segments=(0, 0.5, 1))
    assert records[0]["steps"] == FEW.iterations
    for layer in quant_linears(learned).values():
        low, high = layer.variants
        assert torch.equal(low.qweight, high.qweight)
        assert not torch.equal(low.input_scale, high.input_scale)


def test_the_same_again_to_the_bit(denoiser: nn.Module, stats: CalibrationStats, store: BlockStore) -> None:
    one, other = (quantized(denoiser, stats, store, FEW)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_nearest_is_kept_where_learning_does_not_help(
    denoiser: nn.Module, stats: CalibrationStats, store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viditq.quant.reconstruction.start.MARGIN", 0.5)  # what a start leads to is forgotten
    ruined, records = quantized(denoiser, stats, store, BlockAdaRound(5, 16, 1, 1e3))
    nearest, _ = quantized(denoiser, stats, None, Nearest())
    assert {record["kept"] for record in records} == {"nearest"}
    assert all(r["errors"]["nearest"] == min(r["errors"].values()) for r in records)
    for one, other in zip(quant_linears(ruined).values(), quant_linears(nearest).values(), strict=True):
        assert torch.equal(one.variants[0].qweight, other.variants[0].qweight)


def test_linears_outside_blocks_are_rounded_by_themselves(
    denoiser: nn.Module, stats: CalibrationStats, store: BlockStore
) -> None:
    plans = [Recipe(W4, rounding=rounding).resolve(linear_names(denoiser)) for rounding in (FEW, AdaRound())]
    assert plans[0].moment_layers == ["proj_in"] and list(plans[0].learned_blocks) == BLOCKS
    assert plans[1].moment_layers == linear_names(denoiser) and not plans[1].learned_blocks
    codes = []
    for plan in plans:
        out = copy.deepcopy(denoiser)
        quantize_denoiser(out, plan, stats, reconstruct=BlockReconstruction(store))
        codes.append(out.proj_in.variants[0].qweight)
    assert torch.equal(*codes)


def test_batches_draw_rows_where_rows_stand_alone(denoiser: nn.Module, store: BlockStore) -> None:
    items = store.items("blocks.0")
    few = Batches(store, "blocks.0", items, denoiser.blocks[0], 24, CPU)
    assert not few.whole and few.draw().numel == 4 * 6 * 32  # 24 tokens are 4 rows of 6

    class Mixing(nn.Module):
        def forward(self, hidden_states: Tensor, mask: None, caption: Tensor, time: Tensor) -> Tensor:
            return hidden_states + hidden_states.unflatten(0, (-1, 2)).mean(1, keepdim=True).expand(
                -1, 2, -1, -1
            ).flatten(0, 1)

    whole = Batches(store, "blocks.0", items, Mixing(), 24, CPU)
    assert whole.whole and whole.draw().numel == 2 * 2 * 6 * 32


def test_every_input_comes_once_before_any_comes_again(denoiser: nn.Module, store: BlockStore) -> None:
    items = store.items("blocks.0")[:6]
    batches = Batches(store, "blocks.0", items, denoiser.blocks[0], 1, CPU)
    first = [batches._next() for _ in range(12)]
    assert sorted(first[:6]) == sorted(first[6:]) == list(range(6)) and first[:6] != first[6:]


def test_captions_of_several_lengths(denoiser: nn.Module, tmp_path: Path, stats: CalibrationStats) -> None:
    class Ragged(nn.Module):
        """Captions lose their last entry in every other batch."""

        def __init__(self) -> None:
            super().__init__()
            self.proj_in, self.blocks, self.inner = denoiser.proj_in, denoiser.blocks, denoiser
            self.times = 0

        def forward(self, hidden_states: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
            self.times += 1
            return denoiser(hidden_states, timestep, caption[:, : 2 + self.times % 2])

    store = collect(Ragged(), tmp_path, [range(8)])
    sizes = {store.load("blocks.0", item).tensors[1].shape[1] for item in store.items("blocks.0")}
    assert sizes == {2, 3}
    _, records = quantized(denoiser, stats, store, QUICK)
    assert all(record["kept"] != "nearest" for record in records)


def test_without_inputs(denoiser: nn.Module, stats: CalibrationStats) -> None:
    with pytest.raises(UserError, match="give quantize_denoiser the kept inputs of blocks"):
        quantize_denoiser(denoiser, plan_of(denoiser, QUICK), stats)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockAdaRound(iterations=0), "iterations=0 is not possible"),
        (lambda: BlockAdaRound(tokens=0), "tokens=0 is not possible"),
        (lambda: BlockAdaRound(layer_iterations=0), "layer_iterations=0 is not possible"),
        (lambda: BlockAdaRound(strength=-1), "strength=-1 is not possible"),
        (lambda: BlockAdaRound(learn_activation_scale=1), "learn_activation_scale=1 must be true or false"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("high", [None, LayerScheme(None, A8)], ids=["float", "weights in float"])
def test_a_segment_in_float_has_nothing_to_learn(
    denoiser: nn.Module, stats: CalibrationStats, store: BlockStore, high: LayerScheme | None
) -> None:
    schemes = {
        "low": LayerScheme(W4, A8, rounding=QUICK),
        **({} if high is None else {"high": high}),
    }
    names = [n for n in linear_names(denoiser) if n.startswith("blocks")]
    plan = QuantPlan((0, 0.5, 1), schemes, {name: ("low", None if high is None else "high") for name in names})
    records: list[dict[str, Any]] = []
    quantize_denoiser(denoiser, plan, stats, reconstruct=BlockReconstruction(store, CPU, records.append))
    assert all(record["errors"]["block"] < record["errors"]["nearest"] for record in records)
    assert [record["steps"] for record in records] == [60, 60]


def test_learning_that_diverges_leaves_what_was_better(
    denoiser: nn.Module, stats: CalibrationStats, store: BlockStore
) -> None:
    wild = replace(QUICK, iterations=8, learn_activation_scale=True, learning_rate=1e4)
    _, records = quantized(denoiser, stats, store, wild, activation=STATIC)
    assert all("block" not in record["errors"] and record["kept"] == "layers" for record in records)


def test_a_budget_that_leaves_a_segment_without_inputs(
    denoiser: nn.Module, stats: CalibrationStats, tmp_path: Path
) -> None:
    few = collect(denoiser, tmp_path, [range(4)], 9_000)
    how = {"segments": (0, 0.2, 0.5, 0.8, 1), "smoothing": SmoothSpec((0.1, 0.3, 0.5, 0.7), per_segment=True)}
    with pytest.raises(
        UserError, match=r"block_input_bytes let \d of 32 inputs of block blocks\.0 .* Learning takes at"
    ):
        quantized(denoiser, stats, few, QUICK, **how)

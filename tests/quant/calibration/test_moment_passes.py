from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant import CalibrationStats, Calibrator
from viditq.quant.calibration.input_groups import InputGroups
from viditq.quant.calibration.moment_passes import MomentPass, end_of_range, most_bytes, ranges
from viditq.quant.calibration.moments import matrix_bytes

NAMES = ["to_q", "to_k", "to_v", "proj", "out", "wide"]
WIDTHS = {"to_q": 8, "to_k": 8, "to_v": 8, "proj": 8, "out": 16, "wide": 32}


class Block(nn.Module):
    """to_q, to_k, to_v read one tensor; from the second step on proj, which is called before them, does not."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in WIDTHS.items():
            setattr(self, name, nn.Linear(width, 16))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states * 1
        y = self.proj(x if timestep[0] > 800 else x * 2)
        y = y + self.to_q(x) + self.to_v(x) + self.to_k(x)
        return self.wide(torch.cat([self.out(y), y], -1))


def sampled(observer: Calibrator | MomentPass, model: nn.Module, seeds: Sequence[int]) -> None:
    with observer, torch.inference_mode():
        for seed in seeds:
            observer.set_sample_seeds([seed])
            x = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(seed))
            for t in (900, 500, 100):
                model(x * t, torch.full((1,), t))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Block()


def equal(one: CalibrationStats, other: CalibrationStats) -> bool:
    a, b = one.to_tensors(), other.to_tensors()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


SUMMED = [name for name in NAMES if name != "proj"]  # which reads with the others at first, and is not asked for


@pytest.mark.parametrize("budget", [1, 256, 900, 1300, 10**6])
def test_several_passes_are_equal_to_one_to_the_bit(model: nn.Module, tmp_path: Path, budget: int) -> None:
    whole = Calibrator(model, NAMES, moment_layers=SUMMED)
    sampled(whole, model, [1, 2, 3])
    widths = {name: WIDTHS[name] for name in SUMMED}
    first, *later = ranges(widths, whole.stats.moments.leader, budget)
    calibrator = Calibrator(model, NAMES, moment_layers=SUMMED, summed=first)
    sampled(calibrator, model, [1, 2, 3])
    calibrator.stats.save(tmp_path / "stats.safetensors")
    for number, leaders in enumerate(later):
        if number == 0:
            with pytest.raises(UserError, match=r"lack the second moments of .* run the stage calibrate again"):
                CalibrationStats.load(tmp_path / "stats.safetensors")
        one = MomentPass(model, leaders)
        sampled(one, model, [1])
        resumed = MomentPass(model, leaders)
        resumed.load_state(one.state())
        sampled(resumed, model, [2, 3])
        assert sum(t.nbytes for t in resumed.moments.sums.values()) == resumed.max_bytes
        CalibrationStats({}, resumed.moments).save(tmp_path / f"stats.moments-{number}.safetensors")
    loaded = CalibrationStats.load(tmp_path / "stats.safetensors")
    assert equal(whole.stats, CalibrationStats({n: loaded.layers[n] for n in NAMES}, loaded.moments))
    assert most_bytes([first, *later], widths) <= max(budget, matrix_bytes(32))


def test_ranges_fit_the_budget_or_are_one_layer() -> None:
    widths = {"q": 8, "k": 8, "v": 8, "out": 8, "up": 8, "down": 32}
    leaders = {"k": "q", "v": "q"}
    assert ranges(widths, leaders, 2 * 256) == [["q", "k"], ["out", "up"], ["down"]]
    assert ranges(widths, leaders, 1) == [["q"], ["out"], ["up"], ["down"]]
    assert ranges(widths, {}, 10**9) == [[*widths]]
    assert ranges({}, {}, 1) == [[]]
    assert end_of_range([4, 4, 4], 1, 128) == 3


def test_a_state_of_other_layers_is_refused(model: nn.Module) -> None:
    one = MomentPass(model, ["out"])
    sampled(one, model, [1])
    with pytest.raises(UserError, match="of other layers or sizes"):
        MomentPass(model, ["wide"]).load_state(one.state())


def test_moments_are_led_by_a_layer_that_asks_for_them(model: nn.Module) -> None:
    """Here the first to read the input stays in float."""
    calibrator = Calibrator(model, NAMES, moment_layers=["to_k", "to_v"])
    sampled(calibrator, model, [1])
    assert calibrator.stats.moments.leader == {"to_k": "to_v", "to_v": "to_v"}
    assert float(calibrator.stats.moments.of("to_k").trace()) > 0


def test_layers_share_their_statistics_until_they_read_something_else(model: nn.Module) -> None:
    alone = {name: Calibrator(model, [name]) for name in NAMES}
    together = Calibrator(model, NAMES)
    for calibrator in (together, *alone.values()):
        sampled(calibrator, model, [1, 2])
    stats = together.stats
    assert stats.layers["to_q"] is stats.layers["to_k"] is stats.layers["to_v"] is not stats.layers["proj"]
    for name, calibrator in alone.items():
        mine = CalibrationStats({name: stats.layers[name]})
        assert equal(mine, calibrator.stats)
    state = together.state()
    assert [key for key in state if key.endswith("/count")] == [f"{n}/count" for n in ("to_q", "proj", "out", "wide")]
    loaded = CalibrationStats.from_tensors(state)
    assert loaded.layers["to_k"] is loaded.layers["to_q"] and loaded.layers.keys() == stats.layers.keys()


def test_a_resumed_calibration_parts_what_it_has_to(model: nn.Module) -> None:
    whole, one, two = (Calibrator(model, NAMES) for _ in range(3))
    sampled(whole, model, [1, 2])
    sampled(one, model, [1])
    two.load_state(one.state())
    sampled(two, model, [2])
    assert equal(whole.stats, two.stats)


def test_merging_keeps_together_what_both_have_together(model: nn.Module) -> None:
    one, two = (Calibrator(model, NAMES) for _ in range(2))
    sampled(one, model, [1])
    sampled(two, model, [2])
    blank = Calibrator(model, NAMES).stats  # where q and proj have not parted yet
    blank.merge(one.stats)
    assert equal(blank, one.stats)
    merged = CalibrationStats.from_tensors(one.state())
    merged.merge(two.stats)
    layers = merged.layers
    assert layers["to_q"] is layers["to_v"] is not layers["proj"] is not layers["to_k"]


def test_a_failed_step_leaves_nothing(model: nn.Module) -> None:
    calibrator, clean = (Calibrator(model, NAMES) for _ in range(2))
    sampled(clean, model, [1])
    sampled(calibrator, model, [1])
    with pytest.raises(RuntimeError), calibrator, torch.no_grad():
        calibrator.set_sample_seeds([2])
        model(torch.randn(1, 40, 9), torch.full((1,), 500))
    assert equal(calibrator.stats, clean.stats)


def test_groups_are_parted_by_what_they_read() -> None:
    groups = InputGroups([["a", "b", "c", "d"], ["e"]])
    assert groups.refine({"b": [1], "c": [1], "e": [1]}) == {"b": "a"}
    assert groups.members == {"a": ["a", "d"], "b": ["b", "c"], "e": ["e"]}
    assert groups.refine({"b": [1, 2], "c": [1, 2]}) == {}
    assert groups.refine({"c": [3]}) == {"c": "b"}

import pytest
import torch
from torch import nn

from viditq.errors import UserError
from viditq.quant import (
    CalibrationStats,
    Calibrator,
    Gptq,
    QuantSpec,
    Recipe,
    SmoothSpec,
    linear_names,
    quantize_denoiser,
)
from viditq.quant.calibration import calibrator as calibrator_module
from viditq.quant.calibration.moments import Moments
from viditq.quant.calibration.row_sample import num_moment_rows, row_keys, stratified

STEPS = [980, 640, 300, 10]


def same(a, b) -> None:
    a, b = a.to_tensors(), b.to_tensors()
    assert a.keys() == b.keys()
    for key in a:
        size = float(a[key].abs().max()) if "/sum/" in key else 1.0  # products that cancel leave what was rounded off
        torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-6 * size)


def test_statistics_are_those_of_the_inputs(denoiser, calibrated):
    seen = []
    denoiser.blocks[1]["fc2"].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    stats = calibrated(denoiser, [1, 2, 3], STEPS)
    whole = torch.cat(seen)
    segment = stats.segment("blocks.1.fc2", 0, 1)
    assert torch.equal(segment.minimum, whole.amin((0, 1)))
    assert torch.equal(segment.maximum, whole.amax((0, 1)))
    torch.testing.assert_close(stats.segment("blocks.1.fc2", 0.9, 1).amax(), seen[0].abs().amax(1).mean(0))
    assert len(segment.rows) == sum(min(16, 3 * 5) for _ in STEPS)


def test_a_stream_without_tokens_shows_nothing(denoiser, calibrated):
    expected, first, second = calibrated(denoiser, [1, 2], STEPS), denoiser.blocks[1]["fc1"], denoiser.blocks[1]["fc2"]
    called = []
    first.register_forward_pre_hook(lambda *_: called.append(second(torch.empty(2, 0, second.in_features))))
    same(expected, calibrated(denoiser, [1, 2], STEPS))
    assert len(called) == len(STEPS)


def test_batching_and_order_do_not_matter(denoiser, calibrated):
    whole = calibrated(denoiser, [1, 2, 3, 4], STEPS)
    parts = calibrated(denoiser, [4, 2], STEPS)
    parts.merge(calibrated(denoiser, [1], STEPS[::-1]))
    parts.merge(calibrated(denoiser, [3], STEPS))
    same(whole, parts)


def test_it_leaves_no_trace(denoiser, calibrated):
    x, t = torch.randn(2, 5, 8), torch.tensor([500, 500])
    before, random = denoiser(x, t), torch.get_rng_state()
    calibrated(denoiser, [1], STEPS)
    assert torch.equal(denoiser(x, t), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())


def test_resumes_from_a_saved_state(denoiser, calibrated):
    names = linear_names(denoiser)
    state = {key: value.clone() for key, value in calibrated(denoiser, [1, 2], STEPS).to_tensors().items()}
    later = Calibrator(denoiser, names)
    later.load_state(state)
    later.stats.merge(calibrated(denoiser, [3], STEPS))
    same(later.stats, calibrated(denoiser, [1, 2, 3], STEPS))
    with pytest.raises(UserError, match="other layers or sizes"):
        Calibrator(denoiser, names[:2]).load_state(state)
    with pytest.raises(UserError, match="other layers or sizes"):
        Calibrator(denoiser, names, num_buckets=10).load_state(state)


def test_only_named_layers_are_observed(denoiser, calibrated):
    assert list(calibrated(denoiser, [1], STEPS, ["time"]).layers) == ["time"]
    with pytest.raises(UserError, match=r"has no Linear 'blocks.0.fc3'; close names: blocks"):
        Calibrator(denoiser, ["blocks.0.fc3"])


def test_seeds_must_fit_the_batch(denoiser):
    x, t = torch.randn(4, 5, 8), torch.zeros(4)
    with Calibrator(denoiser, ["time"]) as calibrator:
        with pytest.raises(UserError, match=r"batch of 4 does not fit 0 sample seeds; call set_sample_seeds"):
            denoiser(x, t)
        calibrator.set_sample_seeds([1, 2, 3])
        with pytest.raises(UserError, match="batch of 4 does not fit 3"):
            denoiser(x, t)
        calibrator.set_sample_seeds([1, 2])  # two guidance branches
        denoiser(x, t)
    assert calibrator.stats.segment("time", 0, 1).rows.shape == (4, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make_denoiser, calibrated, dtype):
    stats = calibrated(make_denoiser(dtype), [1, 2], STEPS)
    assert torch.isfinite(stats.segment("blocks.0.fc1", 0, 1).amax()).all()


def test_nan_names_the_layer(denoiser):
    with (
        pytest.raises(UserError, match=r"the input of blocks.0.fc2 contains NaN or inf"),
        Calibrator(denoiser, linear_names(denoiser)) as calibrator,
    ):
        calibrator.set_sample_seeds([1])
        denoiser(torch.randn(1, 5, 8), torch.full([1], 900.0))
        nn.init.constant_(denoiser.blocks[0]["fc1"].weight, float("nan"))
        denoiser(torch.randn(1, 5, 8), torch.full([1], 500.0))
        denoiser(torch.full((1, 5, 8), float("nan")), torch.zeros(1))  # what a sampler would make of it


def test_nan_is_told_while_sampling(denoiser, monkeypatch):
    monkeypatch.setattr(calibrator_module, "PENDING_BYTES", 0)  # what a large model shows in one step exceeds it
    with Calibrator(denoiser, linear_names(denoiser)) as calibrator:
        calibrator.set_sample_seeds([1])
        with pytest.raises(UserError, match=r"the input of proj_in contains NaN or inf"):
            denoiser(torch.full((1, 5, 8), float("nan")), torch.zeros(1))


def test_statistics_do_not_depend_on_how_many_inputs_are_added_at_once(denoiser, calibrated, monkeypatch):
    at_once = calibrated(denoiser, [1, 2, 3], STEPS)
    monkeypatch.setattr(calibrator_module, "PENDING_BYTES", 0)
    one_by_one = calibrated(denoiser, [1, 2, 3], STEPS)
    mine, theirs = at_once.to_tensors(), one_by_one.to_tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_row_keys_follow_the_prompt_not_the_batch():
    """Two guidance branches of three prompts, two frames each: leading axis = branch, prompt, frame."""
    together = row_keys(12, 5, [7, 8, 9], 6, 0.5).view(2, 3, 2, 5)
    for index, seed in enumerate([7, 8, 9]):
        alone = row_keys(4, 5, [seed], 2, 0.5).view(2, 1, 2, 5)
        assert torch.equal(together[:, index], alone[:, 0])
    assert len(together.unique()) == together.numel()
    assert (together >= 0).all()
    assert not torch.equal(together, row_keys(12, 5, [7, 8, 9], 6, 0.25).view(2, 3, 2, 5))
    uniform = row_keys(1, 100_000, [0], 1, 0.5).double() / 2**63
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.01


def test_every_prompt_and_branch_gives_a_row_before_any_gives_a_second():
    keys = torch.randint(2**62, (6, 50), generator=torch.Generator().manual_seed(0))
    rows, kept, *_ = stratified(keys, 8)
    cells = (rows // 50).tolist()
    assert sorted(cells[:6]) == list(range(6)) and len(rows) == len(set(rows.tolist())) == 8
    assert kept.tolist() == sorted(kept.tolist())
    order = keys.argsort(1)
    firsts, seconds = order[:, 0] + torch.arange(6) * 50, order[:, 1] + torch.arange(6) * 50
    assert set(rows[:6].tolist()) == set(firsts.tolist()) and set(rows[6:].tolist()) <= set(seconds.tolist())


def test_second_moments_are_those_of_the_inputs(denoiser, calibrated):
    """Few rows, so that all take part."""
    seen = []
    denoiser.blocks[1]["fc2"].register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    stats = calibrated(denoiser, [1, 2, 3], STEPS)
    x = torch.cat(seen)
    torch.testing.assert_close(stats.moments.of("blocks.1.fc2"), x.T @ x)


class Attention(nn.Module):
    """to_q, to_k read one tensor, to_v an equal but different one; captions are read by both blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(3))
        self.captions = nn.ModuleList(nn.Linear(4, 16) for _ in range(2))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        captions = torch.ones(len(hidden_states), 3, 4)
        x = hidden_states * 1
        y = self.to_q(x) + self.to_k(x) + self.to_v(x + 0)
        return y + sum(layer(captions).mean(1, keepdim=True) for layer in self.captions)


def test_layers_that_read_the_same_tensor_share_their_moments():
    model, names = Attention(), ["to_q", "to_k", "to_v", "captions.0", "captions.1"]
    with Calibrator(model, names, moment_layers=names) as calibrator, torch.inference_mode():
        calibrator.set_sample_seeds([1, 2])
        for t in (900, 100):
            model(torch.randn(2, 5, 16), torch.full((2,), t))
    moments = calibrator.stats.moments
    leaders = {"to_q": "to_q", "to_k": "to_q", "to_v": "to_v", "captions.0": "captions.0", "captions.1": "captions.0"}
    assert moments.leader == leaders and set(moments.sums) == set(leaders.values())
    torch.testing.assert_close(moments.of("to_k"), moments.of("to_v"))
    torch.testing.assert_close(moments.of("captions.1"), torch.full((4, 4), 2 * 2 * 3.0))
    assert torch.equal(moments.of("to_k"), moments.of("to_k").T)
    loaded = CalibrationStats.from_tensors(calibrator.state())
    loaded.merge(CalibrationStats.from_tensors(calibrator.state()))
    assert loaded.moments.leader == leaders
    torch.testing.assert_close(loaded.moments.of("to_k"), 2 * moments.of("to_q"))
    later = Calibrator(model, names, moment_layers=names)
    later.load_state(calibrator.state())
    assert torch.equal(later.stats.moments.of("to_v"), moments.of("to_v"))


@pytest.mark.parametrize("channels", [3, 128, 300])
def test_moments_of_any_width(channels):
    moments, rows = Moments(), torch.randn(2, 50, channels)
    with torch.inference_mode():
        moments.add("a", "a", rows[0], 2.0)
    moments.add("a", "a", rows[1])
    moments.add("b", "a", None)
    wanted = 2 * rows[0].T @ rows[0] + rows[1].T @ rows[1]
    torch.testing.assert_close(moments.of("b"), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(Moments.from_tensors(moments.to_tensors()).of("a"), moments.of("b"))


def test_a_sample_of_rows_stands_for_all_whatever_the_batch():
    model = Attention()
    x = torch.randn(4, 500, 16)
    together, apart = (Calibrator(model, ["to_q"], moment_layers=["to_q"]) for _ in range(2))
    for calibrator, batches in ((together, [[0, 1, 2, 3]]), (apart, [[2], [0, 3], [1]])):
        with calibrator, torch.no_grad():
            for batch in batches:
                calibrator.set_sample_seeds(batch)
                model(x[batch], torch.full((len(batch),), 300))
    moments = together.stats.moments.of("to_q")
    torch.testing.assert_close(moments, apart.stats.moments.of("to_q"), rtol=1e-4, atol=1e-2)
    rows = x.flatten(0, 1)
    assert torch.linalg.norm(moments - rows.T @ rows) < 0.5 * torch.linalg.norm(rows.T @ rows)
    assert float(moments.trace()) == pytest.approx(4 * 500 * 16, rel=0.1)


@pytest.mark.parametrize("rows, taken", [(1, 1), (5, 5), (16, 8), (128, 8), (256, 16), (4096, 64)])
def test_few_rows_of_many_go_into_the_moments(rows, taken):
    assert num_moment_rows(rows) == taken
    keys = torch.randint(2**62, (3, rows), generator=torch.Generator().manual_seed(0))
    chosen = stratified(keys, 2)
    assert chosen.moment_weight * taken == rows
    assert (chosen.moment_rows // rows).bincount().tolist() == [taken] * 3
    assert len(chosen.moment_rows.unique()) == 3 * taken


class Shared(nn.Module):
    """a and b read one tensor; c reads it after it was changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = hidden_states * 1
        y = self.a(x) + self.b(x)
        x.mul_(3)
        return y + self.c(x)


def test_an_input_changed_in_place_is_another_one():
    model, x = Shared(), torch.randn(2, 5, 4)
    with Calibrator(model, ["a", "b", "c"], moment_layers=["a", "b", "c"]) as calibrator, torch.inference_mode():
        calibrator.set_sample_seeds([1, 2])
        model(x, torch.full((2,), 300))
    stats, rows = calibrator.stats, x.flatten(0, 1)
    assert stats.moments.leader == {"a": "a", "b": "a", "c": "c"}
    for name, factor in (("a", 1), ("b", 1), ("c", 3)):
        assert torch.equal(stats.segment(name, 0, 1).maximum, factor * rows.amax(0))
        torch.testing.assert_close(stats.moments.of(name), factor**2 * rows.T @ rows)


def test_a_loaded_state_is_not_written_to(denoiser, calibrated):
    state = calibrated(denoiser, [1, 2], STEPS).to_tensors()
    before = {key: value.clone() for key, value in state.items()}
    names = linear_names(denoiser)
    with Calibrator(denoiser, names, moment_layers=names) as later, torch.no_grad():
        later.load_state(state)
        later.set_sample_seeds([9])
        denoiser(torch.randn(1, 5, 8), torch.zeros(1))
    assert all(torch.equal(before[key], value) for key, value in state.items())


def test_only_layers_that_ask_have_moments(denoiser):
    with Calibrator(denoiser, linear_names(denoiser), moment_layers=["time"]) as calibrator:
        calibrator.set_sample_seeds([1])
        denoiser(torch.randn(1, 5, 8), torch.zeros(1))
    assert list(calibrator.stats.moments.sums) == ["time"]
    with pytest.raises(UserError, match=r"lack the second moments of proj_in.*calibrate with moment_layers"):
        calibrator.stats.moments.of("proj_in")


def test_the_bytes_stated_up_front_hold(denoiser, calibrated):
    names = linear_names(denoiser)
    for asked in ([], names):  # here no two layers share an input
        calibrator = Calibrator(denoiser, names, moment_layers=asked)
        with calibrator, torch.no_grad():
            calibrator.set_sample_seeds([1, 2])
            stated = calibrator.max_bytes
            denoiser(torch.randn(2, 5, 8), torch.zeros(2))
        state = {key: value for key, value in calibrator.state().items() if "/leader/" not in key}
        assert sum(value.nbytes for value in state.values()) == stated == calibrator.max_bytes


def test_each_layer_keeps_rows_in_the_type_that_it_computes_in(make_denoiser, calibrated):
    """proj_in's inputs stay in bfloat16 though another Linear of its width computes in float32."""

    class Mixed(make_denoiser):
        def __init__(self):
            super().__init__(torch.bfloat16)
            self.wide = nn.Linear(8, 16)

        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states, timestep) + self.wide(hidden_states.float() / 3).mean()

    model, names = Mixed(), ["proj_in", "wide", "blocks.0.fc1"]
    stats = calibrated(model, [1, 2], STEPS, names)
    assert [stats.layers[name].rows.dtype for name in names] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert torch.equal(stats.segment("wide", 0, 1).rows, stats.segment("proj_in", 0, 1).rows / 3)
    calibrator = Calibrator(model, names)
    calibrator.load_state(stats.to_tensors())
    again = calibrator.stats.to_tensors()
    assert all(torch.equal(again[key], value) for key, value in stats.to_tensors().items() if "@" not in key)
    assert all(again[f"{name}/rows"].dtype == stats.layers[name].rows.dtype for name in names)


STATIC = Recipe(QuantSpec(8, granularity="channel"), QuantSpec(8), SmoothSpec())
ROUNDED = Recipe(QuantSpec(8, granularity="channel"), None, rounding=Gptq())


@pytest.mark.parametrize("recipe", [STATIC, ROUNDED], ids=["static and smoothed", "gptq"])
def test_a_float64_model_is_calibrated_and_quantized(make_denoiser, calibrated, recipe):
    """Statistics are those of float32, which holds their rounding."""
    outputs, stats = [], []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        denoiser = make_denoiser().to(dtype)
        stats.append(calibrated(denoiser, [0, 1], [100, 900]))
        quantize_denoiser(denoiser, recipe.resolve(linear_names(denoiser)), stats[-1])
        with torch.no_grad():
            outputs.append(denoiser(torch.linspace(-2, 2, 40, dtype=dtype).view(1, 5, 8), torch.tensor([100])))
    for name, tensor in stats[0].to_tensors().items():
        other = stats[1].to_tensors()[name]
        assert other.dtype == tensor.dtype
        torch.testing.assert_close(other, tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert outputs[1].dtype == torch.float64
    torch.testing.assert_close(outputs[1].float(), outputs[0], rtol=0.1, atol=0.1)

import pytest
import torch
from torch import nn

from viditq.errors import UserError
from viditq.quant import Calibrator, linear_names
from viditq.quant.calibration import row_keys

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
    nn.init.constant_(denoiser.blocks[0]["fc1"].weight, float("nan"))
    with Calibrator(denoiser, linear_names(denoiser)) as calibrator:
        calibrator.set_sample_seeds([1])
        with pytest.raises(UserError, match=r"the input of blocks.0.fc2 contains NaN or inf"):
            denoiser(torch.randn(1, 5, 8), torch.zeros(1))


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

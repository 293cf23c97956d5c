"""Incoherence of the four variants, by hand."""

import json

import pytest
import torch

from viditq.errors import UserError
from viditq.quant import CalibrationStats, RotateSpec, SmoothSpec, linear_names
from viditq.quant.diagnosis.incoherence import incoherence, incoherence_of
from viditq.quant.numerics.hadamard import matrix, random_signs

STEPS = [980, 640, 300, 10]


def test_the_numbers_are_the_formulas(denoiser, calibrated):
    stats = calibrated(denoiser, [1, 2], STEPS)
    weights = {name: denoiser.get_submodule(name).weight for name in linear_names(denoiser)}
    found = incoherence(stats, weights, SmoothSpec(0.5, aggregate="max"), RotateSpec(3))
    assert list(found) == list(weights)
    json.dumps(found, allow_nan=False)
    x, w = stats.segment("blocks.0.fc1", 0, 1).rows, weights["blocks.0.fc1"].detach()
    s = stats.segment("blocks.0.fc1", 0, 1).amax("max") ** 0.5 / w.abs().amax(0) ** 0.5
    h = (random_signs(16, 3)[:, None] * matrix(16)).float()
    want = {
        "activation": {"raw": x, "scaled": x / s, "rotated": x @ h, "both": (x / s) @ h},
        "weight": {"raw": w, "scaled": w * s, "rotated": w @ h, "both": (w * s) @ h},
    }
    for side, tensors in want.items():
        for name, tensor in tensors.items():
            assert found["blocks.0.fc1"][side][name] == pytest.approx(float(tensor.abs().max() / tensor.abs().mean()))


def test_a_loud_channel_is_tamed(denoiser, calibrated):
    """conftest's noise has one channel 20 times as loud; of 8 channels a rotation cannot hide it as well as scaling."""
    stats = calibrated(denoiser, [1, 2], STEPS)
    found = incoherence(stats, {"proj_in": denoiser.proj_in.weight})["proj_in"]["activation"]
    assert found["raw"] > 1.5 * max(found["scaled"], found["rotated"], found["both"])


def test_edges(denoiser):
    same = {"raw": lambda x: x}
    assert incoherence_of(same, torch.zeros(3, 3)) == {"raw": 0}
    assert incoherence_of(same, torch.ones(3, 3)) == {"raw": 1}
    assert incoherence_of({}, torch.ones(3, 3)) == {}
    x = torch.randn(4000, 300)  # more than one piece
    x[3777, 2] = -40
    assert incoherence_of(same, x)["raw"] == pytest.approx(float(40 / x.abs().mean()), rel=1e-6)
    with pytest.raises(UserError, match="the statistics lack the layer proj_in"):
        incoherence(CalibrationStats({}), {"proj_in": denoiser.proj_in.weight})

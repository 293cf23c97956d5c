"""A diagnosis that observes: both parts as they are alone, resumed and merged."""

import torch
from test_diagnosis import A8, STEPS, W4, quantized_copy, sample
from torch import nn

from viditq.quant import CalibrationStats, Calibrator, Diagnosis, Recipe, linear_names
from viditq.quant.diagnosis.observed import ObservedDiagnosis, merge_states, separated


def observed(denoiser: nn.Module, *batches: list[int]) -> ObservedDiagnosis:
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    diagnosis = Diagnosis(denoiser, quantized_copy(denoiser, plan), plan)
    both = ObservedDiagnosis(diagnosis, Calibrator(denoiser, list(plan.layers)))
    for seeds in batches:
        run(both, denoiser, seeds)
    return both


def run(both: ObservedDiagnosis, denoiser: nn.Module, seeds: list[int]) -> None:
    both.set_sample_seeds(seeds)
    with both:
        sample(denoiser, seeds)
    both.add_prompts(len(seeds))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


def test_both_parts_are_as_they_are_alone(denoiser):
    errors, inputs = separated(observed(denoiser, [1, 2]).state())
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    alone = Diagnosis(denoiser, quantized_copy(denoiser, plan), plan)
    with alone:
        sample(denoiser, [1, 2])
    alone.add_prompts(2)
    assert_equal(errors, alone.state())
    calibrator = Calibrator(denoiser, list(plan.layers))
    calibrator.set_sample_seeds([1, 2])
    with calibrator:
        sample(denoiser, [1, 2])
    assert_equal(inputs, calibrator.state())
    rows = CalibrationStats.from_tensors(inputs).segment("blocks.1.fc1", 0, 1).rows
    assert len(rows) == len(STEPS) * 2 * 5, "every row of two prompts of five tokens is kept"


def test_resumed_and_merged_is_as_in_one_go(denoiser):
    whole = observed(denoiser, [1, 2], [3]).state()
    first, second = observed(denoiser, [1, 2]).state(), observed(denoiser, [3]).state()
    assert_equal(merge_states(first, second), whole)
    assert_equal(merge_states(second, first), whole)
    resumed = observed(denoiser)
    resumed.load_state(first)
    run(resumed, denoiser, [3])
    assert_equal(resumed.state(), whole)

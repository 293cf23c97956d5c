"""Peaks put together from pieces of round sizes."""

from dataclasses import replace
from typing import Any

import pytest

from viditq.estimate.memory import (
    HOLES_AT_MOST,
    KERNELS,
    MOMENTS_PER_ENTRY,
    ROWS_PER_WEIGHT,
    UNCOUNTED,
    WHOLE_PER_WEIGHT,
    Peak,
    Pieces,
    held_while_quantizing,
    peaks,
)
from viditq.quant import QuantSpec, Recipe, RotateSpec, Rule
from viditq.quant.sizes import WeightBytes

WEIGHTS = WeightBytes(codes=100, scales=10, zero_points=5, transforms=5, rest=80, dense=1000)
PIECES = Pieces(1200, 300, text=5000, file=0, step=40, decode=70, stats=20, weights=WEIGHTS, quantizing=25)
NATIVE = replace(PIECES, weights=replace(WEIGHTS, dense=0))
SAMPLING = ("reference", "noise_floor", "calibrate", "generate", "diagnose")


def test_on_a_cpu_everything_is_in_one_memory() -> None:
    found = peaks(PIECES, gpu=False, offload=None, largest_layer_bytes=9)
    assert found["prompts"] == Peak(UNCOUNTED + 5000)
    assert found["reference"] == Peak(UNCOUNTED + 1200 + 300 + 70 + 70)  # as many holes as activations
    # while the artifact is read: codes, scales and dense weights, holes, what the file holds of codes and of the rest
    assert found["generate"].ram == UNCOUNTED + KERNELS + 1200 + 400 + 100 + 40
    assert peaks(NATIVE, False, None, 9)["generate"].ram == UNCOUNTED + KERNELS + 200 + 300 + 70 + 70
    assert found["calibrate"].ram == UNCOUNTED + 1500 + 20 + 40 + 4 * 40
    assert found["quantize"].ram == UNCOUNTED + 25


def test_tensors_outside_the_heap_leave_no_holes() -> None:
    found = peaks(replace(PIECES, step=2**30), False, None, 9)
    assert found["reference"].ram == UNCOUNTED + 1500 + 2**30 + HOLES_AT_MOST


def test_buffers_are_in_memory_too() -> None:
    more = replace(PIECES, weights=replace(WEIGHTS, buffers=7))
    (with_them, without) = (peaks(p, False, None, 9) for p in (more, PIECES))
    assert with_them["generate"].ram == without["generate"].ram + 7


def test_calibrating_holds_the_model_or_the_statistics_of_another_process_whichever_is_more() -> None:
    much = replace(PIECES, stats=2000)
    assert peaks(much, False, None, 9)["calibrate"].ram == UNCOUNTED + 1500 + 2000 + 40 + 4 * 40
    assert peaks(replace(much, processes=2), False, None, 9)["calibrate"].ram == UNCOUNTED + 2 * 2000 + 40 + 4 * 40


@pytest.mark.parametrize("gpu", [False, True])
def test_the_file_that_is_loaded_may_be_what_takes_most(gpu: bool) -> None:
    found = peaks(replace(PIECES, file=600), gpu, None, 9)
    assert found["reference"].ram == found["calibrate"].ram == UNCOUNTED + 1500 + 600
    assert found["generate"] == peaks(PIECES, gpu, None, 9)["generate"]  # which reads the artifact instead


def test_the_benchmark_loads_the_float_model_twice() -> None:
    found = peaks(replace(NATIVE, file=600), False, None, 9)["benchmark"]
    assert found.ram == UNCOUNTED + KERNELS + 1500 + 1500 + 600


def test_diagnosing_holds_what_it_observes_where_nothing_was_calibrated() -> None:
    observing = replace(NATIVE, stats=0, observed=20)
    for gpu, offload in ((False, None), (True, None), (True, "model"), (True, "sequential")):
        (without, found) = (peaks(p, gpu, offload, 9)["diagnose"] for p in (replace(NATIVE, stats=0), observing))
        assert found.ram == without.ram + 2 * 20
        several = peaks(replace(observing, processes=2), gpu, offload, 9)["diagnose"]
        assert several.ram == without.ram + 3 * 20
        assert (found.vram or 0) == (without.vram or 0) + (20 if gpu else 0)


def test_on_a_gpu_weights_are_in_both_memories_but_activations_in_one() -> None:
    found = peaks(PIECES, gpu=True, offload=None, largest_layer_bytes=9)
    assert found["reference"] == Peak(ram=UNCOUNTED + 1500, vram=1570)
    assert found["calibrate"].vram == 1500 + 20 + 40
    assert found["generate"].vram == 1200 + 300 + 70
    assert found["quantize"].vram == 0


@pytest.mark.parametrize("stage", SAMPLING)
def test_offloading_spares_the_gpu(stage: str) -> None:
    none, model, sequential = (peaks(PIECES, True, o, 9)[stage].vram for o in (None, "model", "sequential"))
    assert none is not None and model is not None and sequential is not None
    assert sequential < model < none


def test_quantizing_holds_a_layer_and_less_where_rows_are_apart() -> None:
    shapes = {"small": (10, 10), "large": (20, 100)}
    w4 = QuantSpec(4, granularity="channel")

    def most(**how: Any) -> int:
        return held_while_quantizing(Recipe(w4, None, **how).resolve([*shapes]), shapes)

    assert most() == 2000 * ROWS_PER_WEIGHT
    assert most(smoothing=RotateSpec()) == most(ranges="lp") == 2000 * WHOLE_PER_WEIGHT
    assert most(rounding="gptq") == 2000 * WHOLE_PER_WEIGHT + 100**2 * MOMENTS_PER_ENTRY
    assert most(rules=[Rule("large", keep_float=True)]) == 100 * ROWS_PER_WEIGHT

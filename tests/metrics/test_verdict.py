"""Verdicts on scores whose truth is known."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from viditq.metrics.headline import headline, is_told
from viditq.metrics.streaming import mean_and_error
from viditq.metrics.verdict import SAMPLES_PER_FEATURE, differences, few_samples, verdicts

N, K = 128, 32
KEYS = ["verdict", "kind", "value", "interval", "float", "against", "difference", "difference_interval", "noise"]


def label(higher: bool | None = True, name: str = "score", unit: str = "") -> dict[str, Any]:
    return {"label": name, "unit": unit, "higher_is_better": higher}


def randn(seed: int, count: int = N) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(own: Tensor, reference: Tensor | None = None, index: Tensor | None = None) -> dict[str, Tensor]:
    value, error = mean_and_error(own)
    result = {"value": value, "standard_error": error, "per_sample": own}
    result["index"] = torch.arange(len(own)) if index is None else index
    return result | (
        {} if reference is None else {"per_sample_reference": reference, "reference_value": reference.mean()}
    )


def distance(value: float, error: float, **others: float) -> dict[str, Tensor]:
    numbers = {"value": value, "standard_error": error, **others}
    return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}


def quality(
    shift: float, seed: int = 0, higher: bool | None = True, spread: float = 0.2, floor: float = 1.0, n: int = N
):
    """The verdict on paired scores that differ by `shift` and noise of `spread`; another seed moves them by `floor`."""
    reference = randn(seed, n) * 5
    results = {"m": scores(reference + shift + spread * randn(seed + 1, n), reference)}
    moved = {"m": scores(reference[:K] + floor * randn(seed + 2, n)[:K], reference[:K])}
    return verdicts(results, {}, {"seed": moved}, {"m": label(higher)}, num_bootstrap=500)["m"]


def fidelity(own: Tensor, floor: Tensor, higher: bool | None = True, **others: Tensor) -> dict[str, Any]:
    return verdicts({"m": scores(own)}, {}, {"bfloat16": {"m": scores(floor, **others)}}, {"m": label(higher)})["m"]


# Quality --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "higher", "verdict"),
    [
        (-1, True, "worse"),
        (1, True, "better"),
        (1, False, "worse"),
        (-1, False, "better"),
        (1, None, "worse"),
        (-1, None, "worse"),
        (0, True, "equal within noise"),
        (0, None, "equal within noise"),
    ],
)
def test_quality_in_either_direction(shift, higher, verdict):
    entry = quality(shift, higher=higher)
    assert entry["verdict"] == verdict and entry["kind"] == "quality" and entry["against"] == "float"
    assert entry["difference"] == pytest.approx(entry["value"] - entry["float"])
    low, high = entry["difference_interval"]
    assert low < entry["difference"] < high and is_told(entry)


def test_false_alarms_are_rare():
    without_margin = [quality(0, seed=3 * i, floor=0)["verdict"] for i in range(300)]
    assert without_margin.count("worse") <= 0.05 * 300
    assert [quality(0, seed=3 * i, floor=0.2)["verdict"] for i in range(100)].count("worse") <= 5
    few = [quality(0, seed=3 * i, floor=0, n=8)["verdict"] for i in range(300)]
    assert few.count("worse") <= 0.07 * 300


def test_a_real_shift_is_found():
    """Half the spread of the paired differences, and twice what the seed moves the mean."""
    assert [quality(-0.1, seed=3 * i, floor=0.2)["verdict"] for i in range(100)].count("worse") >= 95


def test_pairs_show_what_means_hide():
    entry = quality(-0.5)
    assert entry["interval"][0] < entry["float"] < entry["interval"][1]  # the mean alone: nothing to see
    assert entry["verdict"] == "worse"
    paired, unpaired = (b - a for a, b in (entry["difference_interval"], entry["interval"]))
    assert paired < unpaired / 5


def test_the_noise_floor_holds_back_a_certain_but_small_difference():
    assert quality(-0.1, floor=0.1)["verdict"] == "worse"
    entry = quality(-0.1, floor=1.0)
    assert entry["verdict"] == "equal within noise" and entry["difference_interval"][1] < 0
    assert "no more than the" in entry["reason"]
    assert quality(-0.1, floor=1.0)["noise"] == pytest.approx(1.96 / N**0.5, rel=0.4)


def test_order_of_prompts_is_irrelevant():
    reference, own = randn(0), randn(0) + randn(1) - 0.1
    permuted = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    first, second = (
        verdicts({"m": scores(own[order], reference[order])}, {}, {}, {"m": label()})["m"]
        for order in (torch.arange(N), permuted)
    )
    assert first == second or first["difference_interval"] == pytest.approx(second["difference_interval"], abs=1e-12)


# Fidelity -------------------------------------------------------------------------------------------------------------


def test_fidelity_against_bfloat16():
    near = 60 + randn(1)[:K]
    worse = fidelity(35 + 5 * randn(2), near)
    assert (worse["verdict"], worse["kind"], worse["against"]) == ("differs", "fidelity", "bfloat16")
    assert worse["difference"] == pytest.approx((35 + 5 * randn(2))[:K].mean() - near.mean())
    assert (
        worse["floors"] == {"seed": None, "bfloat16": pytest.approx(near.mean()), "latents": None}
        and worse["float"] is None
    )
    assert fidelity(60 + randn(2), near)["verdict"] == "equal within noise"
    assert fidelity(65 + randn(2), near)["verdict"] == "equal within noise"  # never better than float
    assert fidelity(65 + randn(2), near, higher=False)["verdict"] == "differs"
    assert fidelity(65 + randn(2), near, higher=None)["verdict"] == "differs"


def test_fidelity_pairs_prompts_by_index():
    own = randn(0) * 10
    entry = fidelity(own, (own - 0.1)[torch.arange(K) * 4], index=torch.arange(K) * 4)
    assert entry["difference_interval"] == pytest.approx([0.1, 0.1])


# Distributions --------------------------------------------------------------------------------------------------------


def against_float(value: float, **floors: dict[str, Tensor]) -> dict[str, Any]:
    results, subset = {"fvd": distance(3, 0.5)}, {"fvd": distance(value, 1)}
    return verdicts(results, subset, {k: {"fvd": v} for k, v in floors.items()}, {"fvd": label(False, "FVD")})["fvd"]


def test_the_interval_of_a_distance_ends_at_0_unless_it_is_unbiased():
    labels = {"fid": label(False), "kid": label(False)}
    results = {"fid": distance(1, 2), "kid": distance(1, 2, unbiased=1)}
    found = verdicts(results, {}, {}, labels)
    assert found["fid"]["interval"] == pytest.approx([0, 1 + 1.96 * 2], abs=0.01)
    assert found["kid"]["interval"] == pytest.approx([1 - 1.96 * 2, 1 + 1.96 * 2], abs=0.01)


def test_distance_to_float_against_another_seed():
    seed = distance(20, 2)
    within, beyond = against_float(24, seed=seed), against_float(25, seed=seed)
    assert (within["verdict"], beyond["verdict"]) == ("equal within noise", "worse")
    assert (within["kind"], within["against"], within["difference"]) == ("distribution", "seed", 4)
    assert within["noise"] == pytest.approx(1.96 * 5**0.5, rel=1e-3)
    assert within["interval"] == pytest.approx([3 - 0.98, 3 + 0.98], rel=1e-3)
    assert against_float(1, seed=seed)["verdict"] == "equal within noise"  # never better than float
    assert against_float(25, bfloat16=distance(0.1, 0.01))["against"] == "bfloat16"
    assert not is_told(against_float(25))
    assert not is_told(against_float(25, seed=distance(20, torch.nan)))


def to_data(value: float, floor_error: float) -> dict[str, Any]:
    results = {"fvd": distance(value, 1, reference_value=30, difference_error=0.5, num_samples=N)}
    floors = {"seed": {"fvd": distance(41, 2, reference_value=40, difference_error=floor_error, num_samples=K)}}
    return verdicts(results, {}, floors, {"fvd": label(False, "FVD")})["fvd"]


def test_distance_to_data_against_the_float_model():
    assert to_data(32, 0.5)["verdict"] == "worse" and to_data(28, 0.5)["verdict"] == "better"
    assert to_data(30.5, 0.5)["verdict"] == "equal within noise"
    assert to_data(32, 2.5)["verdict"] == "equal within noise"
    assert to_data(32, 2.5)["noise"] == pytest.approx(1.96 * 2.5 / 2, rel=1e-3)  # 128 prompts move half as far as 32


def jackknifed(a_ND: Tensor, b_ND: Tensor, groups: int = 8) -> dict[str, Tensor]:
    """Frechet distance of uncorrelated features and its standard error, written down once more."""

    def statistic(rows: Tensor) -> Tensor:
        a, b = a_ND[rows], b_ND[rows]
        return (a.mean(0) - b.mean(0)).square().sum() + (a.std(0) - b.std(0)).square().sum()

    rows = torch.arange(len(a_ND))
    parts = torch.stack([statistic(rows[rows % groups != g]) for g in range(groups)])
    error = ((groups - 1) * parts.var(correction=0)).sqrt()
    return {"value": statistic(rows), "standard_error": error}


@pytest.mark.parametrize(("shift", "alarms"), [(0.0, range(0, 6)), (1.0, range(90, 101))])
def test_false_alarms_and_power_of_distances(shift, alarms):
    """100 models whose features come from the float model's distribution, or lie one deviation from it."""
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(100):
        quantized, reference, other = torch.randn(3, K, 8, generator=generator, dtype=torch.float64)
        subset = {"fvd": jackknifed(quantized + shift, reference)}
        floors = {"seed": {"fvd": jackknifed(other, reference)}}
        found += verdicts(subset, subset, floors, {"fvd": label(False)})["fvd"]["verdict"] == "worse"
    assert found in alarms


def test_the_stated_number_of_samples():
    """Of 64 features 320 samples are enough; there, equal distributions are a tenth of their variance apart."""
    few = distance(3, 1, num_features=64)
    assert "128 samples of 64 features" in few_samples(few, 128)
    assert few_samples(few, 64 * SAMPLES_PER_FEATURE) is None
    unknown = few_samples(distance(3, 1), 10_000)  # as many as Inception has
    assert unknown.startswith("10000 samples, fewer than 10240:")
    entry = verdicts({"fvd": few, "m": scores(randn(0))}, {}, {}, {"fvd": label(False), "m": label()})["fvd"]
    assert "fewer than 320" in entry["warning"] and "ewer than 320" in entry["reason"]


# What is handed on ----------------------------------------------------------------------------------------------------


def everything(n: int, k: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """All kinds of metrics and their labels."""

    def results(count: int, seed: int) -> dict[str, Any]:
        own, reference = randn(seed, count), randn(9, count)
        return {
            "psnr": scores(own),
            "clip": scores(own, reference),
            "fvd": distance(3, torch.nan if count < 3 else 1),
            "fvd_data": distance(3, 1, reference_value=4, difference_error=torch.nan if count < 3 else 1),
        }

    labels = {name: label(name != "fvd", name.upper()) for name in results(2, 0)}
    floors = {"seed": results(k, 1), "bfloat16": results(k, 2)}
    return verdicts(results(n, 0), results(k, 0), floors, labels), labels


@pytest.mark.parametrize("count", [1, 2, 4])
def test_too_few_prompts_are_told_as_such(count):
    entries, labels = everything(count, count)
    for entry in entries.values():
        assert entry["verdict"] == "equal within noise" and entry["difference_interval"] is None
        assert "nothing can be told" in entry["warning"] and "Nothing can be told" in entry["reason"]
    assert f"{count} prompt" in entries["clip"]["reason"]
    assert headline(entries, labels) == (
        "quality: nothing can be told in 3 of 3 metrics: CLIP, FVD, FVD_DATA; samples: nothing can be told in 1 of 1 "
        "metric: PSNR"
    )


@pytest.mark.parametrize("count", [1, 5, 64])
def test_entries_are_json_of_one_form(count):
    entries, _ = everything(count, min(count, K))
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries
    for entry in entries.values():
        assert list(entry) == [*KEYS, "floors", "latents_worst", "on_floor_prompts", "warning", "reason"]


def test_a_distance_beside_floors_is_of_as_many_prompts():
    few, _ = everything(64, 8)
    assert few["fvd_data"]["on_floor_prompts"] == {"num_prompts": 8, "value": 3, "float": 4}
    assert few["psnr"]["on_floor_prompts"] is None  # a mean, which only grows more certain with more prompts
    assert everything(8, 8)[0]["fvd"]["on_floor_prompts"] is None


def test_latents_floor_tells_its_worst_pair():
    own, near = randn(0), 90 + randn(1)[:K]
    floors = {"latents": {"m": scores(near)}}
    entry = verdicts({"m": scores(own)}, {}, floors, {"m": label(name="PSNR")})["m"]
    assert entry["latents_worst"] == pytest.approx(float(near.min())) and entry["floors"]["latents"] > 85
    assert "in the worst pair" in entry["reason"]
    lower = verdicts({"m": scores(own)}, {}, floors, {"m": label(False, "L2")})["m"]
    assert lower["latents_worst"] == pytest.approx(float(near.max()))


def test_an_undefined_score_is_no_verdict():
    own = randn(0)
    own[3] = torch.nan
    entry = verdicts({"m": scores(own, randn(1))}, {}, {}, {"m": label(name="CLIPSIM")})["m"]
    json.dumps(entry, allow_nan=False)
    assert entry["value"] is None and not is_told(entry)
    assert entry["reason"] == "CLIPSIM is undefined. Nothing can be told: a score is undefined."


def test_reasons_read_like_sentences():
    own, floor = scores(35 + randn(0)), scores(60 + randn(1)[:K])
    entry = verdicts({"psnr": own}, {}, {"bfloat16": {"psnr": floor}}, {"psnr": label(name="PSNR", unit="dB")})["psnr"]
    low, high = (f"{x:.3g}" for x in entry["difference_interval"])
    assert entry["reason"] == (
        f"PSNR is {entry['value']:.4g} dB; on 32 prompts it is {-entry['difference']:.3g} dB below the "
        f"{floor['value']:.4g} dB that bfloat16 alone leaves (95 % interval of the difference: {low} to {high})."
    )
    assert "no difference can be seen" in quality(0)["reason"]
    assert "more than the" in quality(-1)["reason"]
    missing = verdicts({"psnr": own}, {}, {}, {"psnr": label(name="PSNR", unit="dB")})["psnr"]["reason"]
    assert missing.endswith("dB. Nothing can be told: the float model in bfloat16 was not measured.")


def test_headline_counts_every_metric():
    entry = {"difference_interval": [0, 1]}
    words = {
        "psnr": "differs",
        "ssim": "equal within noise",
        "clip": "worse",
        "fvd": "better",
        "temp": "equal within noise",
    }
    near = ("psnr", "ssim")
    entries = {
        name: {**entry, "verdict": word, "kind": "fidelity" if name in near else "quality"}
        for name, word in words.items()
    }
    labels = {name: label(name=name.upper()) for name in words}
    quality = "worse than float in 1 of 3 metrics: CLIP; better than float in 1: FVD; equal within noise in 1"
    samples = "samples: differ from float's in 1 of 2 metrics: PSNR; equal within noise in 1"
    assert headline(entries, labels) == f"quality: {quality}; {samples}"
    assert headline({n: entries[n] for n in near}, labels) == f"quality: not measured; {samples}"
    entries["psnr"]["verdict"] = "worse"  # of a run that was evaluated before this word was
    assert headline({n: entries[n] for n in near}, labels) == f"quality: not measured; {samples}"
    entries["psnr"]["verdict"] = "differs"
    assert headline({"temp": entries["temp"]}, labels) == "quality: equal within noise in 1 of 1 metric"
    assert headline({}, {}) == "no metric was computed"


def test_differences_of_every_prompt():
    own, reference = randn(0), randn(1)
    results = {"psnr": scores(own), "clip": scores(own, reference), "fvd": distance(1, 1)}
    assert differences(results) == {"clip": pytest.approx((own - reference).tolist())}

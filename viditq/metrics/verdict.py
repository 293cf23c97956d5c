"""Of each metric: is the quantized model equal to float within noise, worse or better, and why (docs/verdict.md)."""

from collections.abc import Mapping
from typing import Any

from viditq.metrics.bootstrap import Interval, bootstrap_interval, normal_interval
from viditq.metrics.comparison import (
    Comparison,
    Result,
    compare_distributions,
    compare_fidelity,
    compare_quality,
    compare_to_data,
    count,
    decide,
    finite,
    kind_of,
)
from viditq.metrics.headline import DIFFERS, WORSE
from viditq.metrics.reason import reason

Results = Mapping[str, Result]
FLOORS = ("seed", "bfloat16", "latents")
SAMPLES_PER_FEATURE = 5  # below, sampling alone adds more than a tenth of the features' variance to a Frechet distance
INCEPTION_FEATURES = 2048  # assumed where a metric does not say how many features it has


def verdicts(
    results: Results,
    subset: Results,
    floors: Mapping[str, Results],
    labels: Mapping[str, Mapping[str, Any]],
    num_bootstrap: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Metric name -> the `verdict` entry of metrics.json (plain numbers, None where undefined).

    results: what each metric computed over all n prompts; subset: the same over the first k; floors: "seed" (the
    float model with another seed), "bfloat16" (the float model in bfloat16) and "latents" (with noise on its latents),
    all against the float reference over the first k prompts. A floor may be absent. `difference_interval` None means
    that nothing was compared: the verdict then says equal, and `warning` and `reason` that nothing can be told.
    `on_floor_prompts` has a distance over the first k prompts, to be shown beside the floors'.
    """
    entries = {}
    for name, result in results.items():
        comparison = _compare(name, results, subset, floors, num_bootstrap, seed)
        kind, n = kind_of(result), count(results, name)
        word = decide(comparison, labels[name]["higher_is_better"])
        entry = {
            "verdict": DIFFERS if kind == "fidelity" and word == WORSE else word,
            "kind": kind,
            "value": finite(result["value"]),
            "interval": _as_list(_not_below_zero(result, _interval(result, num_bootstrap, seed))),
            "float": finite(result.get("reference_value")),
            "against": comparison.against,
            "difference": comparison.difference,
            "difference_interval": _as_list(comparison.interval),
            "noise": comparison.noise,
            "floors": {floor: finite(floors.get(floor, {}).get(name, {}).get("value")) for floor in FLOORS},
            "latents_worst": _worst(floors.get("latents", {}).get(name), labels[name]["higher_is_better"]),
            "on_floor_prompts": _on_floor_prompts(name, n, subset, floors) if kind == "distribution" else None,
            "warning": _warning(comparison, few_samples(result, n) if kind == "distribution" else None),
        }
        entries[name] = {**entry, "reason": reason(labels[name], entry, comparison)}
    return entries


def differences(results: Results) -> dict[str, list[float | None]]:
    """Metric name -> quantized - float of every prompt, of the metrics that score the float model's clips too."""
    pairs = {n: (r["per_sample"], r["per_sample_reference"]) for n, r in results.items() if kind_of(r) == "quality"}
    return {name: [finite(d) for d in own.double() - float_] for name, (own, float_) in pairs.items()}


def few_samples(result: Result, num_samples: int | None) -> str | None:
    """The warning of a Frechet distance of fewer than SAMPLES_PER_FEATURE samples per feature, else None.

    A metric says how many features it has in `num_features`, or that it is `unbiased` and needs no such number.
    """
    if "unbiased" in result:
        return None
    features = int(result.get("num_features", INCEPTION_FEATURES))
    enough = SAMPLES_PER_FEATURE * features
    if num_samples is None or num_samples >= enough:
        return None
    of = f" of {features} features" if "num_features" in result else ""
    return (
        f"{num_samples} samples{of}, fewer than {enough}: partly sampling error, compare it at equal numbers of "
        "samples only"
    )


def _worst(result: Result | None, higher_is_better: bool | None) -> float | None:
    """The score of the pair that is furthest from float's."""
    if result is None:
        return None
    scores = result["per_sample"]
    return finite(scores.min() if higher_is_better else scores.max())


def _on_floor_prompts(
    name: str, num_prompts: int | None, subset: Results, floors: Mapping[str, Results]
) -> dict[str, Any] | None:
    """A distance over as many prompts as the floors have, to be shown beside theirs; None where it is of as many."""
    k = count(subset, name) if name in subset else None
    if k is None or k == num_prompts or not any(name in results for results in floors.values()):
        return None
    result = subset[name]
    return {"num_prompts": k, "value": finite(result["value"]), "float": finite(result.get("reference_value"))}


def _compare(
    name: str, results: Results, subset: Results, floors: Mapping[str, Results], num_bootstrap: int, seed: int
) -> Comparison:
    result = results[name]
    kind = kind_of(result)
    if kind == "quality":
        return compare_quality(result, floors.get("seed", {}).get(name), num_bootstrap, seed)
    if kind == "fidelity":
        return compare_fidelity(result, floors.get("bfloat16", {}).get(name), num_bootstrap, seed)
    if "reference_value" in result:
        return compare_to_data(name, results, floors)
    return compare_distributions(name, subset, floors)


def _interval(result: Result, num_bootstrap: int, seed: int) -> Interval | None:
    if "per_sample" in result:
        return bootstrap_interval(result["per_sample"], num_bootstrap, seed)
    return normal_interval(float(result["value"]), float(result["standard_error"]))


def _not_below_zero(result: Result, interval: Interval | None) -> Interval | None:
    """A Frechet distance's interval ends at 0; an unbiased estimate of a distance may lie below."""
    if interval is None or kind_of(result) != "distribution" or "unbiased" in result:
        return interval
    return max(interval[0], 0.0), interval[1]


def _as_list(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _warning(comparison: Comparison, few: str | None) -> str | None:
    nothing = f"nothing can be told: {comparison.missing}" if comparison.interval is None else None
    return "; ".join(filter(None, [nothing, few])) or None

"""What a metric of the quantized model is compared with, by how much the two differ, and what that means.

Formulas: docs/verdict.md. Legend: n all prompts, k the first prompts, those of the noise floors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from viditq.metrics.bootstrap import MIN_PROMPTS, Interval, Z, bootstrap_interval, normal_interval, t_quantile
from viditq.metrics.headline import BETTER, EQUAL, WORSE

Result = Mapping[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """`difference` = quantized - `baseline`; None where unknown, and then `missing` says why.

    against: whose number the baseline is: "float" (the float model's own), or a floor's, "bfloat16" or "seed".
    noise: how far another seed alone moves the difference. num_prompts: how many both numbers are of.
    """

    against: str | None = None
    baseline: float | None = None
    difference: float | None = None
    interval: Interval | None = None
    noise: float | None = None
    num_prompts: int | None = None
    missing: str = ""


def finite(value: Tensor | float | None) -> float | None:
    """A float, or None where there is none or it is not finite (JSON has no NaN)."""
    return None if value is None or not math.isfinite(float(value)) else float(value)


def kind_of(result: Result) -> str:
    """quality: scores the float model's clips too; fidelity: distance to them; distribution: one number for all."""
    if "per_sample" not in result:
        return "distribution"
    return "quality" if "per_sample_reference" in result else "fidelity"


def count(results: Mapping[str, Result], name: str) -> int | None:
    """How many prompts a result is of: its own word, else that of any per-prompt metric beside it."""
    if "num_samples" in results[name]:
        return int(results[name]["num_samples"])
    return max((len(result["index"]) for result in results.values() if "index" in result), default=None)


def decide(comparison: Comparison, higher_is_better: bool | None) -> str:
    """worse or better only if the whole interval lies on that side of 0 and the difference exceeds the noise.

    Nothing counts as better than float itself: better is possible against the float model's own value only. Where
    neither direction is better, any difference is worse.
    """
    difference, interval = comparison.difference, comparison.interval
    if difference is None or interval is None or interval[0] <= 0 <= interval[1]:
        return EQUAL
    if comparison.noise is not None and abs(difference) <= comparison.noise:
        return EQUAL
    if higher_is_better is None or (difference > 0) != higher_is_better:
        return WORSE
    return BETTER if comparison.against == "float" else EQUAL


def compare_quality(result: Result, seed_floor: Result | None, num_resamples: int, seed: int) -> Comparison:
    """Paired differences to the float model's own scores, over all n prompts."""
    differences = (result["per_sample"] - result["per_sample_reference"]).double()
    noise = None
    if seed_floor is not None and len(seed_floor["per_sample"]) > 1:
        moved = (seed_floor["per_sample"] - seed_floor["per_sample_reference"]).double()
        noise = finite(t_quantile(len(moved) - 1) * moved.std() / len(differences) ** 0.5)
    return Comparison(
        "float",
        finite(result["per_sample_reference"].double().mean()),
        finite(differences.mean()),
        bootstrap_interval(differences, num_resamples, seed),
        noise,
        len(differences),
        _why_no_interval(differences),
    )


def compare_fidelity(result: Result, bfloat16_floor: Result | None, num_resamples: int, seed: int) -> Comparison:
    """Paired differences to what bfloat16 does to the float model, over the k prompts both have."""
    if bfloat16_floor is None:
        return Comparison(missing="the float model in bfloat16 was not measured")
    own, floor = _shared(result, bfloat16_floor)
    if not len(own):
        return Comparison(missing="the bfloat16 floor has none of these prompts")
    differences = own - floor
    return Comparison(
        "bfloat16",
        finite(floor.mean()),
        finite(differences.mean()),
        bootstrap_interval(differences, num_resamples, seed),
        None,
        len(differences),
        _why_no_interval(differences),
    )


def compare_distributions(
    name: str, subset: Mapping[str, Result], floors: Mapping[str, Mapping[str, Result]]
) -> Comparison:
    """Distance to the float model's clips against the distance of another seed (else of bfloat16), at equal k."""
    against = next((floor for floor in ("seed", "bfloat16") if name in floors.get(floor, {})), None)
    if against is None or name not in subset:
        return Comparison(missing="the float model with another seed was not measured")
    own, floor, k = subset[name], floors[against][name], count(subset, name)
    difference = float(own["value"] - floor["value"])
    error = math.hypot(float(own["standard_error"]), float(floor["standard_error"]))
    interval, missing = _interval_of_distance(difference, error, k)
    return Comparison(against, finite(floor["value"]), finite(difference), interval, finite(Z * error), k, missing)


def compare_to_data(name: str, results: Mapping[str, Result], floors: Mapping[str, Mapping[str, Result]]) -> Comparison:
    """Distance to real clips against the float model's own distance to them."""
    result, seed_floor = results[name], floors.get("seed", {})
    noise, n = None, count(results, name)
    difference = float(result["value"] - result["reference_value"])
    error = float(result.get("difference_error", math.nan))
    interval, missing = _interval_of_distance(difference, error, n)
    if "difference_error" in seed_floor.get(name, {}):
        k = count(seed_floor, name)
        shrink = math.sqrt(k / n) if k and n else 1.0
        noise = finite(Z * float(seed_floor[name]["difference_error"]) * shrink)
    return Comparison("float", finite(result["reference_value"]), finite(difference), interval, noise, n, missing)


def _shared(first: Result, second: Result) -> tuple[Tensor, Tensor]:
    """The scores of the prompts that both have, [k] each, float64."""
    rows, columns = (first["index"][:, None] == second["index"]).nonzero(as_tuple=True)
    return first["per_sample"][rows].double(), second["per_sample"][columns].double()


def _interval_of_distance(difference: float, error: float, num_prompts: int | None) -> tuple[Interval | None, str]:
    """The interval, and why there is none."""
    if num_prompts is not None and num_prompts < MIN_PROMPTS:
        return None, _too_few(num_prompts)
    interval = normal_interval(difference, error)
    return interval, "" if interval else "the distance or its standard error is undefined"


def _why_no_interval(values: Tensor) -> str:
    if not values.isfinite().all():
        return "a score is undefined"
    return _too_few(len(values)) if len(values) < MIN_PROMPTS else ""


def _too_few(count: int) -> str:
    return f"{count} prompt{'s' * (count > 1)}, at least {MIN_PROMPTS} are needed"

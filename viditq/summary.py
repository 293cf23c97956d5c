"""What the metrics computed, as plain numbers for metrics.json and per_prompt.json."""

from typing import Any

from torch import Tensor

from viditq.metrics.comparison import finite
from viditq.metrics.verdict import differences


def summarize(results: dict[str, dict[str, Tensor]], labels: dict[str, Any]) -> dict[str, Any]:
    """Metric name -> value, standard error, the float model's own value where it has one, and per-prompt values.

    `per_prompt` and `differences` (quantized - float) belong into per_prompt.json, the rest into metrics.json.
    """
    per_prompt = {}
    for name, result in results.items():
        if "per_sample" in result:
            per_prompt[name] = [float(v) for v in result["per_sample"]]
        if "per_sample_reference" in result:
            per_prompt[f"{name}_float"] = [float(v) for v in result["per_sample_reference"]]
    return {
        "metrics": {name: finite(r["value"]) for name, r in results.items()},
        "standard_errors": {name: finite(r["standard_error"]) for name, r in results.items()},
        "float_metrics": {name: finite(r["reference_value"]) for name, r in results.items() if "reference_value" in r},
        "labels": labels,
        "per_prompt": per_prompt,
        "differences": differences(results),
    }

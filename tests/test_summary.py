"""Plain numbers for metrics.json and per_prompt.json."""

import json

import pytest
import torch

from viditq.summary import summarize

LABELS = {
    name: {"label": name.upper(), "unit": "", "higher_is_better": name != "fvd"} for name in ("clip", "psnr", "fvd")
}


def results():
    own, reference = torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([2.0, 2.0, 2.5]).double()
    index, error = torch.arange(3), torch.tensor(0.5).double()
    pairs = {"value": own.mean(), "standard_error": error, "index": index, "per_sample": own}
    return {
        "clip": {**pairs, "reference_value": reference.mean(), "per_sample_reference": reference},
        "psnr": pairs,
        "fvd": {"value": torch.tensor(torch.nan), "standard_error": torch.tensor(torch.nan)},
    }


def test_summary_is_json():
    summary = json.loads(json.dumps(summarize(results(), LABELS), allow_nan=False))
    assert summary == {
        "metrics": {"clip": 2.0, "psnr": 2.0, "fvd": None},
        "standard_errors": {"clip": 0.5, "psnr": 0.5, "fvd": None},
        "float_metrics": {"clip": pytest.approx(6.5 / 3)},
        "labels": LABELS,
        "per_prompt": {"clip": [3, 1, 2], "clip_float": [2, 2, 2.5], "psnr": [3, 1, 2]},
        "differences": {"clip": [1, -1, -0.5]},
    }

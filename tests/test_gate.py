"""Conditions on a finished run's numbers."""

from typing import Any

import pytest

from viditq.errors import UserError
from viditq.gate import Gate

NAMES = ["psnr", "clipsim", "flicker", "motion", "fvd", "fvd_data"]


def entry(verdict: str, interval: list[float] | None, told: bool = True) -> dict[str, Any]:
    told_by = {"difference_interval": [0, 1], "warning": None}
    untold = {"difference_interval": None, "warning": "nothing can be told: 1 prompt, at least 5 are needed"}
    return {"verdict": verdict, "interval": interval, **(told_by if told else untold)}


METRICS = {
    "metrics": {"psnr": 35.5, "clipsim": 90.0, "flicker": 0.22, "motion": 1.8, "fvd": None, "fvd_data": 30.0},
    "float_metrics": {"clipsim": 91.0, "flicker": 0.2, "motion": 2.0, "fvd_data": 0.0},
    "labels": {
        name: {"label": name, "unit": "", "higher_is_better": higher}
        for name, higher in zip(NAMES, [True, True, False, None, False, False], strict=True)
    },
    "verdict": {
        "psnr": entry("worse", [34.4, 36.6]),
        "clipsim": entry("equal within noise", [89.0, 91.0]),
        "flicker": entry("better", [0.2, 0.24]),
        "motion": entry("equal within noise", None, told=False),
    },
    "size_bytes": 5_321_585,
    "average_weight_bits": 4.98,
    "average_activation_bits": 8.0,
}


def failures(**conditions: Any) -> list[str]:
    return Gate.parse(conditions, NAMES).check(METRICS)


@pytest.mark.parametrize(
    ("key", "holds", "fails"),
    [
        ("psnr", ">= 35.5", "> 35.5"),
        ("psnr", "< 35.6", "<= 35.4"),
        ("psnr", " ==35.5 ", "== 35"),
        ("psnr_low", ">= 34.4", ">= 34.5"),
        ("psnr_high", "<= 36.6", "<= 36.5"),
        ("clipsim_drop", "<= 0.011", "<= 0.0109"),  # 1 of 91 lower, where higher is better
        ("flicker_drop", "<= 0.101", "<= 0.099"),  # 0.02 of 0.2 higher, where lower is better
        ("motion_drop", "<= 0.101", "<= 0.099"),  # 0.2 of 2 away, where nearer is better
        ("clipsim_verdict", "equal", None),
        ("clipsim_verdict", "not worse", None),
        ("flicker_verdict", "not worse", "equal"),
        ("size_bytes", "<= 5.4e6", "<= 5_000_000"),
        ("average_weight_bits", "<= 5", "<= 4.9"),
        ("average_activation_bits", "== 8", "< 8"),
    ],
)
def test_conditions(key, holds, fails):
    assert failures(**{key: holds}) == []
    if fails is not None:
        assert len(failures(**{key: fails})) == 1


def test_a_quantized_model_that_gains_has_a_negative_drop():
    metrics = {**METRICS, "metrics": {"clipsim": 92.0}}
    assert Gate.parse({"clipsim_drop": "< -0.01"}, NAMES).check(metrics) == []


def test_failures_name_key_wanted_and_found():
    assert failures(psnr=">=40", clipsim=">= 89", psnr_verdict="not worse", size_bytes="<= 5e6") == [
        "psnr: wanted >= 40, found 35.5",
        "psnr_verdict: wanted not worse, found worse",
        "size_bytes: wanted <= 5e6, found 5321585",
    ]


@pytest.mark.parametrize(
    ("key", "wanted", "reason"),
    [
        ("fvd", "<= 5", "fvd came out undefined"),
        ("psnr_drop", "<= 0.1", "psnr has no value of the float model to drop from"),
        ("fvd_data_drop", "<= 0.1", "a value of 0 with the float model"),
        ("motion_low", ">= 1", "motion has no interval"),
        ("motion_verdict", "equal", "nothing can be told: 1 prompt"),
        ("motion_verdict", "not worse", "nothing can be told: 1 prompt"),
        ("fvd_verdict", "equal", "delete that file"),
        ("fvd_low", ">= 1", "delete that file"),
    ],
)
def test_what_was_not_measured_fails(key, wanted, reason):
    (failure,) = failures(**{key: wanted})
    assert failure.startswith(f"{key}: wanted {wanted}, but") and reason in failure


def test_older_runs_without_verdicts_fail_only_where_one_is_asked_for():
    old = {k: v for k, v in METRICS.items() if k != "verdict"}
    assert Gate.parse({"psnr": ">= 30"}, NAMES).check(old) == []
    assert len(Gate.parse({"psnr_verdict": "equal"}, NAMES).check(old)) == 1


@pytest.mark.parametrize("wanted", [30, "30", "= 30", "=> 30", ">= thirty", ">= nan", ">= 30 dB", None, ["> 3"]])
def test_malformed_conditions(wanted):
    with pytest.raises(UserError, match=r"gate.psnr=.*>= <= > < == and a number"):
        Gate.parse({"psnr": wanted}, NAMES)


def test_malformed_verdicts_keys_and_gates():
    with pytest.raises(UserError, match="Use one of: equal, not worse"):
        Gate.parse({"psnr_verdict": ">= 1"}, NAMES)
    with pytest.raises(UserError, match=r"gate.pnsr is not known; close names: psnr.*_low, _high, _drop or _verdict"):
        Gate.parse({"pnsr": ">= 1"}, NAMES)
    with pytest.raises(UserError, match=r"close names: .*clipsim_drop"):
        Gate.parse({"clipsim_dorp": "<= 1"}, NAMES)
    with pytest.raises(UserError, match="is not known"):
        Gate.parse({"lpips": "<= 1"}, NAMES)
    with pytest.raises(UserError, match="no list of conditions"):
        Gate.parse("psnr >= 30", NAMES)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="psnr has no value of the float model"):
        Gate.parse({"psnr_drop": "<= 0.1"}, NAMES, with_float=["clipsim"])


def test_a_metric_may_be_called_like_a_key():
    gate = Gate.parse({"psnr_low": ">= 1"}, [*NAMES, "psnr_low"])
    assert gate.check({**METRICS, "metrics": {"psnr_low": 0.5}}) == ["psnr_low: wanted >= 1, found 0.5"]


def test_no_gate_always_passes():
    assert Gate.parse(None, NAMES) == Gate.parse({}, NAMES) == Gate()
    assert Gate().check(METRICS) == []

"""Verdicts in words, with the digits that their intervals allow."""

import pytest
from page_examples import make_metrics

from viditq.report.verdicts import headline, judge_all, short_labels
from viditq.report.wording import digits_for, interval, num_bytes, percent, plain, seconds, signed


def rows(metrics):
    return {row.name: row for group in judge_all(metrics) for row in group.judgements}


def test_each_metric_in_its_group_with_its_numbers():
    groups = judge_all(make_metrics(8))
    assert [[row.name for row in group.judgements] for group in groups] == [
        ["psnr"],
        ["clipsim", "motion"],
        ["fvd"],
        ["relative_l2"],
    ]
    psnr = groups[0].judgements[0]
    assert (psnr.verdict, psnr.tone, psnr.value, psnr.interval) == ("differs", "differs", "35.5 dB", "34.4 to 36.5")
    assert (psnr.difference, psnr.difference_interval) == ("−14.2 dB", "−15.4 to −13.1")
    assert psnr.floors == (("other seed", "11.9 dB"), ("bfloat16", "49.7 dB"))
    assert psnr.direction == "higher is better" and psnr.reason.startswith("35.50 dB is")


def test_missing_numbers_are_words_not_errors():
    by_name = rows(make_metrics(8))
    assert (by_name["relative_l2"].value, by_name["relative_l2"].verdict) == ("–", "not judged")
    fvd = by_name["fvd"]
    assert (fvd.value, fvd.interval, fvd.difference, fvd.plot) == ("2.902", "", "", None)
    assert fvd.floors == (("other seed", "3.400"),)


def test_without_verdict_the_standard_errors_are_shown():
    metrics = make_metrics(8)
    del metrics["verdict"]
    (group,) = judge_all(metrics)
    assert [row.tone for row in group.judgements] == ["unknown"] * 5
    assert group.judgements[0].interval == "± 0.54 standard error"
    assert headline([group]).text == "Measured, not judged"


def test_the_plot_spans_the_noise_the_interval_and_zero():
    plot = rows(make_metrics(8))["motion"].plot
    assert plot.noise[0] == 6 and plot.bounds[1] == 94
    assert plot.noise[0] < plot.zero < plot.noise[1] < plot.bounds[0] < plot.difference < plot.bounds[1]


@pytest.mark.parametrize(
    ("verdicts", "text", "tone"),
    [
        (
            ["worse", "better", "equal within noise"],
            "Quality lost: worse than float on 1 of 3 quality metrics",
            "worse",
        ),
        (["worse", "worse"], "Quality lost: worse than float on all 2 quality metrics", "worse"),
        (["worse"], "Quality lost: worse than float on the one quality metric", "worse"),
        (["better", "equal within noise"], "Quality held: no worse than float on all 2 quality metrics", "better"),
        (
            ["equal within noise", "equal within noise"],
            "Quality held: equal to float within noise on all 2 quality metrics",
            "equal",
        ),
        (["equal within noise"], "Quality held: equal to float within noise on the one quality metric", "equal"),
    ],
)
def test_headline(verdicts, text, tone):
    names = [f"m{i}" for i in range(len(verdicts))]
    metrics = {
        "metrics": dict.fromkeys(names, 1.0),
        "verdict": {
            n: {"verdict": v, "kind": "quality", "difference_interval": [0, 1]}
            for n, v in zip(names, verdicts, strict=True)
        },
    }
    found = headline(judge_all(metrics))
    assert (found.text, found.tone) == (text, tone)


def test_the_headline_names_the_worse_metrics_and_says_what_is_not_judged():
    found = headline(judge_all(make_metrics(8)))
    assert found.text == "Quality held: no worse than float on all 2 quality metrics"
    assert found.details == (
        "Better: motion magnitude. Equal within noise: CLIPSIM. Samples differ from float's beyond rounding to "
        "bfloat16: PSNR. 2 of 5 metrics are not judged."
    )


def test_what_was_not_compared_is_not_called_equal():
    """Too few prompts, or no noise floor: metrics.json has only three words."""
    entry = {"verdict": "equal within noise", "kind": "fidelity", "difference_interval": None, "warning": "4 prompts"}
    groups = judge_all({"metrics": {"psnr": 30.0}, "verdict": {"psnr": entry}})
    (row,) = groups[0].judgements
    assert (row.verdict, row.tone, row.warning) == ("cannot be told", "unknown", "4 prompts")
    assert headline(groups).text == "Nothing can be told from this run"


def test_labels_are_shortened_only_where_they_stay_distinct():
    labels = {"a": "CLIPSIM (tiny)", "b": "FVD (tiny)", "c": "FVD (I3D)"}
    metrics = {"metrics": dict.fromkeys("abcd", 1.0), "labels": {n: {"label": v} for n, v in labels.items()}}
    assert short_labels(metrics) == {"a": "CLIPSIM", "b": "FVD (tiny)", "c": "FVD (I3D)", "d": "d"}


def test_numbers_in_words():
    assert [plain(float("nan"), 2), plain(None, 2, "dB"), plain(-1.5, 1, "dB")] == ["–", "–", "−1.5 dB"]
    assert [signed(0.04, 1), signed(-0.04, 1), signed(1, 0), signed(-2, 0, "dB")] == ["0.0", "0.0", "+1", "−2 dB"]
    assert interval([1, None], 1) == "" and interval(None, 1) == "" and interval([-1, 2], 0, sign=True) == "−1 to +2"
    assert [digits_for(35.5, 0.54), digits_for(0.0123), digits_for(None), digits_for(5.0, None, 0.0)] == [2, 5, 2, 3]
    assert [percent(0.12), percent(1.5), percent(0.00012), percent(None)] == ["12.0 %", "150 %", "0.0120 %", "–"]
    assert [num_bytes(n) for n in (12, 5321585, 2.5e9, 999e6)] == ["12 bytes", "5.32 MB", "2.5 GB", "999 MB"]
    assert [seconds(s) for s in (0.5, 59.9, 125, 3600 * 3.34)] == ["0.5 s", "59.9 s", "2 min 5 s", "3 h 20 min"]

"""Seconds are set side by side only where they were measured on the same."""

from dataclasses import replace

import pytest
from page_examples import make_content

from viditq.report.page import render
from viditq.report.stage_seconds import not_comparable, stage_seconds

ONE, TWO = ["1 thread of A"], ["2 threads of A"]


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ({"reference": TWO, "generate": TWO}, ""),
        ({"reference": TWO, "generate": ONE}, "float was generated on 2 threads of A, quantized on 1 thread of A."),
        ({"generate": ONE}, "float was generated on what was not recorded, quantized on 1 thread of A."),
        ({"reference": [*ONE, *TWO], "generate": [*ONE, *TWO]}, "float was generated on 1 thread of A, then 2 threads"),
        ({}, "an earlier version made them, which did not record on what."),
    ],
)
def test_float_and_quantized_samples(conditions, words):
    told = not_comparable({"reference": 2.0, "generate": 1.0}, conditions)
    assert words in told and bool(told) == bool(words)
    assert not not_comparable({"generate": 1.0}, conditions), "nothing stands beside it"


def test_other_stages_are_named_where_they_were_measured_on_something_else():
    seconds = {"evaluate": 1.0, "reference": 4.0, "generate": 2.0, "diagnose": 1.0}
    found = stage_seconds(seconds, {"generate": ONE, "reference": ONE, "evaluate": TWO})
    assert found.bars[0] == ("generate with float", 4.0, 100.0) and not found.apart
    assert not stage_seconds(seconds, {"evaluate": TWO}).others, "on what the quantized samples ran is not known"
    assert found.others == "Also measured on something else: evaluate on 2 threads of A."


def test_the_page_leaves_out_what_does_not_compare():
    content = make_content(count=1)
    same = render(content)
    assert "<small>float 32.6 s</small>" in same and "Seconds are those of AMD EPYC 9R45." in same
    assert "do not compare" not in same
    page = render(replace(content, conditions={**content.conditions, "reference": ONE}))
    assert "<small>float 32.6 s</small>" not in page and "Seconds are those of" not in page
    assert page.count("do not compare: float was generated on 1 thread of A, quantized on 2 threads of AMD EPYC") == 1

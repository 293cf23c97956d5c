"""`viditq layers`: what a run would quantize, told without weights."""

import pytest

from viditq.program import main

RULE = "quant.rules=[{pattern: '*.attn2.*', keep_float: true}]"
EVERYWHERE = "W4 channel, A8 token, smooth, for each of 2 ranges of noise levels"


def lines(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["layers", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_what_is_alike_shares_a_line(capsys):
    head, _, columns, *rows = lines(["model=tiny_video", "experiment=w4a8_ts_smooth"], capsys)
    assert head == "tiny_video: 64 of 70 Linears, 92 % of their weights, are quantized"
    assert columns.split() == ["role", "Linears", "out", "x", "in", "weights", "layers", "treatment"]
    first = ["spatial_attention", "16", "192", "x", "192", "589,824", "transformer_blocks.*.attn1:"]
    assert rows[0].split() == [*first, "to_q", "to_k", "to_v", "to_out.0", *EVERYWHERE.split()]
    assert sum(int(row.split()[1]) for row in rows) == 70
    assert [row.split()[-2:] for row in rows if row.startswith("float") and " proj_out " in row] == [
        ["proj_out", "float"]
    ]


def test_every_layer_has_a_line_and_rules_show(capsys):
    rows = lines(["model=tiny_image", "quant=w8a8", RULE, "--all"], capsys)[3:]
    assert len(rows) == 46
    cross = [row for row in rows if row.startswith("cross_attention")]
    assert len(cross) == 16 and all(row.endswith("float") for row in cross)
    assert sum(" transformer_blocks.3.ff.net.2 " in row for row in rows) == 1


def test_a_bad_word_is_refused_as_by_a_run(capsys):
    assert main(["layers", "model=tiny_video", "quant=w9"]) == 2
    assert "w8a8" in capsys.readouterr().err

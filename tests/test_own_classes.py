"""Classes of a user's own: what docs/own_classes.md shows, written out and run."""

import re
from pathlib import Path

from tests.forked import ROOT, Forked
from viditq.files import read_json


def test_what_the_page_shows_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "own_classes.md").read_text()
    shown = re.findall(r"`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", page, re.DOTALL)
    assert len(shown) == 6
    for name, text in shown:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    words = re.search(r"viditq (--config-dir my_conf experiment=.*)\n", page)[1].replace("'", "").split()
    run = Forked(tmp_path, "own", *words, "logger=none", "hydra.run.dir=run", "cache_dir=cache", here=tmp_path)
    assert run.ended()[0] == 0, run.report()
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert 0 < metrics["metrics"]["worst_pixel"] <= 1
    plan = read_json(tmp_path / "run" / "quantized" / "plan.json")
    assert '"my_flip"' in str(plan).replace("'", '"')
    assert not any(layer.startswith("transformer_blocks.3.") for layer in plan["layers"])
    told = Forked(
        tmp_path, "told", "layers", "--config-dir", "my_conf", "model=mine", "quant/smoothing=flip", here=tmp_path
    )
    status, printed, _ = told.ended()
    assert status == 0 and "20 of 46 Linears" in printed and "my_flip" in printed

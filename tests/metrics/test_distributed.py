"""Processes with five, two and no pairs report what one process reports."""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.forked import Forked

WORKER = Path(__file__).with_name("metric_worker.py")


def test_uneven_processes_equal_one(metrics, pairs, clip_folder, tmp_path):
    code = f"import runpy; runpy.run_path({str(WORKER)!r}, run_name='__main__')"
    processes = Forked(tmp_path, "said", str(clip_folder), str(tmp_path), code=code)
    assert processes.ended()[0] == 0, processes.report()
    found = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert len(found) == 3
    for name, metric in metrics.items():
        metric.update(pairs(7))
        for key, expected in metric.compute().items():
            for rank, results in enumerate(found):
                says = partial("{} of process {}: {}".format, f"{name}.{key}", rank)
                torch.testing.assert_close(
                    results[f"{name}.{key}"], expected, rtol=1e-5, atol=1e-5, equal_nan=True, msg=says
                )

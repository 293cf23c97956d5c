"""Processes with five, two and no pairs report what one process reports."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("metric_worker.py")


def test_uneven_processes_equal_one(metrics, pairs, clip_folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(WORKER), str(clip_folder), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
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

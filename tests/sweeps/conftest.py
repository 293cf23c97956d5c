"""Finished runs for tests of what is told of several."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LABELS = {"psnr": {"label": "PSNR", "unit": "dB", "higher_is_better": True}}
W4 = {"quant": {side: {"bits": 4} for side in ("weight", "activation")}}
SPREAD = (-2.0, -1.0, 0.0, 0.0, 1.0, 2.0)  # around a run's PSNR, by prompt
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A finished run. noise: by which its prompts differ from others' beside their mean."""

    def run(name: str, psnr: float, megabytes: float, config: Any = W4, noise: float = 0.0, **rest: Any) -> Path:
        folder = tmp_path / rest.get("folder", "runs") / name
        folder.mkdir(parents=True)
        values = [psnr + spread + noise * (-1) ** i for i, spread in enumerate(SPREAD)]
        model, prompts = rest.get("model", "m"), [str(i) for i in range(len(values))]
        metrics = {"model": model, "experiment": name, "seed": 0, "prompts": len(values), "labels": LABELS}
        metrics |= {"metrics": {"psnr": psnr}, "standard_errors": {"psnr": 0.5}, "float_metrics": {}, "seconds": {}}
        metrics |= {
            "average_weight_bits": 4.5,
            "average_activation_bits": rest.get("activation_bits", 8.5),
            "size_bytes": megabytes * 1e6,
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "run.json").write_text(json.dumps({"name": name, "seed": 0, "model": {"name": model}, **config}))
        per_prompt = {"prompts": prompts, "metrics": {"psnr": values}, "reference": "/cache/r"}
        (folder / "per_prompt.json").write_text(json.dumps(per_prompt))
        if ratio := rest.get("ratio"):
            backend = {"requested": "native", "layers": {rest.get("backend", "native"): 4}}
            seconds = {"quantized": 1.0, "float": ratio}
            candidates = {
                n: {"dtype": "float32", "seconds": {"median": s}, "weights_bytes": s * 1e6} for n, s in seconds.items()
            }
            machine = {"cpu": "c", "cores": 2, "threads": rest.get("threads", 1), "isa": [], "gpu": None, "torch": "2"}
            told = {"backend": backend, "batch_size": 8, "rounds": 5, "machine": machine, "candidates": candidates}
            (folder / "speed.json").write_text(json.dumps(told))
        if rest.get("exact") is not None:
            (folder / "quantized").mkdir()
            (folder / "quantized" / "meta.json").write_text(json.dumps(rest["exact"]))
        return folder

    return run

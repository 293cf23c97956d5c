"""Pipelines on disk as their repositories have them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModularPipeline


def stirred(transformer: Any) -> Any:
    """Noise where parameters begin at zero: modulations, with which no block changes anything."""
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return transformer


def save(build: Callable[[], Any], folder: Path) -> None:
    """Random weights, the same every time; a class-conditional model's index names its classes, as its repository's."""
    torch.manual_seed(0)
    pipeline = build()
    modular = {"overwrite_modular_index": True} if isinstance(pipeline, ModularPipeline) else {}
    pipeline.save_pretrained(str(folder), **modular)
    if getattr(pipeline, "labels", None):
        names: dict[int, list[str]] = {}
        for name, number in pipeline.labels.items():
            names.setdefault(number, []).append(name)
        file = folder / "model_index.json"
        labels = {str(number): ", ".join(names[number]) for number in sorted(names)}
        file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": labels}))

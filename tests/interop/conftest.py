"""A small random PixArt, quantized in every way, as one part of an exported pipeline; and a whole exported pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_pixart import CONFIG, random_model, statistics

from viditq.export.diffusers import export, write_part
from viditq.quant import Recipe, linear_names, quantize_denoiser, save_denoiser


@pytest.fixture(scope="session")
def make_part(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(recipe, dtype) -> artifact and the folder that diffusers reads."""

    def make(recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("part")
        model = random_model(dtype)
        plan = recipe.resolve([name for name in linear_names(model) if name.startswith("transformer_blocks")])
        quantize_denoiser(model, plan, statistics(model) if plan.needs_stats else None)
        save_denoiser(folder / "artifact", model, plan, {"float_dtype": None})
        config = {"_class_name": "PixArtTransformer2DModel", **CONFIG}
        write_part(folder / "part", config, str(dtype).removeprefix("torch."), folder / "artifact")
        return folder / "artifact", folder / "part"

    return make


@pytest.fixture(scope="session")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of the shrunk run (tiny_image, two ranges of noise levels) in diffusers' layout, only to be read."""
    out = tmp_path_factory.mktemp("exported") / "pipeline"
    export(finished_run / "quantized", out)
    return out

"""Pictures that prompts come with: noise."""

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image


def draw_noise(folder: Path, sizes: Iterable[tuple[str, int, int]]) -> Path:
    """Write a png of noise for each (name, height, width) to the folder, which is returned."""
    generator = torch.Generator().manual_seed(0)
    for name, height, width in sizes:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
    return folder

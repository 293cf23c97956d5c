"""Samples on disk, lossless: PNG for an image, uint8 safetensors for a video. Legend: F frames, C = 3, H, W pixels."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from viditq.errors import UserError
from viditq.files import atomic, is_whole, write_tensors


def sample_path(folder: Path, index: int, modality: str) -> Path:
    """The file of prompt `index`."""
    return folder / f"{index:06d}.{'png' if modality == 'image' else 'safetensors'}"


def save_sample(path: Path, clip_FCHW: Tensor) -> None:
    """Write one uint8 sample."""
    if path.suffix == ".png":
        with atomic(path) as temporary:
            Image.fromarray(clip_FCHW[0].permute(1, 2, 0).numpy()).save(temporary, format="PNG")
    else:
        write_tensors(path, {"frames": clip_FCHW})


def load_sample(path: Path) -> Tensor:
    """Read one sample, uint8 [F, C, H, W]; raises UserError naming a file that is damaged or missing."""
    try:
        if path.suffix == ".png":
            return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
        return load_file(path)["frames"]
    except (OSError, SafetensorError, KeyError, SyntaxError) as error:
        raise UserError(
            f"Sample {path} is missing or damaged ({error}). Delete it and run the command again."
        ) from error


def missing_samples(folder: Path, count: int, modality: str) -> list[int]:
    """Indices of the prompts whose sample is not on disk, or cut off there."""
    return [i for i in range(count) if not is_whole(sample_path(folder, i, modality))]

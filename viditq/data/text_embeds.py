"""Embeddings made by the text encoder elsewhere, in Open-Sora's `text_embeds.pth`.

Legend: P prompts, 2 = the prompt and the null caption, L tokens, D text channels.
"""

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from viditq.errors import UserError

LAYOUT = "a dict with y [prompts, 2, 1, tokens, channels] and mask [prompts, tokens]"


def read_text_embeds(path: str) -> list[dict[str, Tensor]]:
    """Per prompt `prompt_embeds` and `negative_prompt_embeds` [1, L, D] without padding.

    Raises UserError if the file is missing, damaged, holds other objects than tensors, or is laid out otherwise.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        content: Any = torch.load(_existing(path), map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"{path} is damaged or holds more than tensors: {str(error).splitlines()[0]} It must be {LAYOUT}."
        ) from error
    y_P21LD, mask_PL = (content.get(k) for k in ("y", "mask")) if isinstance(content, dict) else (None, None)
    if not (isinstance(y_P21LD, Tensor) and isinstance(mask_PL, Tensor)):
        raise UserError(f"{path} is not what it should be: {LAYOUT}.")
    if y_P21LD.ndim != 5 or y_P21LD.shape[1:3] != (2, 1) or mask_PL.shape != (len(y_P21LD), y_P21LD.shape[3]):
        raise UserError(f"{path} has y {tuple(y_P21LD.shape)} and mask {tuple(mask_PL.shape)}; it must be {LAYOUT}.")
    if not mask_PL.bool().any(dim=1).all():
        raise UserError(f"{path}: the mask leaves no token of prompt {int(mask_PL.bool().any(dim=1).long().argmin())}.")
    names = ("prompt_embeds", "negative_prompt_embeds")
    return [
        {name: y_21LD[i][:, mask_L.bool()] for i, name in enumerate(names)}
        for y_21LD, mask_L in zip(y_P21LD, mask_PL, strict=True)
    ]


def digest(path: str) -> str:
    """Hash of the file's content."""
    with _existing(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"Embeddings file {path!r} does not exist. Give Open-Sora's text_embeds.pth, or embeds=null.")
    return file

"""Weights of public networks from files that the user gives: torchvision's .pth, or the same as .safetensors."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from viditq.errors import UserError

ORIGIN = "https://download.pytorch.org/models/"


def read_weights(file: str | None, official: str, wanted_by: str, offline: str) -> dict[str, Tensor]:
    """The tensors of `file`, on the CPU.

    `official`: how torchvision calls the file; `wanted_by` and `offline` complete the message. Raises UserError if no
    file is given, it does not exist, or it holds something else than tensors (which is not loaded).
    """
    where = f"Download {ORIGIN}{official} (torchvision's weights) and give its path. {offline}"
    if file is None:
        raise UserError(f"{wanted_by} needs the file {official}, and its weights are null. {where}")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{wanted_by} needs the file {official}, and {file!r} does not exist. {where}")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else _read_pth(path)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{wanted_by}: {file!r} holds no readable tensors ({_first_line(error)}). {where}") from error
    return tensors


def _read_pth(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError("not a dictionary of tensors")
    return dict(content)


def fill(network: torch.nn.Module, tensors: dict[str, Tensor], file: str | None, wanted_by: str) -> None:
    """Load `tensors` into `network`, all of them; raises UserError if names or shapes differ."""
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{wanted_by}: {file!r} belongs to another network ({'; '.join(str(error).split(chr(10))[1:])[:300]})."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__

"""Weights of public networks from files that the user gives: .pth, the same as .safetensors, or TorchScript."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from viditq.errors import UserError

ORIGIN = "https://download.pytorch.org/models/"


def read_weights(
    file: str | None, official: str, wanted_by: str, offline: str, origin: str | None = None
) -> dict[str, Tensor]:
    """The tensors of `file`, on the CPU.

    `official`: the name of the published file; `wanted_by` and `offline` complete the message, as does `origin`, the
    address of the file (None: torchvision's). Raises UserError if no file is given, it does not exist, or it holds
    something else than tensors (which is not loaded).
    """
    where = _where(origin or f"{ORIGIN}{official} (torchvision's weights)", offline)
    path = _existing(file, official, wanted_by, where)
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else _read_pth(path)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{wanted_by}: {file!r} holds no readable tensors ({_first_line(error)}). {where}") from error
    return tensors


def read_torchscript(
    file: str | None, official: str, wanted_by: str, offline: str, origin: str, arguments: tuple[str, ...]
) -> Any:
    """The program of `file`, on the CPU, in evaluation mode. TorchScript is code: it runs when it is called.

    `arguments`: names that its forward must take; the rest is as in `read_weights`. Raises UserError if no file is
    given, it does not exist, is no TorchScript, or takes other arguments.
    """
    where = _where(origin, offline)
    path = _existing(file, official, wanted_by, where)
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{wanted_by}: {file!r} is no TorchScript ({_first_line(error)}). {where}") from error
    found = [argument.name for argument in network.forward.schema.arguments[1:]]
    if not set(arguments) <= set(found):
        raise UserError(
            f"{wanted_by}: {file!r} belongs to another network: its forward takes ({', '.join(found)}) and must take "
            f"({', '.join(arguments)}). {where}"
        )
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def _where(origin: str, offline: str) -> str:
    return f"Download {origin} and give its path. {offline}"


def _existing(file: str | None, official: str, wanted_by: str, where: str) -> Path:
    if file is None:
        raise UserError(f"{wanted_by} needs the file {official}, and its weights are null. {where}")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{wanted_by} needs the file {official}, and {file!r} does not exist. {where}")
    return path


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

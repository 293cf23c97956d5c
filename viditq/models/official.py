"""Checkpoints of the original projects (.pth), read without executing anything in them, under the names used here.

Open-Sora v1.0, PixArt-alpha and PixArt-sigma share their names; docs/opensora.md lists what becomes of each.
"""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from viditq.errors import UserError

TABLES = ("pos_embed", "pos_embed_temporal")  # stored, but computed anew from the sizes
QKV = ("q", "k", "v")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of an official .pth (or .safetensors) file, mapped into memory rather than read.

    A dict that wraps them as `state_dict` is opened. Raises UserError for a missing or damaged file, or one that
    holds other objects than tensors (those are never loaded).
    """
    if not path.is_file():
        raise UserError(f"Checkpoint {path} does not exist. Give the official .pth file, downloaded before.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # Files older than torch 1.6 are no zip and cannot be mapped.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged or holds more than tensors, which is refused because such files can run code: "
            f"{str(error).splitlines()[0]} Take the official file."
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}). It may be cut off: download it again.") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} holds no dict of tensors. Give the file of the denoiser's weights.")
    return loaded


def split_rows(tensors: Mapping[str, Tensor], merged: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """`PREFIX.merged.weight` -> one entry per part, equal ranges of rows in that order; views, nothing is copied.

    What is split already stays. Raises UserError if the rows do not divide.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, found, tail = name.rpartition(f".{merged}.")
        if not found:
            out[name] = tensor
            continue
        if len(tensor) % len(parts):
            raise UserError(f"{name} has {len(tensor)} rows, which do not divide into {', '.join(parts)}.")
        out |= {f"{head}.{part}.{tail}": rows for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True)}
    return out


def check_fits(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError unless the tensors are exactly the model's parameters and buffers, by name and shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{n} ({found[n]}, the model has {wanted[n]})" for n in wanted if n in found and found[n] != wanted[n]
        ],
    }
    said = [f"{len(names)} {what}, first {names[0]}" for what, names in problems.items() if names]
    if said:
        raise UserError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(said)}. Give the checkpoint of that very model."
        )


def build_from(cls: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Any:
    """A model whose parameters are the given tensors themselves; raises UserError unless they are exactly its own."""
    with init_empty_weights(include_buffers=False):
        model = cls(**config)
    check_fits(model, tensors, path)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Shapes:
    """What a checkpoint's shapes tell of its model: the part of the configuration that both families share."""

    channels: int
    num_layers: int
    caption_channels: int
    in_channels: int
    out_channels: int
    patch_size: int
    sample_size: int


def shapes_of(tensors: Mapping[str, Tensor], num_heads: int, size: int | None) -> Shapes:
    """size: pixels; None: as the stored position table says. Raises UserError for another kind of checkpoint."""
    for name in ("x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "final_layer.linear.weight"):
        if name not in tensors:
            raise UserError(f"{name} is missing: this is no checkpoint of STDiT or PixArt. Give the official file.")
    channels, in_channels, *_, patch = tensors["x_embedder.proj.weight"].shape
    if channels % num_heads:
        raise UserError(f"{channels} channels do not divide into {num_heads} heads; give the right number of heads.")
    if size is None and "pos_embed" not in tensors:
        raise UserError("The checkpoint holds no position table; give the size in pixels that it was trained for.")
    return Shapes(
        channels=channels,
        num_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        caption_channels=tensors["y_embedder.y_proj.fc1.weight"].shape[1],
        in_channels=in_channels,
        out_channels=len(tensors["final_layer.linear.weight"]) // patch**2,
        patch_size=patch,
        sample_size=size // 8 if size else round(tensors["pos_embed"].shape[1] ** 0.5) * patch,
    )


def check_tables(computed: Mapping[str, Tensor], stored: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError if a position table in the file is not what the model computes for the same size."""
    for name, table in computed.items():
        if name not in stored or stored[name].shape != table.shape:
            continue
        difference = (stored[name].float() - table).abs().max().item()
        if not difference < 1e-2:  # tables in float16 are off by 5e-4
            raise UserError(
                f"{path}: {name} differs from the table for this size by up to {difference:.3g}, so positions were "
                "scaled in another way. Give the scale that the model was trained with: --position-scale."
            )

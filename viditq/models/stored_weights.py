"""The files that a part's weights lie in, and the types they have there."""

from pathlib import Path

import torch

from viditq.models.adapter import ModelAdapter
from viditq.models.weight_files import stored_tensors, variant_of


def files_of_part(adapter: ModelAdapter, part: str) -> list[Path]:
    """The safetensors files of a part in the variant that is loaded, as far as they are here."""
    folder = adapter.part_folder(part, weights=False)
    mark = variant_of(folder, adapter.variant) or ""
    marks = {path: "".join(path.name.split(".")[1:-1]) for path in sorted(folder.glob("*.safetensors"))}
    return [path for path, own in marks.items() if own.startswith(mark) and bool(own) == bool(mark)]


def stored_dtypes(adapter: ModelAdapter) -> dict[str, torch.dtype]:
    """Parameters of the denoisers -> their types in the safetensors files, as far as those are here; raises UserError
    for a file that was cut off.
    """
    found: dict[str, torch.dtype] = {}
    for part in adapter.denoiser_names:
        prefix = f"{part}." if len(adapter.denoiser_names) > 1 else ""
        stored = stored_tensors(files_of_part(adapter, part))
        found |= {prefix + name: tensor.dtype for name, tensor in stored.items()}
    return found

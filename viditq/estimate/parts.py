"""The parts of a pipeline for an estimate: their bytes, hollow ones from configurations alone, embeddings without the
text encoder's weights."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.estimate.hollow import hollowed, on_meta, shallow
from viditq.files import read_json
from viditq.models.adapter import COPY_AGAIN, ModelAdapter
from viditq.models.checks import DTYPES
from viditq.models.registry import find_class
from viditq.models.text import PromptEmbeds, encode_prompt
from viditq.quant.sizes import module_bytes

TEXT = ("text_", "tokenizer")


def dtype_of(adapter: ModelAdapter, part: str) -> torch.dtype:
    """The dtype in which a part of the pipeline is loaded."""
    return DTYPES[adapter.component_dtypes.get(part, adapter.dtype)]


def classes(adapter: ModelAdapter) -> dict[str, Any]:
    """Part -> class, of the parts of the pipeline that are models."""
    found = {}
    for part, value in adapter.index().items():
        if isinstance(value, list) and value[0] is not None:
            library = transformers if value[0] == "transformers" else diffusers
            cls = getattr(library, value[1], None) or find_class(value[1])
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                found[part] = cls
    return found


def on_meta_part(adapter: ModelAdapter, part: str, cls: Any, few_layers: bool = False) -> nn.Module:
    """One part of the pipeline from its config.json, on the meta device."""
    if part in adapter.denoiser_names:
        folder = adapter.denoiser_source.part(part, weights=False)
    else:
        folder = adapter.folder / part
    if issubclass(cls, transformers.PreTrainedModel):
        config = cls.config_class.from_pretrained(folder)
        return on_meta(lambda: cls(shallow(config) if few_layers else config), dtype_of(adapter, part))
    values = read_json(folder / "config.json", COPY_AGAIN)
    return on_meta(lambda: cls.from_config(values), dtype_of(adapter, part))


def bytes_of_parts(adapter: ModelAdapter) -> dict[str, int]:
    """Part -> bytes of its tensors as they are loaded, in the order of the pipeline."""
    return {part: module_bytes(on_meta_part(adapter, part, cls)) for part, cls in classes(adapter).items()}


def count_parameters(adapter: ModelAdapter) -> dict[str, int]:
    """Part -> number of parameters."""
    return {
        part: sum(p.numel() for p in on_meta_part(adapter, part, cls).parameters())
        for part, cls in classes(adapter).items()
    }


def hollow_pipeline(adapter: ModelAdapter) -> Any:
    """The pipeline without its text part and without weights."""
    parts: dict[str, Any] = {}
    for part in (name for name, value in adapter.index().items() if isinstance(value, list)):
        cls = classes(adapter).get(part)
        if part.startswith(TEXT):
            parts[part] = None
        elif cls is not None:
            parts[part] = hollowed(on_meta_part(adapter, part, cls))
    return _assembled(adapter, parts)


def shape_of_embeds(adapter: ModelAdapter, prompt: str) -> PromptEmbeds:
    """Embeddings of the right shapes and dtypes for `prompt`, of random values; masks and labels are the real ones."""
    parts: dict[str, Any] = {}
    for part in (name for name, value in adapter.index().items() if isinstance(value, list)):
        cls = classes(adapter).get(part)
        if part.startswith("text_") and cls is not None:
            parts[part] = hollowed(on_meta_part(adapter, part, cls, few_layers=True))
        elif not part.startswith(TEXT):
            parts[part] = None
    embeds = encode_prompt(adapter, _assembled(adapter, parts), prompt)
    generator = torch.Generator().manual_seed(0)
    return {name: _random(value, generator) for name, value in embeds.items()}


def _random(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=generator).to(value.dtype)


def _assembled(adapter: ModelAdapter, parts: Mapping[str, Any]) -> Any:
    try:
        pipeline = find_class(adapter.pipeline).from_pretrained(adapter.folder, local_files_only=True, **parts)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The pipeline in {adapter.folder} cannot be put together: {error}. {COPY_AGAIN}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def names_in_half(folder: Path, dtypes: Sequence[str] = ("F16",)) -> set[str]:
    """Parameters that the safetensors files of `folder` hold in float16; only headers are read."""
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            import json

            header = json.loads(file.read(length))
        found |= {name for name, entry in header.items() if name != "__metadata__" and entry["dtype"] in dtypes}
    return found

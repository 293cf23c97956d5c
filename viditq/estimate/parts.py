"""The parts of a pipeline for an estimate: their bytes, hollow ones from configurations alone, embeddings without the
text encoder's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.estimate.from_disk import OnDisk, on_disk
from viditq.estimate.hollow import answer_from_meta, hollowed, on_meta, shallow
from viditq.files import read_mapping
from viditq.models.adapter import ModelAdapter
from viditq.models.dtypes import DTYPES
from viditq.models.generate import group_by_shape
from viditq.models.parts import TEXT, models_of
from viditq.models.registry import find_class
from viditq.models.stand_ins import beside_text, compute_on_cpu
from viditq.models.stored_embeds import NEGATIVE
from viditq.models.stored_weights import files_of_part
from viditq.models.text import PromptEmbeds, encode_prompt, num_tokens
from viditq.models.text_encoders import ENCODER
from viditq.models.weight_files import COPY_AGAIN
from viditq.quant.sizes import module_bytes, tensor_bytes


def dtype_of(adapter: ModelAdapter, part: str) -> torch.dtype:
    """The dtype in which a part of the pipeline is loaded."""
    return DTYPES[adapter.component_dtypes.get(part, adapter.dtype)]


def on_meta_part(adapter: ModelAdapter, part: str, cls: Any, few_layers: bool = False) -> nn.Module:
    """One part of the pipeline from its config.json, on the meta device."""
    folder = adapter.part_folder(part, weights=False)
    if issubclass(cls, transformers.PreTrainedModel):
        config = cls.config_class.from_pretrained(folder)
        model: Any = on_meta(lambda: cls(shallow(config) if few_layers else config), dtype_of(adapter, part))
        model.tie_weights()  # a shared embedding is there once
        shared: nn.Module = model
        return shared
    values = read_mapping(folder / "config.json", remedy=COPY_AGAIN)
    return on_meta(lambda: cls.from_config(values), dtype_of(adapter, part))


def sizes(adapter: ModelAdapter) -> dict[str, tuple[int, int]]:
    """Part -> its number of parameters and bytes as it is loaded, in the order of the pipeline."""
    found = {}
    for part, cls in models_of(adapter.index()).items():
        module = on_meta_part(adapter, part, cls)
        found[part] = (sum(p.numel() for p in module.parameters()), module_bytes(module))
    return found


def hollow_pipeline(adapter: ModelAdapter) -> Any:
    """The pipeline without its text part and without weights."""
    parts: dict[str, Any] = {}
    for part in (name for name, value in adapter.index().items() if isinstance(value, list)):
        cls = models_of(adapter.index()).get(part)
        if part in adapter.text_parts:
            parts[part] = None
        elif cls is not None:
            parts[part] = hollowed(on_meta_part(adapter, part, cls))
    return _assembled(adapter, parts)


class TextShapes:
    """What prompts become, without the text encoder's weights: embeddings whose shapes and dtypes are right."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self._by_length: dict[int, PromptEmbeds] = {}
        self.encoding = 0
        """Bytes that an encoder has taken beside its weights, at most, for what was asked for; 0 = not known."""

    @cached_property
    def _pipeline(self) -> Any:
        parts = beside_text(self.adapter)
        for part, cls in models_of(self.adapter.index()).items():
            if part.startswith("text_"):
                parts[part] = hollowed(on_meta_part(self.adapter, part, cls, few_layers=True))
                answer_from_meta(parts[part], self._tell)
        return compute_on_cpu(_assembled(self.adapter, parts))

    def _tell(self, nbytes: int) -> None:
        self.encoding = max(self.encoding, nbytes)

    def embeds(self, prompt: str) -> PromptEmbeds:
        """Random values in place of the encoder's; masks and labels are the real ones. Prompts of equally many tokens
        have equal shapes, so that only the first of them is encoded."""
        tokenizer = getattr(self._pipeline, self.adapter.prompt_tokenizer, None)
        length = 0 if tokenizer is None else num_tokens(tokenizer, prompt)
        if length not in self._by_length:
            generator = torch.Generator().manual_seed(0)
            embeds = encode_prompt(self.adapter, self._pipeline, prompt)
            self._by_length[length] = {name: _random(value, generator) for name, value in embeds.items()}
        return self._by_length[length]

    def stored_bytes(self, prompts: Iterable[str]) -> int:
        """What their embeddings take on disk, at most: rows of padding that turn out equal are stored once."""
        embeds = [self.embeds(prompt) for prompt in prompts]
        shared = {
            (name, value.shape): value for one in embeds for name, value in one.items() if name.startswith(NEGATIVE)
        }
        own = (value for one in embeds for name, value in one.items() if not name.startswith(NEGATIVE))
        return tensor_bytes(own) + tensor_bytes(shared.values())

    def calls(self, prompts: Sequence[str]) -> int:
        """How many calls of the pipeline sample them in one batch: one for each shape."""
        return len(group_by_shape(self.adapter, [self.embeds(prompt) for prompt in prompts]))


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


def text_file_bytes(adapter: ModelAdapter, loaded: Mapping[str, int]) -> int:
    """Bytes of the files of the largest text encoder; loaded: part -> bytes as loaded, for those that are not here."""
    texts = [part for part in loaded if part.startswith(TEXT)]
    files = {part: sum(path.stat().st_size for path in files_of_part(adapter, part)) for part in texts}
    return max((files[part] or loaded[part] for part in texts), default=0)


def largest_file(adapter: ModelAdapter) -> int:
    """Bytes of the largest file with weights of a denoiser; 0 where none is here."""
    names = [*adapter.denoiser_names, *adapter.float_denoisers]
    files = [path for part in names for path in files_of_part(adapter, part)]
    return max((path.stat().st_size for path in files), default=0)


def text_on_disk(adapter: ModelAdapter) -> dict[str, OnDisk]:
    """Part -> what it takes where it lies in its files, of the text parts; those that cannot lie there as a whole."""
    found = {}
    for part, cls in models_of(adapter.index()).items():
        if part.startswith(TEXT):
            module = on_meta_part(adapter, part, cls)
            streamed = part.startswith(ENCODER) and issubclass(cls, transformers.PreTrainedModel)
            found[part] = on_disk(module, {}) if streamed else OnDisk(module_bytes(module))
    return found

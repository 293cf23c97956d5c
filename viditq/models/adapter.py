"""One adapter for every diffusers pipeline, image or video, described by its yaml (conf/model/*.yaml)."""

from __future__ import annotations

import dataclasses
import fnmatch
import gc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn

from viditq.assets import resolve
from viditq.errors import UserError
from viditq.files import read_json
from viditq.models.registry import find_class

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODALITIES = ("image", "video")
COPY_AGAIN = "Copy the model's folder again."


@dataclass(frozen=True)
class ModelAdapter:
    """What the framework needs to know of a pipeline.

    path: a folder in the diffusers layout, or shipped:NAME. pipeline: a diffusers pipeline class. encode: keyword
    arguments of `encode_prompt`; encode_outputs: in order, the names under which `__call__` takes what it returns.
    call: more arguments of `__call__`, for embeddings made before. timestep_scale: the timestep that means pure noise.
    roles: role -> patterns of Linear names, for reports and mixed precision; keep_float: patterns of Linears never
    quantized. Raises UserError on values outside these.
    """

    name: str
    path: str
    pipeline: str
    modality: str
    num_steps: int
    guidance_scale: float
    height: int
    width: int
    encode_outputs: Sequence[str]
    max_tokens: int
    num_frames: int = 1
    dtype: str = "float32"
    timestep_scale: float = 1000.0
    denoiser: str = "transformer"
    encode: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    keep_float: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"model.dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
        if self.modality not in MODALITIES:
            raise UserError(f"model.modality={self.modality!r} is unknown; choose image or video.")
        for key in ("num_steps", "num_frames", "height", "width", "max_tokens"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model.{key}={value!r} must be a whole number of at least 1.")
        for key in ("guidance_scale", "timestep_scale"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise UserError(f"model.{key}={value!r} must be a number above 0.")
        if find_class(self.pipeline) is None:
            raise UserError(f"model.pipeline={self.pipeline!r} is no class of diffusers {diffusers.__version__}.")
        if not (self.folder / "model_index.json").is_file():
            raise UserError(f"{self.folder} holds no diffusers pipeline: model_index.json is missing there.")
        if self.denoiser not in self._components():
            parts = ", ".join(self._components())
            raise UserError(f"model.denoiser={self.denoiser!r} is no part of the pipeline; choose one of {parts}.")

    @property
    def folder(self) -> Path:
        """The pipeline's folder; raises UserError if it does not exist."""
        return resolve(self.path)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which `ModelAdapter(**values)` is built again."""
        return dataclasses.asdict(self)

    def weights_fingerprint(self) -> str:
        """Hash of the pipeline's files: names, sizes and the first and last MiB of each."""
        digest = hashlib.sha256()
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(self.folder)} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, path.stat().st_size - (1 << 20)))
                digest.update(file.read())
        return digest.hexdigest()[:16]

    def load_text_part(self) -> Any:
        """The pipeline with its tokenizer and text encoder only."""
        return self._load({name: None for name in self._components() if not name.startswith(("text_", "tokenizer"))})

    def load(self, denoiser: nn.Module | None = None) -> Any:
        """The pipeline without its text part, in evaluation mode; `denoiser` replaces the stored one."""
        absent: dict[str, Any] = {n: None for n in self._components() if n.startswith(("text_", "tokenizer"))}
        return self._load(absent | ({self.denoiser: denoiser} if denoiser is not None else {}))

    def load_complete(self, denoiser: nn.Module | None = None) -> Any:
        """The whole pipeline, ready for `pipeline(prompt)`; `denoiser` replaces the stored one."""
        return self._load({self.denoiser: denoiser} if denoiser is not None else {})

    def build_denoiser(self) -> nn.Module:
        """The denoiser's structure from its config.json: parameters on the meta device, buffers real."""
        cls = find_class(self._index()[self.denoiser][1])
        config = read_json(self.folder / self.denoiser / "config.json", COPY_AGAIN)
        with init_empty_weights(include_buffers=False):
            return cls.from_config(config)

    def linear_roles(self, linear_names: Sequence[str]) -> dict[str, str]:
        """Linear name -> role, or "float" for those kept; raises UserError naming Linears that nothing covers."""
        patterns = {**self.roles, "float": self.keep_float}
        found = {
            name: role
            for name in linear_names
            for role, globs in patterns.items()
            if any(fnmatch.fnmatchcase(name, glob) for glob in globs)
        }
        missing = [name for name in linear_names if name not in found]
        if missing:
            raise UserError(
                f"Model {self.name}: {len(missing)} Linears belong to no role, first {missing[:3]}. Add a pattern to "
                "model.roles, or to model.keep_float to leave them in float."
            )
        return found

    def _index(self) -> dict[str, Any]:
        return read_json(self.folder / "model_index.json", COPY_AGAIN)

    def _components(self) -> list[str]:
        return [name for name, value in self._index().items() if isinstance(value, list)]

    def _load(self, components: dict[str, Any]) -> Any:
        cls = find_class(self.pipeline)
        try:
            pipeline = cls.from_pretrained(self.folder, dtype=self.torch_dtype, local_files_only=True, **components)
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"The pipeline in {self.folder} cannot be loaded: {error}. {COPY_AGAIN}") from error
        pipeline.set_progress_bar_config(disable=True)
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                self._check_finite(name, component.eval().requires_grad_(False))
        gc.collect()
        return pipeline

    def _check_finite(self, component: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if not torch.isfinite(parameter).all():
                raise UserError(
                    f"{component}.{name} of {self.folder} contains NaN or inf as {self.dtype}. Check the checkpoint, "
                    f"or load it in a wider type: model.dtype={' or '.join(d for d in DTYPES if d != self.dtype)}."
                )

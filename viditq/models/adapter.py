"""One adapter for every diffusers pipeline, image or video, described by its yaml (conf/model/*.yaml)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from viditq.files import read_mapping
from viditq.models import contents, parts, roles
from viditq.models.attention import check_attention, check_dispatches
from viditq.models.checks import check_arguments, check_call, check_values, given_to_call, reads_words
from viditq.models.dtypes import DTYPES
from viditq.models.guess import guess_settings
from viditq.models.measured_text import measured_outputs
from viditq.models.modular import read_index
from viditq.models.negative_prompt import own_negative_prompt
from viditq.models.particular import LOOKING
from viditq.models.pipelines import load_pipeline
from viditq.models.registry import find_class
from viditq.models.schedulers import check_scheduler
from viditq.models.sound import makes_sound
from viditq.models.source import Source
from viditq.models.stand_ins import beside_text, compute_on_cpu
from viditq.models.timestep_scale import measured_scale
from viditq.models.weight_files import COPY_AGAIN


@dataclass(frozen=True)
class ModelAdapter:
    """What the framework needs to know of a pipeline.

    path: a folder in the diffusers layout, shipped:NAME, or the id of a model on the hub, there of `revision`.
    denoiser_path: the same for the denoisers alone, where they lie in another place (in a folder each, of their name).
    pipeline: a pipeline class of diffusers. denoisers: the parts that are quantized. num_frames, height, width,
    guidance_scale, max_tokens: None = as the pipeline has it. guidance_argument: what `__call__` names the guidance.

    conditioning: text (`encode_prompt`) or class (labels). encode: keyword arguments of `encode_prompt`;
    encode_outputs: in order, the names under which `__call__` takes what it returns, None for what it does not take;
    all None: it is given the prompt again (`replay.py`). list_embeds: it takes lists of tensors. negative_prompt:
    encoded by a call of its own, as `negative_<name>`; None = `encode_prompt` sees to it (guessed: the one that the
    pipeline's call encodes by itself, if any). prompt_tokenizer: the one whose tokens max_tokens counts. call: more
    arguments of `__call__`, for embeddings made before. conditions: those that take pictures, which prompts may come
    with (data.images).

    timestep_scale: the timestep that means pure noise, or {at_noise, at_clean, argument} of the denoiser's forward.
    scheduler: another scheduler class of diffusers than the stored one; scheduler_settings: what replaces its settings.

    variant: the weights' files are those marked with it (fp16: *.fp16.safetensors), of the parts that have such files.
    float_denoisers: other denoisers of the pipeline, left in float on purpose; they count in bits and bytes.
    calibration_batch_size: prompts that are sampled together while something is measured on them (calibration, search,
    correction, diagnosis), whatever batch_size is: the last bits of matrix products depend on how many there are.

    dtype: of all parts but component_dtypes (part -> dtype). attention: native (ours, on a CPU) or a backend of
    diffusers' dispatch, None = the model's own. vae_tiling: the VAE works in tiles, of its own sizes, which takes less
    memory and moves samples a little. compile: torch.compile while samples are generated. roles: role ->
    patterns of Linear names, for reports and mixed precision; keep_float: patterns of Linears never quantized;
    float_roles: roles that stay in float too (LTX-2's sound). guess: the roles are guessed, and every field that is
    None but has to have a value. Raises UserError on values outside these.
    """

    name: str
    path: str
    pipeline: str
    modality: str
    num_steps: int
    guidance_scale: float | None
    height: int | None
    width: int | None
    encode_outputs: Sequence[str | None]
    max_tokens: int | None
    num_frames: int | None = 1
    fps: int = 8
    revision: str = "main"
    denoiser_path: str | None = None
    denoiser_revision: str = "main"
    calibration_batch_size: int = 1
    dtype: str = "float32"
    component_dtypes: Mapping[str, str] = field(default_factory=dict)
    timestep_scale: float | Mapping[str, Any] = 1000.0
    denoisers: Sequence[str] = ("transformer",)
    conditioning: str = "text"
    guidance_argument: str = "guidance_scale"
    prompt_tokenizer: str = "tokenizer"
    negative_prompt: str | None = None
    list_embeds: bool = False
    attention: str | None = None
    compile: bool = False
    scheduler: str | None = None
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)
    encode: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    keep_float: Sequence[str] = ()
    guess: bool = False
    variant: str | None = None
    float_denoisers: Sequence[str] = ()
    conditions: Sequence[str] | None = None
    vae_tiling: bool = False
    float_roles: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_values(self)
        check_attention(self.attention, self.dtype)
        if self.guess:
            known = ("pipeline", "denoisers", "encode_outputs", "guidance_scale", "guidance_argument")
            given = {key: getattr(self, key) for key in known}
            self._fill_in(guess_settings(self.index(), given))
            if given["encode_outputs"] is None and self.conditioning == "text":
                object.__setattr__(self, "encode_outputs", measured_outputs(self))
        object.__setattr__(self, "conditions", list(self.conditions or ()))
        parts.check_pipeline(self.pipeline, self.index())
        parts.check_denoisers(self.denoiser_names, list(self.float_denoisers), self.index())
        check_call(find_class(self.pipeline), given_to_call(self))
        check_arguments(self, find_class(self.pipeline))
        check_scheduler(self)
        if self.guess and self.negative_prompt is None and self.conditioning == "text":
            self._fill_in(own_negative_prompt(self))
        if self.timestep_scale is None:
            object.__setattr__(self, "timestep_scale", measured_scale(self))

    def _fill_in(self, guessed: Mapping[str, Any]) -> None:
        """Guessed values in place of None; arguments of encode_prompt and __call__ that are given stay."""
        for key, value in guessed.items():
            mine = getattr(self, key)
            if isinstance(value, dict):
                object.__setattr__(self, key, {**value, **mine})
            elif mine is None:
                object.__setattr__(self, key, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelAdapter:
        """The adapter that `to_dict` described, in this version or an earlier one."""
        values = dict(values)
        if "denoiser" in values:  # before a pipeline could have several
            values["denoisers"] = [values.pop("denoiser")]
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which `ModelAdapter.from_dict` builds it again; whether it is compiled is the run's."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "compile"}

    # Files ------------------------------------------------------------------------------------------------------------

    @property
    def source(self) -> Source:
        """Where the pipeline is."""
        return Source(self.path, self.revision, self.variant)

    @property
    def denoiser_source(self) -> Source:
        """Where the denoisers are."""
        return Source(self.denoiser_path, self.denoiser_revision) if self.denoiser_path else self.source

    @property
    def of_hub(self) -> bool:
        """Whether any of its files are named by an id on the hub."""
        return self.source.of_hub or self.denoiser_source.of_hub

    @property
    def folder(self) -> Path:
        """The pipeline's folder (of a hub model's descriptions); raises UserError if there is none."""
        return self.source.pipeline(weights=False)

    def part_folder(self, name: str, weights: bool) -> Path:
        """The folder of one part, of the hub without `weights` its descriptions alone."""
        if self.denoiser_path is not None and name in self.denoiser_names:
            return self.denoiser_source.part(name, weights)
        return self.source.pipeline(weights) / name

    def weights_fingerprint(self) -> str:
        """Hash of the pipeline's files, and of its denoisers' where they lie elsewhere."""
        whole = self.source.fingerprint(self.folder)
        if self.denoiser_path is None:
            return whole
        parts = [self.denoiser_source.part(name, weights=False) for name in self.denoiser_names]
        return "+".join([whole, *(self.denoiser_source.fingerprint(part) for part in parts)])

    def index(self) -> dict[str, Any]:
        """The content of model_index.json: parts are lists [library, class], settings that are lists tuples."""
        return parts.told_apart(read_index(self.folder))

    @property
    def components(self) -> list[str]:
        """The names of all parts."""
        return [name for name, value in self.index().items() if isinstance(value, list)]

    @property
    def text_parts(self) -> list[str]:
        """The parts that only encode prompts: tokenizers and text encoders; none where the denoiser reads words."""
        return [] if self.reads_words else [name for name in self.components if name.startswith(parts.TEXT)]

    @cached_property
    def makes_sound(self) -> bool:
        """Whether its samples are clips with sound."""
        return makes_sound(self)

    @property
    def sample_kind(self) -> str:
        """What its samples are, as `viditq.data.samples` keeps them."""
        return "video with sound" if self.makes_sound else self.modality

    # Pipelines --------------------------------------------------------------------------------------------------------

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def load_text_part(self, encoders: Mapping[str, nn.Module] | None = None) -> Any:
        """The pipeline without weights but its text encoders', for the CPU; `encoders` replace the stored ones."""
        if encoders is None:
            contents.check_contents(self)  # also of what is loaded later: before anything is encoded
        return compute_on_cpu(load_pipeline(self, beside_text(self) | {**(encoders or {})}))

    def load(self, denoiser: nn.Module | None = None) -> Any:
        """The pipeline without its text part, in evaluation mode; `denoiser` replaces the stored one."""
        looking = LOOKING.get(self.pipeline, ())
        absent = [name for name in self.text_parts if name not in looking]
        return load_pipeline(self, dict.fromkeys(absent) | self._as_parts(denoiser))

    def load_complete(self, denoiser: nn.Module | None = None, encoders: Mapping[str, nn.Module] | None = None) -> Any:
        """The whole pipeline, ready for `pipeline(prompt)`; `denoiser` and `encoders` replace the stored ones."""
        return load_pipeline(self, self._as_parts(denoiser) | {**(encoders or {})})

    @property
    def reads_words(self) -> bool:
        """Whether the pipeline encodes no prompts, its denoiser being told words."""
        return self.conditioning == "text" and reads_words(find_class(self.pipeline))

    @property
    def replays(self) -> bool:
        """Whether the call takes nothing of what `encode_prompt` returns, so that this is kept and given back to it."""
        return self.conditioning == "text" and not any(self.encode_outputs)

    # Denoisers --------------------------------------------------------------------------------------------------------

    @property
    def denoiser_names(self) -> list[str]:
        """The parts of the pipeline that are quantized."""
        return list(self.denoisers)

    @property
    def timestep_argument(self) -> str:
        """The argument of the denoisers' forward that holds the timestep."""
        scale = self.timestep_scale
        return str(scale.get("argument", "timestep")) if isinstance(scale, Mapping) else "timestep"

    def denoiser_of(self, pipeline: Any) -> nn.Module:
        """The denoiser of a pipeline; where it has several, an nn.ModuleDict of them: Linears are `<part>.<name>`."""
        return self._joined({name: getattr(pipeline, name) for name in self.denoiser_names})

    def float_denoisers_of(self, pipeline: Any) -> nn.ModuleDict:
        """The other denoisers of a pipeline, which are left in float on purpose."""
        return nn.ModuleDict({name: getattr(pipeline, name) for name in self.float_denoisers})

    def left_in_float_bytes(self) -> int:
        """Of the denoisers that are left in float on purpose, in 16 bits; from their config.json."""
        return sum(2 * p.numel() for p in self.build_float_denoisers().parameters())

    def build_denoiser(self) -> nn.Module:
        """The structure of `denoiser_of` from its config.json: parameters on the meta device, buffers real."""
        return self._joined({name: self._build(name) for name in self.denoiser_names})

    def build_float_denoisers(self) -> nn.ModuleDict:
        """The structure of `float_denoisers_of`, likewise."""
        return nn.ModuleDict({name: self._build(name) for name in self.float_denoisers})

    def _build(self, name: str) -> nn.Module:
        config = read_mapping(self.part_folder(name, weights=False) / "config.json", remedy=COPY_AGAIN)
        with init_empty_weights(include_buffers=False):
            denoiser: nn.Module = find_class(self.index()[name][1]).from_config(config)
        parts.check_denoiser_class(self.pipeline, name, denoiser)
        check_dispatches(self.attention, denoiser)
        return denoiser

    def _joined(self, parts: dict[str, nn.Module]) -> nn.Module:
        return nn.ModuleDict(parts) if len(parts) > 1 else parts[self.denoiser_names[0]]

    def _as_parts(self, denoiser: nn.Module | None) -> dict[str, Any]:
        if denoiser is None:
            return {}
        return dict(denoiser) if isinstance(denoiser, nn.ModuleDict) else {self.denoiser_names[0]: denoiser}

    def linear_roles(self, linear_names: Sequence[str]) -> dict[str, str]:
        """Linear name -> role, or "float" for those kept; raises UserError naming Linears that nothing covers."""
        bare = {name: self.bare_name(name) for name in linear_names}
        found = roles.of_linears(self.name, [*bare.values()], self.roles, self.keep_float, self.guess)
        found = roles.without(found, self.float_roles)
        return {name: found[bare[name]] for name in linear_names}

    def bare_name(self, name: str) -> str:
        """A Linear's name within its denoiser, which the patterns of roles and keep_float are for."""
        return name.split(".", 1)[1] if len(self.denoiser_names) > 1 else name

"""diffusers' quantizer of the method `viditq`: how its `from_pretrained` and `save_pretrained` treat QuantLinears.

config.json of a part holds a `ViditqConfig`; its weights' files are in diffusers' own layout (`stored`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.interop.register import METHOD, register
from viditq.interop.stored import Stored
from viditq.quant.artifact import check_fits
from viditq.quant.artifact_writer import dtype_name
from viditq.quant.convert import build_quantized, quantize_denoiser
from viditq.quant.correction.ptqd import NAME as CORRECTION
from viditq.quant.correction.ptqd import attach_empty
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.linear import QuantLinear, quant_linears

VERSION = 1
FOLLOWS = (
    "weight",
    "bias",
    "low_rank_up",
    "low_rank_down",
)  # of a QuantLinear: what is in the type of its float Linear


class Method(StrEnum):
    """What diffusers takes a method's name from."""

    VIDITQ = METHOD


class ViditqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a part's config.json.

    plan: a QuantPlan, what its `to_json` says, or the path of a plan.json. timestep_scale: as of a ModelAdapter.
    dtype: of the model in its pipeline; float_dtype: of its weights, where that is another. Given to `from_pretrained`
    of a float model, it is quantized as it is loaded; the plan may not need statistics then.
    Raises UserError for unknown fields and a malformed plan.
    """

    def __init__(
        self,
        plan: QuantPlan | Mapping[str, Any] | str | Path,
        timestep_scale: float | Mapping[str, Any] | None = 1000.0,
        dtype: str | None = None,
        float_dtype: str | None = None,
        format_version: int = VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if format_version != VERSION or unknown:
            what = f"format version {format_version}" if format_version != VERSION else f"the field {min(unknown)!r}"
            raise UserError(
                f"quantization_config has {what}, which this version of viditq does not know; it knows version "
                f"{VERSION}. Install the version that the model was exported with, or export it again."
            )
        self.quant_method = Method(quant_method)
        self.format_version = format_version
        self.plan: dict[str, Any] = json.loads(plan_of(plan).to_json())
        self.timestep_scale, self.dtype, self.float_dtype = timestep_scale, dtype, float_dtype

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: nothing has a default worth hiding. diffusers logs this."""
        fields: dict[str, Any] = self.to_dict()
        return fields


def plan_of(given: QuantPlan | Mapping[str, Any] | str | Path) -> QuantPlan:
    """From any form that a ViditqConfig takes."""
    if isinstance(given, QuantPlan):
        return given
    if isinstance(given, Mapping):
        return QuantPlan.from_json(json.dumps(given))
    if not Path(given).expanduser().is_file():
        raise UserError(f"plan={str(given)!r} is no file; give a QuantPlan, its fields, or the path of a plan.json")
    return QuantPlan.from_json(Path(given).expanduser().read_text())


def timestep_argument(scale: float | Mapping[str, Any] | None) -> str:
    """The argument of a denoiser's forward that holds the timestep."""
    return str(scale.get("argument", "timestep")) if isinstance(scale, Mapping) else "timestep"


class ViditqQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Swaps Linears for QuantLinears before diffusers reads the files, and makes them ready afterwards.

    Raises UserError for files that are damaged, incomplete or of another model, before anything is computed.
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False

    def __init__(self, quantization_config: ViditqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stored: Stored | None = None
        self._cast: torch.dtype | None = None  # what was asked for, where it is not the type that is recorded
        self._wide: list[str] = []
        self._layers: dict[str, QuantLinear] = {}
        self._dtypes: dict[str, str] = {}

    # Before the files are read ----------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises UserError for layers on the disk, whose codes accelerate would not bring back."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in map(str, device_map.values()):
            raise UserError(
                'device_map puts layers on "disk", from which quantized layers do not come back. Give max_memory that '
                "fits, or use viditq.load_quantized(folder, memory_budget=...), which leaves codes in their files."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """The recorded type unless another one is asked for."""
        config = self.quantization_config
        if not self.pre_quantized or config.dtype is None:
            return torch_dtype
        outer = getattr(torch, config.dtype)
        if torch_dtype not in (None, outer):
            self._cast = torch_dtype
            return torch_dtype
        recorded: torch.dtype = outer if config.float_dtype is None else getattr(torch, config.float_dtype)
        return recorded

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Reads the headers; what equals another tensor counts as loaded."""
        if self.pre_quantized:
            self._stored = Stored.of_files(map(Path, checkpoint_files))
            return [*loaded_keys, *self._stored.equal]
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        config, stored = self.quantization_config, self._stored
        self._wide = keep_in_fp32_modules or []
        if stored is None:  # a float model, which is quantized once it is there
            self.pre_quantized = False
            return
        context = build_quantized(model, plan_of(config.plan), "fake", config.timestep_scale)
        model.__dict__.pop("save_pretrained", None)  # by which other QuantLinears refuse to be saved
        self._layers = quant_linears(model)
        for name, layer in self._layers.items():
            self._dtypes[name] = stored.dtypes[name] if self._cast is None else dtype_name(self._run(f"{name}.weight"))
            for variant in layer.variants:
                variant.dtype = getattr(torch, self._dtypes[name])
        attach_empty(model, stored.state(), context)
        told = f"the files do not fit {type(model).__name__} and its plan"
        check_fits(model, stored.state(), told, "download or export it again")

    def _run(self, name: str) -> torch.dtype:
        """The type that a floating-point tensor runs in."""
        assert self._stored is not None
        parts = name.split(".")
        of_layer = name.partition(".variants.")[0] in self._layers and ".variants." in name
        fixed = CORRECTION in parts or (of_layer and parts[-1] not in FOLLOWS)
        if self._cast is None or fixed:
            return self._stored.runs(name)
        return torch.float32 if {*parts} & {*self._wide} else self._cast

    # While they are read ----------------------------------------------------------------------------------------------

    def check_if_quantized_param(self, *args: Any, **kwargs: Any) -> bool:
        """All of them are set here: diffusers has cast them by then, scales as well."""
        return self._stored is not None

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Mapping[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """As it was written, in the type that it runs in, together with what equals it."""
        assert self._stored is not None
        tensor = state_dict[param_name]
        self._stored.check(param_name, tensor)
        dtype = self._run(param_name) if tensor.is_floating_point() else tensor.dtype
        value = tensor.to(target_device or "cpu", dtype)
        same = [name for name, other in self._stored.equal.items() if other == param_name]
        for name in (param_name, *same):
            _put(model, name, value)

    # Afterwards -------------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from viditq.interop.backend import set_backend  # knows blocks of diffusers, which is being imported above
        from viditq.models.generate import DtypeBoundary

        config = self.quantization_config
        if self._stored is None:
            quantize_denoiser(model, plan_of(config.plan), None, "fake", config.timestep_scale)
            model.__dict__.pop("save_pretrained", None)
            self._dtypes = {name: dtype_name(layer.dtype) for name, layer in quant_linears(model).items()}
            config.dtype, config.float_dtype = dtype_name(model.dtype), None
        else:
            self._check_complete(model)
        model.requires_grad_(False)
        set_backend(model, "auto")
        if self._cast is not None:
            config.dtype, config.float_dtype = dtype_name(self._cast), None
        if config.float_dtype not in (None, config.dtype):
            inner, outer = getattr(torch, config.float_dtype), getattr(torch, config.dtype)
            DtypeBoundary(model, inner, outer, timestep_argument(config.timestep_scale))
        model.config.quantization_config = config
        self._stored, self._layers = None, {}

    def _check_complete(self, model: nn.Module) -> None:
        """diffusers only warns of what no file had."""
        missing = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
        if missing:
            raise UserError(f"{missing[0]} (of {len(missing)}) was in none of the model's files; export it again")

    # Saving -----------------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes; UserError for pickled files, which have no header."""
        if not safe_serialization:
            raise UserError("quantized models are saved as safetensors: leave out safe_serialization=False")
        tensors, stored = Stored.of_state(state_dict, self._dtypes)
        return tensors, stored.note()

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any) -> Any:
        from viditq.interop.dequantize import dequantize

        return dequantize(model)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[key] = value


register()

"""A model's pipeline loaded by diffusers, each part held against its files before and looked through after."""

from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from torch import nn

from viditq.errors import UserError
from viditq.memory import give_back
from viditq.models import contents
from viditq.models.attention import set_attention
from viditq.models.dtypes import DTYPES
from viditq.models.registry import find_class
from viditq.models.schedulers import chooses_scheduler, make_scheduler
from viditq.models.weight_files import COPY_AGAIN, variant_of


def load_pipeline(adapter: Any, components: Mapping[str, Any]) -> Any:
    """The pipeline of a ModelAdapter without gradients; `components` replace parts, None = left out.

    Raises UserError for files that are missing, damaged or of another model, for weights with NaN or inf, and where a
    package that the pipeline asks for is not installed.
    """
    folder = adapter.source.pipeline(weights=True)
    contents.check_contents(adapter, without=components)
    others = {name: DTYPES[dtype] for name, dtype in adapter.component_dtypes.items()}
    dtype = {"default": adapter.torch_dtype, **others} if others else adapter.torch_dtype
    try:
        cls = find_class(adapter.pipeline)
        given = {**_denoisers_elsewhere(adapter, components), **components}
        if chooses_scheduler(adapter) or adapter.call.get("sampler") is not None:
            given["scheduler"] = make_scheduler(adapter)
        marked = any(variant_of(folder / name, adapter.variant) for name in adapter.components)
        variant = adapter.variant if marked else None  # diffusers refuses one that only denoisers elsewhere have
        pipeline = cls.from_pretrained(folder, dtype=dtype, variant=variant, local_files_only=True, **given)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"The pipeline in {folder} cannot be loaded: {error}. {COPY_AGAIN}") from error
    except ImportError as error:  # Cosmos asks for cosmos_guardrail when it is made
        raise UserError(f"{adapter.pipeline} needs a package that is not installed here: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if _has_weights(component):
            contents.check_finite(name, folder, component.eval().requires_grad_(False))
        if name in (*adapter.denoisers, *adapter.float_denoisers) and _has_weights(component):
            set_attention(adapter.attention, component)
    if adapter.vae_tiling:
        pipeline.vae.enable_tiling()
    give_back()
    return pipeline


def _has_weights(component: Any) -> bool:
    return isinstance(component, nn.Module) and not any(p.is_meta for p in component.parameters())


def _denoisers_elsewhere(adapter: Any, components: Mapping[str, Any]) -> dict[str, Any]:
    """Those of denoiser_path that `components` does not replace."""
    if adapter.denoiser_path is None:
        return {}
    return {
        name: find_class(adapter.index()[name][1]).from_pretrained(
            folder, dtype=adapter.torch_dtype, variant=variant_of(folder, adapter.variant), local_files_only=True
        )
        for name, folder in ((name, adapter.part_folder(name, weights=True)) for name in adapter.denoiser_names)
        if name not in components
    }

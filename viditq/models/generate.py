"""Samples from a pipeline; the noise of a sample depends on the seed and its prompt's index alone.

Legend: B samples, F frames (1 for an image), C = 3, H, W pixels.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.models.adapter import ModelAdapter
from viditq.models.text import PromptEmbeds


def noise_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of prompt `index`: the same on every rank, device and batch size."""
    return torch.Generator("cpu").manual_seed((seed * 1_000_003 + index) % 2**63)


def _stack(embeds: list[PromptEmbeds]) -> PromptEmbeds:
    """Concatenate along the batch; all prompts of a batch must have equally long embeddings."""
    shapes = [{k: tuple(v.shape) for k, v in e.items()} for e in embeds]
    assert all(s == shapes[0] for s in shapes), "group_by_shape comes first"
    return {k: torch.cat([e[k] for e in embeds]) for k in embeds[0]}


def group_by_shape(embeds: list[PromptEmbeds]) -> list[list[int]]:
    """Positions of the prompts whose embeddings can share a batch (trimmed ones differ in length)."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for position, one in enumerate(embeds):
        groups.setdefault(tuple(tuple(v.shape) for v in one.values()), []).append(position)
    return list(groups.values())


@torch.no_grad()
def generate(adapter: ModelAdapter, pipeline: Any, embeds: list[PromptEmbeds], indices: list[int], seed: int) -> Tensor:
    """Generate one sample per prompt: uint8 [B, F, C, H, W].

    Raises UserError if a sample is not finite (which low bit-widths in float16 can cause).
    """
    samples: dict[int, Tensor] = {}
    for group in group_by_shape(embeds):
        out = _call(adapter, pipeline, [embeds[i] for i in group], [indices[i] for i in group], seed, "pt")
        clips_BFCHW = out if out.ndim == 5 else out[:, None]
        samples |= dict(zip(group, (clips_BFCHW.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu(), strict=True))
    return torch.stack([samples[i] for i in range(len(embeds))])


@torch.no_grad()
def denoise(adapter: ModelAdapter, pipeline: Any, embeds: list[PromptEmbeds], indices: list[int], seed: int) -> None:
    """Run the sampling loop without decoding: all that calibration needs."""
    for group in group_by_shape(embeds):
        _call(adapter, pipeline, [embeds[i] for i in group], [indices[i] for i in group], seed, "latent")


def with_settings(adapter: ModelAdapter, pipeline: Any) -> Any:
    """The pipeline itself, with the adapter's settings as defaults of its call: `pipeline("a prompt")` works.

    What it does to text follows `adapter.encode`: `adapter.call` is for embeddings made before.
    """
    cls = type(pipeline)
    of_text = inspect.signature(pipeline.encode_prompt).parameters
    of_call = inspect.signature(pipeline.__call__).parameters
    defaults = {k: v for k, v in _settings(adapter, pipeline).items() if k not in of_text}
    defaults |= {k: v for k, v in adapter.encode.items() if k in of_call}

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.__call__(self, *args, **defaults | kwargs)

    pipeline.__class__ = type(cls.__name__, (cls,), {"__call__": call})
    return pipeline


def _settings(adapter: ModelAdapter, pipeline: Any) -> dict[str, Any]:
    """Arguments of the pipeline's call that do not depend on the prompt."""
    settings = {**adapter.call, "num_inference_steps": adapter.num_steps, "guidance_scale": adapter.guidance_scale}
    settings |= {"height": adapter.height, "width": adapter.width}
    if adapter.modality == "video" and "num_frames" in inspect.signature(pipeline.__call__).parameters:
        settings["num_frames"] = adapter.num_frames
    return settings


def _call(
    adapter: ModelAdapter,
    pipeline: Any,
    embeds: list[PromptEmbeds],
    indices: list[int],
    seed: int,
    output: str,
) -> Tensor:
    device = next(getattr(pipeline, adapter.denoiser).parameters()).device
    arguments: dict[str, Any] = {k: v.to(device) for k, v in _stack(embeds).items()}
    if "negative_prompt_embeds" in arguments:
        arguments["negative_prompt"] = None
    try:
        out = pipeline(
            **arguments,
            **_settings(adapter, pipeline),
            generator=[noise_generator(seed, i) for i in indices],
            output_type=output,
            return_dict=False,
        )[0]
    except UserError:
        raise
    except ValueError as error:  # the pipeline's own check of sizes and steps
        raise UserError(f"{adapter.pipeline} refuses the settings of model: {error}") from error
    if not torch.isfinite(out).all():
        raise UserError(f"Samples of prompts {indices} are not finite. Use model.dtype=float32 or more bits.")
    return out


class DtypeBoundary:
    """Lets a denoiser with weights in `inner` run in a pipeline of dtype `outer`: casts its inputs and outputs.

    `denoiser.dtype` goes on saying `outer`: pipelines without a text part draw their noise in it.
    """

    def __init__(self, denoiser: nn.Module, inner: torch.dtype, outer: torch.dtype) -> None:
        self.inner, self.outer = inner, outer
        cls = type(denoiser)
        denoiser.__class__ = type(cls.__name__, (cls,), {"dtype": property(lambda _: outer)})
        denoiser.register_forward_pre_hook(self._enter, with_kwargs=True)
        denoiser.register_forward_hook(self._leave)

    def _enter(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kept = {k: v if k == "timestep" else _cast(v, self.inner) for k, v in kwargs.items()}
        return tuple(_cast(v, self.inner) for v in args), kept

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return tuple(_cast(v, self.outer) for v in output) if isinstance(output, tuple) else output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

"""Samples from a pipeline; the noise of a sample depends on the seed and its prompt's index alone.

Legend: B samples, F frames (1 for an image), C = 3, H, W pixels.
"""

import functools
import inspect
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.hooks import add_hook
from viditq.models import conditions, replay
from viditq.models.adapter import ModelAdapter
from viditq.models.batch_axis import can_be_joined, joined
from viditq.models.nudge import nudged
from viditq.models.settings import call_settings, text_settings
from viditq.models.sound import waveforms
from viditq.models.step_noise import seeded_steps
from viditq.models.text import PromptEmbeds

SIZES = ("num_frames", "height", "width")


def noise_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of prompt `index`: the same on every rank, device and batch size."""
    return torch.Generator("cpu").manual_seed((seed * 1_000_003 + index) % 2**63)


def _stack(adapter: ModelAdapter, embeds: list[PromptEmbeds]) -> PromptEmbeds:
    """Join the prompts of a batch, of equally long embeddings."""
    if len(embeds) == 1:
        return embeds[0]
    shapes = [{k: tuple(v.shape) for k, v in e.items()} for e in embeds]
    assert all(s == shapes[0] for s in shapes), "group_by_shape comes first"
    return {k: joined(adapter, k, [e[k] for e in embeds]) for k in embeds[0]}


def group_by_shape(adapter: ModelAdapter, embeds: list[PromptEmbeds]) -> list[list[int]]:
    """Positions of the prompts that can share a batch: of one length, without pictures or a call that encodes them.

    A prompt is alone where it cannot be told how others would lie beside it (`can_be_joined`).
    """
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for position, one in enumerate(embeds):
        apart = conditions.are_among(one) or replay.are_among(one)  # of several pictures few pipelines make a batch
        apart = apart or (len(embeds) > 1 and not all(can_be_joined(adapter, k, v) for k, v in one.items()))
        alone = (position,) if apart else ()
        groups.setdefault((alone, *(tuple(v.shape) for v in one.values())), []).append(position)
    return list(groups.values())


def generate(adapter: ModelAdapter, pipeline: Any, embeds: list[PromptEmbeds], indices: list[int], seed: int) -> Tensor:
    """Generate one sample per prompt: uint8 [B, F, C, H, W], where the pipeline computes; its sound is left aside.

    Raises UserError if a sample is not finite (which low bit-widths in float16 can cause).
    """
    return generate_samples(adapter, pipeline, embeds, indices, seed)[0]


@torch.no_grad()
def generate_samples(
    adapter: ModelAdapter,
    pipeline: Any,
    embeds: list[PromptEmbeds],
    indices: list[int],
    seed: int,
    nudge: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """The same with the sound of each, int16 [B, A, T] (None: the model makes none). nudge: as `nudged` takes it."""
    samples: dict[int, Tensor] = {}
    sounds: dict[int, Tensor] = {}
    heard = adapter.makes_sound
    for group in group_by_shape(adapter, embeds):
        numbers = [indices[i] for i in group]
        with nudged(pipeline, nudge, numbers):
            made = _made(adapter, pipeline, [embeds[i] for i in group], numbers, seed, "pt")
        out = made[0]
        if heard:
            sounds |= dict(zip(group, waveforms(adapter, made, len(group)), strict=True))
        clips_BFCHW = out if out.ndim == 5 else out[None] if adapter.modality == "video" else out[:, None]
        if len(clips_BFCHW) != len(group):
            raise UserError(
                f"{adapter.pipeline} makes {len(clips_BFCHW)} samples of {len(group)} prompts. Set batch_size=1 and "
                "model.calibration_batch_size=1."
            )
        _check_size(adapter, clips_BFCHW)
        samples |= dict(zip(group, (clips_BFCHW.float().clamp(0, 1) * 255).round().to(torch.uint8), strict=True))
    clips, waves = ([found[i] for i in range(len(embeds)) if i in found] for found in (samples, sounds))
    return torch.stack(clips), torch.stack(waves) if heard else None


@torch.no_grad()
def denoise(adapter: ModelAdapter, pipeline: Any, embeds: list[PromptEmbeds], indices: list[int], seed: int) -> None:
    """Run the sampling loop without decoding: all that calibration needs."""
    for group in group_by_shape(adapter, embeds):
        _call(adapter, pipeline, [embeds[i] for i in group], [indices[i] for i in group], seed, "latent")


def with_settings(adapter: ModelAdapter, pipeline: Any) -> Any:
    """The pipeline itself, with the adapter's settings as defaults of its call: `pipeline("a prompt")` works.

    What it does to text follows `adapter.encode`: `adapter.call` is for embeddings made before.
    """
    cls, defaults = type(pipeline), text_settings(adapter, pipeline)
    has_prompt = "prompt" in inspect.signature(cls.__call__).parameters

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if has_prompt and len(args) == 1 and isinstance(args[0], str):  # FLUX.2's and Kontext's first is the image
            return cls.__call__(self, prompt=args[0], **defaults | kwargs)
        return cls.__call__(self, *args, **defaults | kwargs)

    pipeline.__class__ = type(cls.__name__, (cls,), {"__call__": call})
    return pipeline


def _call(
    adapter: ModelAdapter, pipeline: Any, embeds: list[PromptEmbeds], indices: list[int], seed: int, output: str
) -> Tensor:
    """The samples alone."""
    samples: Tensor = _made(adapter, pipeline, embeds, indices, seed, output)[0]
    return samples


def _made(
    adapter: ModelAdapter,
    pipeline: Any,
    embeds: list[PromptEmbeds],
    indices: list[int],
    seed: int,
    output: str,
) -> tuple[Any, ...]:
    """What the pipeline returns: the samples as a tensor, which are finite, and whatever it makes beside them."""
    if output == "pt" and not hasattr(pipeline, "vae"):  # PRX in pixels hands on "pt" as it was denoised, from -1 to 1
        output = "np"
    device = pipeline._execution_device  # not that of the weights, which may be offloaded
    stacked = {k: v.to(device) for k, v in _stack(adapter, embeds).items()}
    generators = [noise_generator(seed, i) for i in indices]
    try:
        with _prompted(adapter, pipeline, stacked) as arguments, seeded_steps(pipeline, generators):
            out = pipeline(
                **arguments,
                generator=generators[0] if len(generators) == 1 else generators,  # some take no list, not even of one
                output_type=output,
                return_dict=False,
            )
    except UserError:
        raise
    except ValueError as error:  # the pipeline's own check of sizes and steps
        if len(generators) > 1 and "list of generators" in str(error):
            raise UserError(
                f"{adapter.pipeline} samples one prompt at a time ({error}). Set batch_size=1 and "
                "model.calibration_batch_size=1."
            ) from error
        raise UserError(f"{adapter.pipeline} refuses the settings of model: {error}") from error
    except (AttributeError, TypeError) as error:
        if adapter.negative_prompt is None and _raised_in(error, "encode_prompt"):
            raise UserError(
                f"{adapter.pipeline} encodes a negative prompt of its own while it samples, without text encoders. "
                'Give one that is encoded with the prompts: model.negative_prompt="" or what its model card says.'
            ) from error
        raise
    except IndexError as error:
        if adapter.num_steps > 1:
            raise
        raise UserError(
            f"{adapter.pipeline} does not sample in a single step with its scheduler; set model.num_steps to 2 or more."
        ) from error
    except RuntimeError as error:
        unknown = [f"model.{key}" for key in SIZES if getattr(adapter, key) is None]
        if not adapter.guess or not unknown or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"{adapter.pipeline} fails while sampling ({error}). It was run at its own sizes, which can differ from "
            f"those that these weights were trained at; give {', '.join(unknown)}."
        ) from error
    samples = _as_tensor(out[0])
    if not torch.isfinite(samples).all():
        raise UserError(f"Samples of prompts {indices} are not finite. Use model.dtype=float32 or more bits.")
    return (samples, *out[1:])


@contextmanager
def _prompted(adapter: ModelAdapter, pipeline: Any, stacked: PromptEmbeds) -> Iterator[dict[str, Any]]:
    """The prompts and the model's settings, as the call takes them."""
    pictures = conditions.given(adapter, stacked)
    if adapter.replays:
        with replay.given_back(pipeline, stacked) as prompt:
            yield prompt | pictures | text_settings(adapter, pipeline)
        return
    arguments = _arguments(adapter, conditions.without(stacked)) | pictures
    if "negative_prompt_embeds" in arguments and "negative_prompt" in inspect.signature(pipeline.__call__).parameters:
        arguments["negative_prompt"] = None
    yield arguments | call_settings(adapter, pipeline)


def _raised_in(error: BaseException, function: str) -> bool:
    """Whether a function of this name was running when the error was raised."""
    return any(frame.f_code.co_name == function for frame, _ in traceback.walk_tb(error.__traceback__))


def _arguments(adapter: ModelAdapter, stacked: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the call takes: tensors, or lists of one tensor a prompt; labels are plain numbers."""
    if adapter.conditioning == "class":
        return {k: v.tolist() for k, v in stacked.items()}
    return {k: list(v) if adapter.list_embeds else v for k, v in stacked.items()}


def _as_tensor(out: Any) -> Tensor:
    """Images or clips with channels before height and width; a pipeline without output_type=pt gives them last."""
    if isinstance(out, np.ndarray):
        return torch.from_numpy(out).movedim(-1, -3)
    assert isinstance(out, Tensor), type(out)
    return out


def _check_size(adapter: ModelAdapter, clips_BFCHW: Tensor) -> None:
    """Raises UserError if the pipeline made another size than was asked for (some round, one has a fixed size)."""
    _, num_frames, _, height, width = clips_BFCHW.shape
    made = dict(zip(SIZES, (num_frames, height, width), strict=True))
    differing = [key for key, value in made.items() if getattr(adapter, key) not in (None, value)]
    if differing:
        sizes = " ".join(f"model.{key}={made[key]}" for key in differing)
        given = ", ".join(f"{key}={getattr(adapter, key)}" for key in differing)
        raise UserError(f"{adapter.pipeline} does not make samples of {given}; those it makes have {sizes}.")


class DtypeBoundary:
    """Lets a denoiser with weights in `inner` run in a pipeline of dtype `outer`: casts its inputs and outputs.

    `denoiser.dtype` goes on saying `outer`: pipelines without a text part draw their noise in it. An nn.ModuleDict is
    crossed part by part. timestep: the argument that stays as it is.
    """

    def __init__(self, denoiser: nn.Module, inner: torch.dtype, outer: torch.dtype, timestep: str = "timestep") -> None:
        self.inner, self.outer = inner, outer
        for part in denoiser.values() if isinstance(denoiser, nn.ModuleDict) else [denoiser]:
            arguments = list(inspect.signature(part.forward).parameters)
            cls: Any = type(part)
            part.__class__ = _saying(cls, outer)
            enter = functools.partial(self._enter, arguments, timestep)
            add_hook(part.register_forward_pre_hook, enter, with_kwargs=True)
            add_hook(part.register_forward_hook, self._leave)

    def _enter(
        self, names: list[str], timestep: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kept = {k: v if k == timestep else _cast(v, self.inner) for k, v in kwargs.items()}
        named = zip(names, args, strict=False)
        return tuple(v if name == timestep else _cast(v, self.inner) for name, v in named), kept

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(_cast(v, self.outer) for v in output)
        if isinstance(getattr(output, "sample", None), Tensor):
            output.sample = _cast(output.sample, self.outer)
        return output


@functools.cache
def _saying(cls: Any, dtype: torch.dtype) -> Any:
    """A class like `cls` but for its `dtype`; made again, and not looked up, where one of its objects is unpickled."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _new_saying, (cls, dtype), object.__reduce_ex__(self, protocol)[2]

    return type(cls.__name__, (cls,), {"dtype": property(lambda _: dtype), "__reduce_ex__": reduce})


def _new_saying(cls: Any, dtype: torch.dtype) -> Any:
    made = _saying(cls, dtype)
    return made.__new__(made)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):  # one tensor a sample; tuples hold positions, which stay as they are
        return [_cast(v, dtype) for v in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

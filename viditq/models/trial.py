"""One call of a model's pipeline without weights, text or decoding: which steps it takes, and what it tells denoisers.

Everything but the scheduler and the pipeline's own code is a stand-in, so that it takes a second, whatever the model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.models import conditions
from viditq.models.made_up_text import NUM_TOKENS, Returned, embeddings, handed_on, marks_in
from viditq.models.registry import find_class
from viditq.models.settings import call_settings
from viditq.models.stand_ins import (
    CPU,
    Unchecked,
    compute_on_cpu,
    pass_on,
    stand_in,
    stand_in_encoders,
    stand_in_sketch,
)

NUM_REAL = 2  # steps that the scheduler computes; then the sample stays as it is, which can be large
TIMESTEPS = ("timestep", "t", "timesteps", "time")
"""What denoisers call the argument that tells them the noise level."""


class _AllSteps(Exception):
    """What was to be recorded is; denoising, or decoding, comes next."""


class TrialError(Exception):
    """The pipeline fails, and how."""


@dataclass(frozen=True)
class Step:
    """told: what `denoiser` was given as `argument`. level: the scheduler's timestep, as a share of those trained on;
    where it rises from step to step (a model that counts backwards), 1 less that."""

    argument: str
    told: float
    level: float
    denoiser: str = ""


def try_out(adapter: Any, scheduler: Any, num_steps: int | None = None) -> list[Step]:
    """One step for each call of a denoiser, in order. num_steps: None = the model's own.

    Raises TrialError where the pipeline cannot sample so, UserError where files of the model are missing or damaged.
    """
    try:
        with torch.no_grad():
            steps = _steps(adapter, scheduler, {"num_inference_steps": num_steps or adapter.num_steps})
        if not steps:
            raise ValueError("it calls no denoiser before a step of its scheduler")
        return _in_order(steps)
    except UserError:
        raise
    except Exception as error:  # whatever a pipeline's own code raises says that it does not sample so
        raise TrialError(f"{type(error).__name__}: {error}") from error


def encoded_texts(adapter: Any, scheduler: Any) -> list[Any]:
    """What one call of the pipeline, given a prompt, hands to `encode_prompt`, call by call, until it denoises."""
    recorder = _Recorder(adapter, scheduler, text_only=True)
    with suppress(Exception), torch.no_grad():  # whether it samples so is another question (`try_out`)
        _run(adapter, scheduler, {"num_inference_steps": adapter.num_steps}, recorder)
    return recorder.texts


def returned_text(adapter: Any) -> list[Returned] | None:
    """What `encode_prompt` returns, measured on itself; None where it takes no embeddings that were made before."""
    try:
        pipeline = _assembled(adapter, {})
    except Exception:  # whether it can be assembled is another question (`try_out`)
        return None
    for name in adapter.text_parts:
        setattr(pipeline, name, SimpleNamespace(dtype=adapter.torch_dtype, device=CPU))  # all that they are asked for
    return handed_on(pipeline, adapter.encode)


def text_arguments(adapter: Any, scheduler: Any) -> dict[str, list[int]]:
    """Argument of the denoisers -> which of what `encode_prompt` returns it is told, in one call of the pipeline."""
    recorder = _Recorder(adapter, scheduler, marked=True)
    with suppress(Exception), torch.no_grad():  # as in `encoded_texts`
        _run(adapter, scheduler, {"num_inference_steps": adapter.num_steps}, recorder)
    return {name: sorted(found) for name, found in recorder.carried.items() if found}


def shown_pictures(adapter: Any, scheduler: Any, prompts: Sequence[str]) -> list[Tensor | None]:
    """What the pipeline shows its VAE first of each prompt's pictures, as it resizes them: float [C, H, W] in [0, 1].

    None where it shows it nothing before it denoises. Raises TrialError where the call fails before.
    """
    found: list[Tensor | None] = []
    recorder = _Recorder(adapter, scheduler, text_only=True)
    pipeline = _recorded(adapter, scheduler, recorder)
    for prompt in prompts:
        recorder.encoded.clear()
        try:
            with torch.no_grad():
                _call(adapter, pipeline, conditions.given(conditions.stored(prompt)), {})
        except Exception as error:  # as in `try_out`
            raise TrialError(f"{type(error).__name__}: {error}") from error
        first = recorder.encoded[0] if recorder.encoded else None
        found.append(None if first is None else (first if first.ndim == 4 else first[:, :, 0])[0].float() / 2 + 0.5)
    return found


def _steps(adapter: Any, scheduler: Any, settings: dict[str, Any]) -> list[Step]:
    recorder = _Recorder(adapter, scheduler)
    _run(adapter, scheduler, settings, recorder)
    lows, highs = ([pair[i] for pair in recorder.ranges] for i in range(2))
    varying = max(lows, highs, key=lambda values: max(values, default=0.0) - min(values, default=0.0))
    return [replace(step, told=told) for step, told in zip(recorder.steps, varying, strict=True)]


def _run(adapter: Any, scheduler: Any, settings: dict[str, Any], recorder: _Recorder) -> None:
    pictures = {} if adapter.conditioning == "class" else conditions.made_up(adapter)
    _call(adapter, _recorded(adapter, scheduler, recorder), pictures, settings)


def _recorded(adapter: Any, scheduler: Any, recorder: _Recorder) -> Any:
    """A pipeline of stand-ins whose calls the recorder takes note of."""
    joined = adapter.build_denoiser()
    denoisers = dict(joined) if isinstance(joined, nn.ModuleDict) else {adapter.denoiser_names[0]: joined}
    for name, denoiser in denoisers.items():
        denoiser.forward = recorder.around(denoiser, name)
    scheduler.step = recorder.step(scheduler.step)
    pipeline = _assembled(adapter, {**denoisers, "scheduler": scheduler})
    if adapter.conditioning != "class":
        pipeline.encode_prompt = recorder.encode(pipeline.encode_prompt)
        stand_in_encoders(pipeline, recorder.encoded)
        stand_in_sketch(pipeline)
    return pipeline


def _call(adapter: Any, pipeline: Any, pictures: dict[str, Any], settings: dict[str, Any]) -> None:
    prompt: dict[str, Any] = {"class_labels": [0]} if adapter.conditioning == "class" else {"prompt": "a"}
    # a scheduler that lists a timestep more than it steps does not end the call: nothing is there to decode with
    settings = {**call_settings(adapter, pipeline), **settings, "output_type": "latent"}
    with suppress(_AllSteps):
        pipeline(**prompt, **pictures, **settings, generator=torch.Generator().manual_seed(0), return_dict=False)


def _assembled(adapter: Any, parts: dict[str, Any]) -> Any:
    """The pipeline of these parts; other models are empty, or absent where transformers has their class."""
    for name, value in adapter.index().items():
        if name in parts or not isinstance(value, list) or value[0] is None:
            continue
        if value[0] == "transformers" or name.startswith("tokenizer"):
            parts[name] = None
            continue
        model = stand_in(adapter, name)
        if model is not None:
            parts[name] = pass_on(model)
    cls = find_class(adapter.pipeline)
    if "safety_checker" in inspect.signature(cls.__init__).parameters:  # else it makes one, with weights of its own
        parts["safety_checker"] = Unchecked()
    load = functools.partial(cls.from_pretrained, adapter.folder, local_files_only=True)
    try:
        pipeline = load(**parts)
    except AttributeError:  # some ask their processor for its template when they are made
        pipeline = load(**{name: part for name, part in parts.items() if not name.endswith("processor")})
    pipeline.set_progress_bar_config(disable=True)
    return compute_on_cpu(pipeline)


class _Recorder:
    """What denoisers are told between the scheduler's steps, and which texts are encoded before.

    ranges: of each step the lowest and the highest value told; they differ where tokens that are given (a first frame)
    are told that they are clean, which is the same at every step. encoded: what the VAE is shown.
    text_only: the call ends where it begins to denoise. marked: embeddings are known again where denoisers get them;
    carried: argument of a denoiser -> which of what `encode_prompt` returns it is told.
    """

    def __init__(self, adapter: Any, scheduler: Any, text_only: bool = False, marked: bool = False) -> None:
        self.adapter, self.scheduler, self.text_only, self.marked = adapter, scheduler, text_only, marked
        self.carried: dict[str, set[int]] = {}
        self.texts: list[Any] = []
        self.encoded: list[Tensor] = []
        self.num_train = float(scheduler.config.get("num_train_timesteps", 1000))
        self.told: list[tuple[str, str, tuple[float, float]]] = []
        self.steps: list[Step] = []
        self.ranges: list[tuple[float, float]] = []
        self.count = 0
        self.width = NUM_TOKENS
        self.returned = 1  # values of a step: SCM's also gives what it predicts to be clean

    def encode(self, plain: Any) -> Any:
        """In place of `encode_prompt`."""
        signature = inspect.signature(plain)

        @functools.wraps(plain)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.texts.append(signature.bind(*args, **kwargs).arguments.get("prompt"))
            made = embeddings(self.adapter, marked=self.marked, width=self.width)
            return made if len(made) > 1 else made[0]

        return recorded

    def around(self, denoiser: Any, name: str) -> Any:
        """In place of its forward: takes note, and predicts nothing."""
        forward = denoiser.forward
        signature = inspect.signature(forward)
        argument, beside = _argument(self.adapter, signature), _streams(signature)[1:]
        self.width = denoiser.config.get("text_in_dim", NUM_TOKENS)

        @functools.wraps(forward)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self.text_only:
                raise _AllSteps
            given = signature.bind(*args, **kwargs).arguments
            self.told.append((name, argument, _range(given[argument])))
            if self.marked:
                count = len(self.adapter.encode_outputs)
                self.carried |= {n: self.carried.get(n, set()).union(marks_in(v, count)) for n, v in given.items()}
            out = _prediction(next(iter(given.values())), denoiser.config)
            if given.get("return_dict") is not False:
                return Transformer2DModelOutput(sample=out)
            return (out, *(torch.zeros_like(given[name]) for name in beside if given.get(name) is not None))

        return recorded

    def step(self, plain: Any) -> Any:
        """In place of the scheduler's step."""
        signature = inspect.signature(plain)

        @functools.wraps(plain)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            if not self.told:  # of a copy of the scheduler: another stream's, after the same call of the denoiser
                return (given["sample"],) if given.get("return_dict") is False else _Stepped(given["sample"])
            level = float(given["timestep"]) / self.num_train
            self.steps += [Step(argument, told[1], level, name) for name, argument, told in self.told]
            self.ranges += [told for _, _, told in self.told]
            self.told = []
            self.count += 1
            sample, out = given["sample"], given["model_output"]
            plainly = given.get("return_dict") is False
            if self.count <= NUM_REAL:
                if out.ndim == 3 or out.shape[2:] != sample.shape[2:]:  # of a denoiser that sees more than it predicts
                    given["model_output"] = torch.zeros_like(sample)
                if widened := getattr(self.scheduler, "n_grid", None):  # Piflow: several predictions side by side
                    given["model_output"] = sample.new_zeros(*sample.shape[:-1], widened * sample.shape[-1])
                stepped = plain(**given)
                self.returned = len(stepped) if plainly else 1
            else:
                stepped = (sample,) * self.returned if plainly else _Stepped(sample)
            if self.count == len(self.scheduler.timesteps):
                raise _AllSteps
            return stepped

        return recorded


@dataclass
class _Stepped:
    """What schedulers return with return_dict=True."""

    prev_sample: Any


def _argument(adapter: Any, signature: inspect.Signature) -> str:
    names = [adapter.timestep_argument, *TIMESTEPS]
    found = next((name for name in names if name in signature.parameters), None)
    if found is None:
        raise ValueError(f"its denoiser takes none of {', '.join(names)}")
    return found


def _streams(signature: inspect.Signature) -> list[str]:
    """The arguments that hold what is denoised: the sample, and what is made beside it (LTX-2's sound)."""
    names = [name for name, p in signature.parameters.items() if p.default is p.empty or name.startswith("audio")]
    return [name for name in names if name.endswith("hidden_states") and "encoder" not in name]


def _range(value: Any) -> tuple[float, float]:
    """The lowest and the highest; between them there is nothing in a model that samples all tokens in step."""
    values = torch.as_tensor(value, dtype=torch.float64).unique()
    if len(values) > 2:
        raise ValueError("its denoiser is told several timesteps at once")
    return float(values[0]), float(values[-1])


def _prediction(x: Any, config: Any) -> Any:
    """Zeros as large as the denoiser's output: its input, of latents with `out_channels` for `in_channels`."""
    if isinstance(x, (list, tuple)):
        return [_prediction(one, config) for one in x]
    shape, (before, after) = list(x.shape), (config.get("in_channels"), config.get("out_channels"))
    if len(shape) > 3 and isinstance(after, int) and before in shape[1:]:
        shape[shape.index(before, 1)] = after
    out: Tensor = x.new_zeros(shape)
    return out


def _in_order(steps: list[Step]) -> list[Step]:
    """Sampling goes from noise to none: where the scheduler counts up, it counts what is clean."""
    if steps and steps[0].level < steps[-1].level:
        return [replace(step, level=1 - step.level) for step in steps]
    return steps

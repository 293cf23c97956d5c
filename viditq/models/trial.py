"""One call of a model's pipeline without weights, text or decoding: which steps it takes, and what it tells denoisers.

Everything but the scheduler and the pipeline's own code is a stand-in, so that it takes a second, whatever the model.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.models import conditions
from viditq.models.made_up_text import Returned, embeddings, handed_on
from viditq.models.particular import TEXTS, steps_setting
from viditq.models.recorder import AllSteps, Recorder, Step
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


class TrialError(Exception):
    """The pipeline fails, and how."""


def try_out(adapter: Any, scheduler: Any, num_steps: int | None = None) -> list[Step]:
    """One step for each call of a denoiser, in order. num_steps: None = the model's own.

    Raises TrialError where the pipeline cannot sample so, UserError where files of the model are missing or damaged.
    """
    try:
        with torch.no_grad():
            steps = _steps(adapter, scheduler, _told(adapter, num_steps))
        if not steps:
            raise ValueError("it calls no denoiser before a step of its scheduler")
        return _in_order(steps)
    except UserError:
        raise
    except Exception as error:  # whatever a pipeline's own code raises says that it does not sample so
        raise TrialError(f"{type(error).__name__}: {error}") from error


def encoded_texts(adapter: Any, scheduler: Any) -> list[dict[str, Any]]:
    """What one call of the pipeline, given a prompt, tells `encode_prompt`, call by call, until it denoises."""
    recorder = Recorder(adapter, scheduler, text_only=True)
    with suppress(Exception), torch.no_grad():  # whether it samples so is another question (`try_out`)
        _run(adapter, scheduler, _told(adapter), recorder)
    return recorder.texts


def returned_text(adapter: Any) -> list[Returned] | None:
    """What `encode_prompt` returns, measured on itself; None where it takes no embeddings that were made before."""
    try:
        pipeline = _assembled(adapter, {})
    except Exception:  # whether it can be assembled is another question (`try_out`)
        return None
    for name in adapter.text_parts:
        stub = SimpleNamespace(dtype=adapter.torch_dtype, device=CPU)  # all that they are asked for
        object.__setattr__(pipeline, name, stub)  # the pipeline's own way looks for its library
    return handed_on(pipeline, adapter.encode)


def text_arguments(adapter: Any, scheduler: Any, given: bool = False) -> dict[str, list[int]]:
    """Argument of the denoisers -> which of what `encode_prompt` returns it is told, in one call of the pipeline.

    given: the call gets these as arguments, named by `encode_outputs`, and no text.
    """
    recorder = Recorder(adapter, scheduler, marked=True, given=given)
    with suppress(Exception), torch.no_grad():  # as in `encoded_texts`
        _run(adapter, scheduler, _told(adapter), recorder)
    return {name: sorted(found) for name, found in recorder.carried.items() if found}


def confirmed_text(adapter: Any, scheduler: Any) -> list[int]:
    """Which of what `encode_prompt` returns reaches the same arguments of the denoisers through the call's argument.

    That is, by its name in `encode_outputs`: so it is measured of pipelines whose `encode_prompt` takes no embeddings.
    """
    encoded, given = (text_arguments(adapter, scheduler, given=given) for given in (False, True))
    reached = {place for places in encoded.values() for place in places}
    return [i for i in sorted(reached) if all((i in v) == (i in given.get(k, ())) for k, v in encoded.items())]


def samples_from(adapter: Any, scheduler: Any, given: bool) -> bool:
    """Whether the call samples from a prompt, or, given, from what `encode_prompt` returns, by `encode_outputs`."""
    recorder = Recorder(adapter, scheduler, text_only=True, given=given, honest=given)
    try:
        with torch.no_grad():
            _run(adapter, scheduler, _told(adapter), recorder)
    except Exception:  # whatever a pipeline's own code raises says that it does not
        return False
    return True


def shown_pictures(adapter: Any, scheduler: Any, prompts: Sequence[str]) -> list[Tensor | None]:
    """What the pipeline shows its VAE first of each prompt's pictures, as it resizes them: float [C, H, W] in [0, 1].

    None where it shows it nothing before it denoises. Raises TrialError where the call fails before.
    """
    found: list[Tensor | None] = []
    recorder = Recorder(adapter, scheduler, text_only=True)
    pipeline = _recorded(adapter, scheduler, recorder)
    for prompt in prompts:
        recorder.encoded.clear()
        try:
            with torch.no_grad():
                _call(adapter, pipeline, conditions.given(adapter, conditions.stored(prompt)), {})
        except Exception as error:  # as in `try_out`
            raise TrialError(f"{type(error).__name__}: {error}") from error
        first = recorder.encoded[0] if recorder.encoded else None
        found.append(None if first is None else (first if first.ndim == 4 else first[:, :, 0])[0].float() / 2 + 0.5)
    return found


def _told(adapter: Any, num_steps: int | None = None) -> dict[str, Any]:
    return steps_setting(adapter.pipeline, num_steps or adapter.num_steps, adapter.call)


def _steps(adapter: Any, scheduler: Any, settings: dict[str, Any]) -> list[Step]:
    spare = copy.deepcopy(scheduler)
    try:
        recorder = _record(adapter, scheduler, settings)
    except UserError:
        raise
    except Exception as error:  # settings may ask for more pictures than the call as such (Wan Animate's mode=replace)
        if not adapter.conditions:
            raise
        try:
            recorder = _record(adapter, spare, settings, every=True)
        except Exception:
            raise error from None
    lows, highs = ([pair[i] for pair in recorder.ranges] for i in range(2))
    varying = max(lows, highs, key=lambda values: max(values, default=0.0) - min(values, default=0.0))
    return [replace(step, told=told) for step, told in zip(recorder.steps, varying, strict=True)]


def _record(adapter: Any, scheduler: Any, settings: dict[str, Any], every: bool = False) -> Recorder:
    recorder = Recorder(adapter, scheduler)
    _run(adapter, scheduler, settings, recorder, every)
    return recorder


def _run(adapter: Any, scheduler: Any, settings: dict[str, Any], recorder: Recorder, every: bool = False) -> None:
    pictures = {} if adapter.conditioning == "class" else conditions.made_up(adapter, every)
    pipeline = _recorded(adapter, scheduler, recorder)
    made = embeddings(adapter, marked=True, width=recorder.width) if recorder.given else ()
    embeds = {name: value for name, value in zip(adapter.encode_outputs, made, strict=False) if name is not None}
    _call(adapter, pipeline, pictures, settings, embeds)


def _recorded(adapter: Any, scheduler: Any, recorder: Recorder) -> Any:
    """A pipeline of stand-ins whose calls the recorder takes note of."""
    joined = adapter.build_denoiser()
    denoisers = dict(joined) if isinstance(joined, nn.ModuleDict) else {adapter.denoiser_names[0]: joined}
    for name, denoiser in denoisers.items():
        denoiser.forward = recorder.around(denoiser, name)
    scheduler.step = recorder.step(scheduler.step)
    pipeline = _assembled(adapter, {**denoisers, "scheduler": scheduler})
    if adapter.conditioning != "class":
        for name in conditions.encoders_of(pipeline):
            setattr(pipeline, name, recorder.encode(getattr(pipeline, name)))
        stand_in_encoders(pipeline, recorder.encoded)
        stand_in_sketch(pipeline)
    return pipeline


def _call(
    adapter: Any,
    pipeline: Any,
    pictures: dict[str, Any],
    settings: dict[str, Any],
    embeds: dict[str, Any] | None = None,
) -> None:
    text = TEXTS.get(adapter.pipeline, "a")
    prompt: dict[str, Any] = {"class_labels": [0]} if adapter.conditioning == "class" else {"prompt": text}
    prompt = embeds or prompt
    # a scheduler that lists a timestep more than it steps does not end the call: nothing is there to decode with
    settings = {**call_settings(adapter, pipeline), **settings, "output_type": "latent"}
    with suppress(AllSteps):
        pipeline(**prompt, **pictures, **settings, generator=torch.Generator().manual_seed(0), return_dict=False)


def _assembled(adapter: Any, parts: dict[str, Any]) -> Any:
    """The pipeline of these parts; other models are empty, or absent where transformers has their class."""
    for name, value in adapter.index().items():
        if name in parts or not isinstance(value, list) or value[0] is None:
            continue
        if (value[0] == "transformers" or name.startswith("tokenizer")) and not adapter.reads_words:
            parts[name] = None
            continue
        model = stand_in(adapter, name)
        if model is not None:
            parts[name] = pass_on(model)
    cls = find_class(adapter.pipeline)
    asked = inspect.signature(cls.__init__).parameters
    if "safety_checker" in asked:  # else Cosmos makes one, with weights of its own; the older ones do without
        parts["safety_checker"] = None if "requires_safety_checker" in asked else Unchecked()
    load = functools.partial(cls.from_pretrained, adapter.folder, local_files_only=True)
    try:
        pipeline = load(**parts)
    except AttributeError:  # some ask their processor for its template when they are made
        pipeline = load(**{name: part for name, part in parts.items() if not name.endswith("processor")})
    pipeline.set_progress_bar_config(disable=True)
    return compute_on_cpu(pipeline)


def _in_order(steps: list[Step]) -> list[Step]:
    """Sampling goes from noise to none: where the scheduler counts up, it counts what is clean."""
    if steps and steps[0].level < steps[-1].level:
        return [replace(step, level=1 - step.level) for step in steps]
    return steps

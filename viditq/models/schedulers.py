"""Which scheduler a pipeline samples with, and whether its steps add noise of their own."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from viditq.errors import UserError
from viditq.models.modular import MADE
from viditq.models.registry import find_class
from viditq.models.samplers import make_sampler
from viditq.models.trial import TrialError, try_out

SETTING = "model.scheduler_settings"
DETERMINISTIC = {
    *("DDIMScheduler", "CogVideoXDDIMScheduler"),  # with eta = 0
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),  # but for the sde algorithms
    *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("DEISMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "IPNDMScheduler"),
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),  # but for stochastic_sampling
    "PiflowScheduler",
}


def build_scheduler(
    folder: Path, stored: str, name: str | None, settings: Mapping[str, Any], made: Mapping[str, Any] | None = None
) -> Any:
    """The scheduler in `folder`/scheduler, of class `stored`, or of class `name` with its settings and `settings`.

    made: its settings, where there is no such folder.
    Raises UserError for a class or a setting that does not exist, and for one that cannot sample this model.
    """
    found = getattr(diffusers, name or stored, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.SchedulerMixin)):
        raise UserError(f"model.scheduler={name!r} is no scheduler of diffusers {diffusers.__version__}.")
    cls: Any = found
    known = [key for key in inspect.signature(cls.__init__).parameters if key != "self"]
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(f"{SETTING}.{unknown[0]}: {cls.__name__} has no such setting. It has {', '.join(known)}.")
    config = made
    if config is None:
        config = getattr(diffusers, stored).load_config(folder, subfolder="scheduler", local_files_only=True)
    try:
        return cls.from_config({**config, **settings})
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{cls.__name__} refuses its settings ({SETTING}): {error}") from error


def check_samples(adapter: Any, stored: str) -> None:
    """Raises UserError if the pipeline cannot sample with a scheduler that the user chose (a try-out says so).

    stored: class of its own one. A pipeline that cannot be tried out with that either is left to say so itself.
    """
    scheduler = make_scheduler(adapter)
    try:
        try_out(adapter, scheduler)
    except TrialError as error:
        try:
            try_out(adapter, build_scheduler(adapter.folder, stored, None, {}, _made(adapter)))
        except TrialError:
            return
        raise UserError(
            f"{type(scheduler).__name__} cannot sample this model: {error}. Choose another model.scheduler, or other "
            f"{SETTING}."
        ) from error


def adds_noise(scheduler: Any, call: Mapping[str, Any]) -> bool:
    """Whether its steps draw noise, for all that is known of it. call: arguments of the pipeline's call (eta)."""
    config = scheduler.config
    return bool(
        type(scheduler).__name__ not in DETERMINISTIC
        or str(config.get("algorithm_type", "")).startswith("sde")
        or config.get("stochastic_sampling", False)
        or ("eta" in inspect.signature(scheduler.step).parameters and call.get("eta", 0))
    )


def takes_generator(scheduler: Any) -> bool:
    """Whether its steps can be told where to draw their noise from."""
    return scheduler is not None and "generator" in inspect.signature(scheduler.step).parameters


def check_seeded(pipeline: type, scheduler: Any, call: Mapping[str, Any]) -> None:
    """Raises UserError where steps add noise that cannot be seeded: samples were not repeatable."""
    passed_on = hasattr(pipeline, "prepare_extra_step_kwargs") or takes_generator(scheduler)
    if adds_noise(scheduler, call) and not passed_on:
        raise UserError(
            f"{type(scheduler).__name__} adds noise in its steps and takes no generator there, so that no run could be "
            "repeated. Choose a deterministic model.scheduler."
        )


def chooses_scheduler(adapter: Any) -> bool:
    """Whether another scheduler is asked for than the stored one, or other settings of it."""
    return adapter.scheduler is not None or bool(adapter.scheduler_settings)


def check_scheduler(adapter: Any) -> None:
    """Raises UserError for a chosen scheduler that cannot sample this model, or not with its noise."""
    if not chooses_scheduler(adapter):
        return
    if adapter.call.get("sampler") is not None:
        raise UserError(
            f"model.scheduler: model.call.sampler={adapter.call['sampler']} chooses the scheduler already. "
            "Leave out model.scheduler, or set model.call.sampler=null."
        )
    scheduler = make_scheduler(adapter)
    check_samples(adapter, adapter.index()["scheduler"][1])
    check_seeded(find_class(adapter.pipeline), scheduler, adapter.call)


def make_scheduler(adapter: Any) -> Any:
    """The scheduler that samples; raises UserError if the pipeline has none of its own."""
    if adapter.call.get("sampler") is not None:
        return make_sampler(adapter.call["sampler"])
    entry = adapter.index().get("scheduler")
    if not isinstance(entry, list) or entry[1] is None:
        raise UserError(f"The pipeline in {adapter.folder} has no scheduler.")
    return build_scheduler(adapter.folder, entry[1], adapter.scheduler, adapter.scheduler_settings, _made(adapter))


def _made(adapter: Any) -> Mapping[str, Any] | None:
    """Settings of a scheduler that a modular pipeline makes itself."""
    found: Mapping[str, Any] | None = adapter.index().get(MADE, {}).get("scheduler")
    return found

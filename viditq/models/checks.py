"""Checks of a model's description that need none of its files."""

from typing import Any

import torch

from viditq.errors import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHOICES = {"modality": ("image", "video"), "conditioning": ("text", "class")}
COUNTS = ("num_steps", "num_frames", "height", "width", "max_tokens", "fps")
OPTIONAL = ("num_frames", "height", "width", "max_tokens", "guidance_scale")
GUESSED = ("pipeline", "modality", "encode_outputs", "denoisers", "timestep_scale")


def check_values(model: Any) -> None:
    """Raises UserError for the first field of a ModelAdapter whose value is not allowed."""
    for key in GUESSED:
        text_only = key == "encode_outputs" and model.conditioning != "text"
        if getattr(model, key) is None and not model.guess and not text_only:
            raise UserError(f"model.{key} has no value. Give one: model.{key}=...")
    for key, dtype in {"dtype": model.dtype, **{f"component_dtypes.{k}": v for k, v in _dtypes(model)}}.items():
        if dtype not in DTYPES:
            raise UserError(f"model.{key}={dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    for key, allowed in CHOICES.items():
        value = getattr(model, key)
        if value not in allowed and not (value is None and model.guess):
            raise UserError(f"model.{key}={value!r} is unknown; choose {' or '.join(allowed)}.")
    if not isinstance(model.compile, bool):
        raise UserError(f"model.compile={model.compile!r} must be true or false.")
    for key in COUNTS:
        _check_number(key, getattr(model, key), whole=True, lowest=1)
    _check_number("guidance_scale", model.guidance_scale, whole=False, lowest=0)
    if not isinstance(model.timestep_scale, dict):
        _check_number("timestep_scale", model.timestep_scale, whole=False, lowest=None)
    if model.denoisers is not None and (isinstance(model.denoisers, str) or not model.denoisers):
        raise UserError(f"model.denoisers={model.denoisers!r} must be a list of parts, such as [transformer].")


def _dtypes(model: Any) -> list[tuple[str, str]]:
    return list(model.component_dtypes.items())


def _check_number(key: str, value: Any, whole: bool, lowest: int | None) -> None:
    """lowest: the least allowed value; None = anything above 0."""
    if value is None and key in (*OPTIONAL, *GUESSED):
        return
    kind = int if whole else int | float
    good = isinstance(value, kind) and not isinstance(value, bool)
    if not good or not (value > 0 if lowest is None else value >= lowest):
        number = "a whole number" if whole else "a number"
        raise UserError(
            f"model.{key}={value!r} must be {number} {'above 0' if lowest is None else f'of at least {lowest}'}."
        )

"""What was guessed and measured of a pipeline, as a yaml of conf/model that can be saved and changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from viditq.models.adapter import ModelAdapter
from viditq.models.roles import FLOAT, patterns
from viditq.models.schedulers import make_scheduler
from viditq.models.trial import TrialError, confirmed_text, returned_text, text_arguments, try_out
from viditq.quant.execution.model_linears import linear_names

HEAD = """# Guessed and measured by `viditq describe`; what is null is left as the pipeline has it.
{told}
defaults:
  - override /metric@_global_.metric: {metric}

"""
SETTINGS = ("revision", "dtype", "timestep_scale", "encode", "call", "negative_prompt", "attention", "compile", "roles")
"""Keys that are there whatever they say, so that a command line can set them."""


def describe(adapter: ModelAdapter, name: str) -> str:
    """The text of the yaml, called `name`, with which the model is driven as it is by `adapter`."""
    values = adapter.to_dict() | {"name": name, "guess": False}
    known = adapter.linear_roles(linear_names(adapter.build_denoiser()))
    globs = patterns({adapter.bare_name(linear): role for linear, role in known.items()})
    values |= {"keep_float": globs.pop(FLOAT, []), "roles": globs, "float_roles": []}
    folder = Path(adapter.path).expanduser()
    if folder.is_dir():  # the yaml is read from wherever a run starts
        values["path"] = str(folder.resolve())
    plain = {field.name: field.default for field in dataclasses.fields(adapter)}
    kept = {key: value for key, value in values.items() if key in SETTINGS or (value or None) != (plain[key] or None)}
    kept = {"_target_": f"{ModelAdapter.__module__}.{ModelAdapter.__qualname__}", **kept}
    metrics = f"[{adapter.modality}, sound]" if adapter.makes_sound else adapter.modality
    body = yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, width=116, allow_unicode=True)
    return HEAD.format(told=_told(adapter), metric=metrics) + body


def _told(adapter: ModelAdapter) -> str:
    """Comments: which denoisers a call of the pipeline calls, how often a step, and what it tells them."""
    try:
        steps = try_out(adapter, make_scheduler(adapter))
    except TrialError as error:
        return f"# The pipeline's call could not be tried out: {error}".replace("\n", " ")
    lines = []
    for denoiser in dict.fromkeys(step.denoiser for step in steps):
        mine = [step for step in steps if step.denoiser == denoiser]
        levels = list(dict.fromkeys(step.told for step in mine))
        values = ", ".join(f"{value:.4g}" for value in levels[:4]) + (", ..." if len(levels) > 4 else "")
        lines.append(
            f"# {denoiser}: {len(levels)} of {adapter.num_steps} steps, {len(mine) / len(levels):g} calls a step, "
            f"{mine[0].argument} {values}"
        )
    return "\n".join([*lines, *_of_text(adapter)])


def _of_text(adapter: ModelAdapter) -> list[str]:
    """Comments: each of the values that `encode_prompt` returns, whether its name was measured, and where it goes."""
    if adapter.conditioning != "text" or adapter.replays:
        return []
    measured = returned_text(adapter) or []
    carried = text_arguments(adapter, make_scheduler(adapter))
    confirmed = [] if measured else confirmed_text(adapter, make_scheduler(adapter))
    lines = []
    for place, name in enumerate(adapter.encode_outputs):
        own = measured[place] if len(measured) == len(adapter.encode_outputs) else None
        is_measured = (own and own.name == name) or place in confirmed
        how = [] if name is None else ["measured" if is_measured else "not measured"]
        how += [f"prompts along axis {own.batch_axis}"] if own and own.batch_axis is not None else []
        goes = [argument for argument, places in carried.items() if place in places]
        line = f"# text {place}: {name or 'not taken'}" + (f" ({', '.join(how)})" if how else "")
        lines.append(line + (f" -> {', '.join(goes)}" if goes else ""))
    return lines

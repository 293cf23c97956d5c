"""Finished runs, as the leaderboard and `viditq which` gather them: folders, what they hold, rows of configurations."""

import glob
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from viditq.errors import UserError
from viditq.files import read_mapping
from viditq.metrics.bootstrap import bootstrap_interval
from viditq.report.row import Row
from viditq.run_dir import OVERRIDES, flatten, overrides_of
from viditq.sweeps.unfinished import why_left_out

FILES = {  # of a finished run, with the keys that have to be there
    "run.json": ("name", "seed"),
    "metrics.json": (
        *("model", "experiment", "seed", "prompts", "metrics", "labels", "float_metrics", "seconds"),
        *("average_weight_bits", "average_activation_bits", "size_bytes"),
    ),
    "per_prompt.json": ("prompts", "metrics", "reference"),
}
SPEED, SPEED_KEYS = "speed.json", ("backend", "batch_size", "rounds", "machine", "candidates")
Runs = dict[Path, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any] | None]]
WIDTHS = ("quant.weight.bits", "quant.activation.bits")
NOT_NAMED = {"seed", "name"}  # keys of a configuration that never tell rows apart


def find(arguments: list[str]) -> list[Path]:
    """Folders given by name or by pattern, each once. Raises UserError for what does not exist, and for files alone."""
    found: dict[Path, None] = {}
    for argument in arguments:
        names = [argument] if Path(argument).exists() else sorted(glob.glob(argument))
        if not names:
            raise UserError(f"{argument} does not exist. Give folders of runs, or a pattern in quotes: 'outputs/*/*'.")
        found |= {Path(os.path.normpath(name)): None for name in names if Path(name).is_dir()}
    if not found:  # files beside folders are what a shell makes of `outputs/*`
        raise UserError(f"{', '.join(arguments)}: a file, where the folder of a run is needed.")
    return list(found)


def is_run(folder: Path) -> bool:
    """Whether a run is finished there."""
    return all((folder / name).is_file() for name in FILES)


def read(folders: list[Path]) -> Runs:
    """metrics.json, configuration, per_prompt.json and speed.json (None without) of every finished run; says of the
    others on stderr whether they run now, were stopped, or are none.
    """
    runs: Runs = {}
    for folder in folders:
        if not is_run(folder):
            print(f"left out: {why_left_out(folder)}", file=sys.stderr)
            continue
        try:
            config, metrics, per_prompt = (read_mapping(folder / name, keys) for name, keys in FILES.items())
            speed = read_mapping(folder / SPEED, SPEED_KEYS) if (folder / SPEED).is_file() else None
            config.pop(OVERRIDES, None)  # two ways of writing one configuration
            runs[folder] = metrics, flatten(config), per_prompt, speed
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError(f"None of these folders holds a finished run ({', '.join(FILES)}).")
    return runs


def where(folders: Sequence[Path], words: Sequence[str]) -> list[Path]:
    """Those of the folders whose run was made by a command line with each of these words: `bits=w4a8`, or `bits` with
    any value. Folders that hold no finished run stay, to be named. Raises UserError where none is left.
    """
    found = [folder for folder in folders if not is_run(folder) or all(_given(folder, word) for word in words)]
    if words and not any(map(is_run, found)):
        raise UserError(f"--where {' '.join(words)}: none of these runs was made by such a command.")
    return found


def _given(folder: Path, word: str) -> bool:
    try:
        return any(word in (text, text.partition("=")[0]) for text in overrides_of(folder))
    except UserError:  # a damaged file: `read` names it
        return True


def configuration(run: dict[str, Any]) -> str:
    """What a run shares with those of other seeds."""
    return repr(sorted((k, repr(v)) for k, v in run.items() if k != "seed"))


def unrepeated(runs: Runs) -> Runs:
    """Without runs that repeat a seed of a configuration, which are named."""
    found: Runs = {}
    seen: dict[tuple[str, int], Path] = {}
    for folder, run in runs.items():
        first = seen.setdefault((configuration(run[1]), run[0]["seed"]), folder)
        if first == folder:
            found[folder] = run
        else:
            print(f"left out: {folder} repeats {first}", file=sys.stderr)
    return found


def rows(runs: Runs, beside: Path) -> list[Row]:
    """Each a configuration with its seeds."""
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for folder, (metrics, config, _, _) in runs.items():
        groups[configuration(config)][metrics["seed"]] = folder
    found, firsts = [], [seeds[min(seeds)] for seeds in groups.values()]
    for seeds in groups.values():
        ordered = [runs[seeds[seed]] for seed in sorted(seeds)]
        first, (metrics, config, _, _) = seeds[min(seeds)], ordered[0]
        name = metrics["experiment"]
        name += difference(config, [runs[f][1] for f in firsts if runs[f][0]["experiment"] == name])
        report = first / "report.html"
        link = quote(Path(os.path.relpath(report, beside)).as_posix()) if report.is_file() else ""
        all_metrics, _, per_prompt, speeds = zip(*ordered, strict=True)
        found.append(Row(name, all_metrics, per_prompt, link, speeds, str(first)))
    return found


def difference(config: dict[str, Any], rivals: list[dict[str, Any]]) -> str:
    """What tells a configuration from others of its name: ` W4A8 seed=1`; empty if it has the name alone."""
    keys = sorted({k for rival in rivals for k in {*rival, *config} if rival.get(k) != config.get(k)} - NOT_NAMED)
    named = [k for k in keys if not k.startswith("inputs.")] or keys
    if width_of(config) and not {*WIDTHS}.isdisjoint(named):
        return f" {width_of(config)}" + "".join(f" {key}={config.get(key)}" for key in named if key not in WIDTHS)
    return "".join(f" {key}={config.get(key)}" for key in named)


def width_of(config: dict[str, Any]) -> str:
    """`W4A8`; empty unless both are quantized, and where a plan gives each part bits of its own."""
    if str(config.get("quant.policy._target_", "")).endswith((".PlanFile", ".SensitivitySearch", ".TreatmentSearch")):
        return ""
    weight, activation = (config.get(key) for key in WIDTHS)
    if weight is activation is None and config.get("quant.policy.activation_bits", 16) < 16:  # quant=external/...
        weight, activation = (config.get(f"quant.policy.{side}_bits") for side in ("weight", "activation"))
    return f"W{weight:g}A{activation:g}" if weight and activation else ""


def interval_of(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean over prompts."""
    return bootstrap_interval(torch.tensor(values, dtype=torch.float64))

"""A finished run as native W&B objects: what the report page shows, to be compared and searched over runs."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import wandb

from viditq.data.samples import load_sample, sample_path, sound_path
from viditq.files import read_json
from viditq.report.incoherence import SIDES, VARIANTS
from viditq.report.pictures import save_gif
from viditq.report.ranking import rank_pairs
from viditq.run_dir import RunDir

MAX_PAIRS = 24
MAX_BARS = 32
MAX_LINES = 10
GIF_HEIGHTS = (128, 256)  # pixels: smaller clips are enlarged, larger ones reduced
VERDICT_COLUMNS = ("kind", "verdict", "value", "interval", "float", "difference", "difference_interval", "noise")


def run_objects(run_dir: RunDir, metrics: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Key -> object, from the files that the run has. scratch: a folder for GIFs, to be kept until they are logged."""
    found: dict[str, Any] = {}
    if metrics.get("verdict"):
        found["verdicts"] = verdict_table(metrics["verdict"])
    if run_dir.per_prompt.is_file():
        found["pairs"] = pairs_table(read_json(run_dir.per_prompt), metrics["labels"], run_dir.samples, scratch)
    if (errors := run_dir.errors).is_file():
        found |= error_objects(read_json(errors))
    if run_dir.incoherence.is_file():
        found |= incoherence_objects(read_json(run_dir.incoherence))
    if run_dir.incoherence_picture.is_file():
        found["incoherence/picture"] = wandb.Image(str(run_dir.incoherence_picture))
    if run_dir.search.is_file():
        found["sensitivity/candidates"] = candidate_table(read_json(run_dir.search))
    if run_dir.heat_map.is_file():
        found["sensitivity/heat_map"] = wandb.Image(str(run_dir.heat_map))
    if run_dir.budget_curve.is_file():
        found["sensitivity/budget_curve"] = wandb.Image(str(run_dir.budget_curve))
    if run_dir.picture.is_file():
        found["comparison"] = wandb.Image(str(run_dir.picture))
    if (gif := run_dir.picture.with_suffix(".gif")).is_file():
        found["comparison_video"] = wandb.Video(str(gif))
    if (report := run_dir.page).is_file():
        found["report"] = wandb.Html(str(report), inject=False)  # the page needs nothing from elsewhere
    return found


def candidate_table(search: Mapping[str, Any]) -> wandb.Table:
    """One row per candidate of a sensitivity search; `chosen`: whether the plan has these bits there."""
    roles = {group["name"]: group for group in search["groups"]}
    bits = {(group, segment): pair for group, segment, *pair in search["bits"]}
    columns: list[str | int] = ["block", "role", "noise_level_low", "noise_level_high", "side", "bits"]
    rows = []
    for c in search["candidates"]:
        low, high = search["edges"][c["segment"] : c["segment"] + 2]
        chosen = bits[c["group"], c["segment"]][c["side"] == "activation"] == c["bits"]
        of = roles[c["group"]]
        values = [c[field] for field in ("proxy", "output", "metric", "measured")]
        rows.append([of["block"], of["role"], low, high, c["side"], c["bits"], *values, chosen])
    return wandb.Table(columns=[*columns, "proxy", "output", "metric", "measured", "chosen"], data=rows)


def artifact_reference(folder: Path, metrics: Mapping[str, Any]) -> wandb.Artifact:
    """A reference to the artifact's files with their checksums; nothing is uploaded.

    Runs of one experiment on one model are versions of one W&B artifact; the same files again are the same version.
    """
    name = re.sub(r"[^\w.-]+", "-", f"{metrics['model']}-{metrics['experiment']}", flags=re.ASCII)[:128]
    keys = ("seed", "fingerprint", "average_weight_bits", "average_activation_bits", "size_bytes")
    artifact = wandb.Artifact(name, type="model", metadata={key: metrics[key] for key in keys})
    artifact.add_reference(folder.resolve().as_uri(), checksum=True)
    return artifact


def verdict_table(verdicts: Mapping[str, Mapping[str, Any]]) -> wandb.Table:
    """One row per metric."""
    columns: list[str | int] = ["metric"]
    rows: list[list[Any]] = [[name] for name in verdicts]
    for field in VERDICT_COLUMNS:
        ends = field.endswith("interval")
        columns += [f"{field}_low", f"{field}_high"] if ends else [field]
        for row, verdict in zip(rows, verdicts.values(), strict=True):
            row += (verdict[field] or [None, None]) if ends else [verdict[field]]
    columns += ["floor_seed", "floor_bfloat16", "floor_latents", "reason"]
    for row, verdict in zip(rows, verdicts.values(), strict=True):
        row += [*(verdict["floors"].get(floor) for floor in ("seed", "bfloat16", "latents")), verdict["reason"]]
    return wandb.Table(columns=columns, data=rows)


def pairs_table(per_prompt: Mapping[str, Any], labels: Mapping[str, Any], samples: Path, scratch: Path) -> wandb.Table:
    """The worst pairs, worst first: prompt, both samples, their sound where there is any, every score of the pair."""
    scores = {**per_prompt["metrics"]}
    scores |= {f"{name}_difference": values for name, values in per_prompt.get("differences", {}).items()}
    folders = {"float": Path(per_prompt["reference"]), "quantized": samples}
    rows, worst = [], rank_pairs(per_prompt, labels).indices[:MAX_PAIRS]
    heard = all(sound_path(folder, index).is_file() for folder in folders.values() for index in worst)

    def shown(index: int) -> list[Any]:
        return [sample_media(f, index, scratch / f"{index:06d}-{what}.gif") for what, f in folders.items()]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # which PIL makes room for, where it takes its time
        pictures = [*pool.map(shown, worst)]
    for index, media in zip(worst, pictures, strict=True):
        media += [wandb.Audio(sound_path(folder, index)) for folder in folders.values() if heard]
        rows.append([index, per_prompt["prompts"][index], *media, *(values[index] for values in scores.values())])
    sounds = [f"{name} sound" for name in folders if heard]
    return wandb.Table(columns=["index", "prompt", *folders, *sounds, *scores], data=rows)


def sample_media(folder: Path, index: int, gif: Path) -> wandb.Image | wandb.Video:
    """The sample of prompt `index` as W&B shows it; a clip is first written to `gif`."""
    image = sample_path(folder, index, "image")
    if image.is_file():
        return wandb.Image(str(image))
    clip_FCHW = load_sample(sample_path(folder, index, "video"))
    low, high = GIF_HEIGHTS
    return wandb.Video(str(save_gif(clip_FCHW, gif, height=min(max(clip_FCHW.shape[-2], low), high))))


def error_objects(errors: Mapping[str, Any]) -> dict[str, Any]:
    """errors.json as tables and plots; noise levels are the middles of the buckets that a sampling step reaches."""
    edges, layers = errors["bucket_edges"], errors["layers"]
    levels = [round((lo + hi) / 2, 6) for lo, hi in pairwise(edges)]
    worst = sorted((name for name in layers if layers[name]["total"] is not None), key=lambda n: -layers[n]["total"])
    bars = wandb.Table(columns=["layer", "relative_error"], data=[[n, layers[n]["total"]] for n in worst[:MAX_BARS]])
    varying = sorted(layers, key=lambda name: -_variation(layers[name]["amax"]))[:MAX_LINES]
    by_role = {
        role: [_mean(column) for column in zip(*rows, strict=True)] for role, rows in _errors_by_role(layers).items()
    }
    found = {
        "errors/layers": layer_table(layers),
        "errors/layers_by_noise_level": noise_level_table(levels, layers),
        "errors/by_noise_level": _lines(
            levels,
            {
                "denoiser": errors["denoiser"]["relative_error"],
                **{f"{r}, mean of layers": v for r, v in by_role.items()},
            },
            "Relative error by noise level (1 = pure noise)",
        ),
    }
    if layers:
        title = f"Relative error of the {len(worst[:MAX_BARS])} worst of {len(layers)} layers"
        found["errors/by_layer"] = wandb.plot.bar(bars, "layer", "relative_error", title=title)
        found["errors/activation_ranges"] = _lines(
            levels,
            {name: layers[name]["amax"] for name in varying},
            f"Largest |input| by noise level, the {len(varying)} layers where it varies most",
        )
    return found


def incoherence_objects(incoherence: Mapping[str, Any]) -> dict[str, Any]:
    """incoherence.json as a table, one row per layer, and a plot of activations and of weights over the layers."""
    layers, names = incoherence["layers"], list(VARIANTS)
    fields = [(side, variant) for side in SIDES for variant in names]
    columns: list[str | int] = ["number", "layer", "role", *(f"{side}_{variant}" for side, variant in fields)]
    rows = [
        [number, name, layer["role"], *(layer[side] and layer[side][variant] for side, variant in fields)]
        for number, (name, layer) in enumerate(layers.items())
    ]
    found: dict[str, Any] = {"incoherence/layers": wandb.Table(columns=columns, data=rows)}
    for side in SIDES:
        seen = {i: layer[side] for i, layer in enumerate(layers.values()) if layer[side] is not None}
        found[f"incoherence/{side}s"] = wandb.plot.line_series(
            [list(seen)] * len(names),
            [[values[variant] for values in seen.values()] for variant in names],
            keys=names,
            title=f"Incoherence (amax / mean |x|) of {side}s by layer",
            xname="number of the layer",
        )
    return found


def layer_table(layers: Mapping[str, Mapping[str, Any]]) -> wandb.Table:
    """One row per layer; bits per segment, from low noise to high."""
    columns: list[str | int] = ["layer", "role", "weight_bits", "activation_bits", "relative_error"]
    columns += ["minimum", "maximum", "amax"]
    rows = [
        [
            name,
            layer["role"],
            *("/".join(map(str, layer[bits])) for bits in ("weight_bits", "activation_bits")),
            layer["total"],
            min(_known(layer["minimum"]), default=None),
            max(_known(layer["maximum"]), default=None),
            max(_known(layer["amax"]), default=None),
        ]
        for name, layer in layers.items()
    ]
    return wandb.Table(columns=columns, data=rows)


def noise_level_table(levels: Sequence[float], layers: Mapping[str, Mapping[str, Any]]) -> wandb.Table:
    """One row per layer and bucket."""
    fields = ("relative_error", "minimum", "maximum", "amax")
    rows = [
        [name, layer["role"], level, *(layer[field][bucket] for field in fields)]
        for name, layer in layers.items()
        for bucket, level in enumerate(levels)
        if layer["minimum"][bucket] is not None
    ]
    return wandb.Table(columns=["layer", "role", "noise_level", *fields], data=rows)


def _lines(levels: Sequence[float], series: Mapping[str, Sequence[float | None]], title: str) -> Any:
    points = {key: [(x, y) for x, y in zip(levels, ys, strict=True) if y is not None] for key, ys in series.items()}
    xs, ys = ([[point[axis] for point in line] for line in points.values()] for axis in (0, 1))
    return wandb.plot.line_series(xs, ys, keys=list(points), title=title, xname="noise level")


def _errors_by_role(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Sequence[float | None]]]:
    rows: dict[str, list[Sequence[float | None]]] = {}
    for layer in layers.values():
        rows.setdefault(layer["role"], []).append(layer["relative_error"])
    return rows


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return fmean(known) if known else None


def _variation(amax: Sequence[float | None]) -> float:
    """Largest over smallest, 1 where nothing varies or is known."""
    known = [value for value in _known(amax) if value > 0]
    return max(known) / min(known) if known else 1.0

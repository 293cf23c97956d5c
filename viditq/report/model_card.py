"""The README.md of a quantized model: what it is, what it cost, how it is loaded and made again; plain values in.

Its first lines are the hub's metadata (YAML). Its last line is a mark by which an unchanged file is told from one that
somebody has edited.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import yaml

from viditq.report.verdicts import headline, judge_all
from viditq.report.wording import num_bytes

MARK = "<!-- viditq "
TASKS = {"image": "text-to-image", "video": "text-to-video"}
RESULTS = {"image": "images[0]", "video": "frames[0]"}
OWN_RESULTS = {"Cosmos3OmniPipeline": "video"}
"""Of pipelines that call it otherwise."""
AVERAGES = {
    "average_weight_bits": "average bits of a weight",
    "average_activation_bits": "average bits of an activation",
}

OTHER = "Measured on the artifact, before it was changed for this program."
NOISE = "All of the same prompts. Noise: what the float model differs by from itself under another seed."


@dataclass(frozen=True)
class ModelCard:
    """What is said.

    base: the float model's id on the hub, or its name where it has none (`of_hub` false). plan, meta, metrics: as
    plan.json, meta.json and metrics.json have them; metrics None before they are measured. settings: of the pipeline's
    call. size: bytes of the artifact's denoiser. pictures: file names in the same folder. command: that made it; None =
    not known. target: the program that it is exported for; None = the artifact itself. exported_size: bytes of that.
    changed: what it has other than the artifact, None or empty = nothing.
    component_dtypes: of the parts that have another dtype.
    """

    base: str
    of_hub: bool
    pipeline: str
    modality: str
    by_class: bool
    dtype: str
    plan: Mapping[str, Any]
    meta: Mapping[str, Any]
    settings: Mapping[str, Any]
    size: int
    metrics: Mapping[str, Any] | None
    pictures: Sequence[str]
    command: str | None
    target: str | None = None
    changed: str | None = None
    exported_size: int | None = None
    component_dtypes: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The whole file."""
        parts = [self._metadata(), self._heading(), self._recipe(), self._quality(), self._loading(), self._again()]
        return marked("\n\n".join(part for part in parts if part), self.command)

    def _metadata(self) -> str:
        bits = sorted({s["weight"]["bits"] for s in self.plan["schemes"].values() if s["weight"]})
        values: dict[str, Any] = {"library_name": "diffusers"}
        if not self.by_class:
            values["pipeline_tag"] = TASKS[self.modality]
        if self.of_hub:
            values |= {"base_model": self.base, "base_model_relation": "quantized"}
        values["tags"] = ["viditq", "quantized", *(f"{count}-bit" for count in bits)]
        return f"---\n{yaml.safe_dump(values, sort_keys=False).strip()}\n---"

    def _heading(self) -> str:
        name = f"[{self.base}](https://huggingface.co/{self.base})" if self.of_hub else self.base
        what = f"for {self.target}" if self.target else "as viditq's artifact"
        lines = [f"# {self.base.split('/')[-1]}, quantized", ""]
        lines.append(f"{name} ({self.pipeline}), its denoiser quantized {self._by()}, {what}.")
        return "\n".join(lines)

    def _by(self) -> str:
        """Who made the codes."""
        source = self.meta.get("imported")
        if source is None:
            return "by viditq"
        return f"elsewhere ({source['program']}: {', '.join(source['files'])}) and imported by viditq"

    def _recipe(self) -> str:
        rows = [("recipe", "<br>".join(recipe_words(self.plan)))]
        rows += [("for this program", self.changed)] if self.changed else []
        for key, what in AVERAGES.items():  # what `save_denoiser` alone has written says nothing of them
            rows += [(what, f"{self.meta[key]:.2f}")] if key in self.meta else []
        float_size = self.meta.get("float_size_bytes")
        of_float = "" if float_size is None else f", of {num_bytes(float_size)} in 16 bits"
        rows.append(("denoiser", f"{num_bytes(self.size)}{of_float}"))
        if self.exported_size is not None:
            rows.append(("all of this export", num_bytes(self.exported_size)))
        rows.append(("computes in", self.meta.get("float_dtype") or self.dtype))
        if self.meta.get("text_encoders"):
            rows.append(("quantized text encoders", ", ".join(self.meta["text_encoders"])))
        return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])

    def _quality(self) -> str:
        if self.metrics is None:
            return "## Quality\n\nNot measured yet: run the stages `generate`, `evaluate` and `report`."
        groups = judge_all(self.metrics)
        said, prompts = headline(groups), self.metrics.get("prompts")
        details = "" if said.tone == "unknown" else said.details  # which are for the page
        lines = ["## Quality", "", *([OTHER, ""] if self.changed else [])]
        lines += [f"**{said.text}**, over {prompts} prompts. {details}".strip(), ""]
        lines += ["| metric | this model | float | difference, 95 % interval | noise | verdict |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in (row for group in groups for row in group.judgements):
            value = f"{row.value} ({row.interval})" if row.interval else row.value
            change = f"{row.difference} ({row.difference_interval})" if row.difference_interval else row.difference
            cells = (f"{row.label}, {row.direction}", value, row.reference, change, row.noise, row.verdict)
            lines.append(f"| {' | '.join(cell or '–' for cell in cells)} |")
        open_ones = [row.reason for group in groups for row in group.judgements if row.tone == "unknown" and row.reason]
        lines += ["", NOISE, "", *(f"- {reason}" for reason in open_ones)]
        lines += ["", *(f"![float model above, this one below]({name})" for name in self.pictures[:1])]
        return "\n".join(lines).rstrip()

    def _loading(self) -> str:
        lines = LOADING.get(self.target or "", ())
        code = [line.format(**self._words()) for line in lines]
        return "\n".join(["## Loading", "", *code])

    def _words(self) -> dict[str, str]:
        given = "207" if self.by_class else '"a prompt"'
        dtypes = {"default": self.dtype, **self.component_dtypes}
        by_part = ", ".join(f'"{name}": torch.{dtype}' for name, dtype in dtypes.items())
        call = ", ".join([given, *(f"{name}={value!r}" for name, value in self.settings.items())])
        return {
            "pipeline": self.pipeline,
            "dtype": f"{{{by_part}}}" if self.component_dtypes else f"torch.{self.dtype}",
            "given": given,
            "call": call,
            "result": OWN_RESULTS.get(self.pipeline, RESULTS[self.modality]),
        }

    def _again(self) -> str:
        if self.command is None:
            return ""
        lines = ["## Made by", "", "```bash", self.command]
        how = " --requantize" if self.changed else ""
        lines += [f"viditq export RUN --to {self.target}{how}"] if self.target else []
        return "\n".join([*lines, "```"])


LOADING = {
    "": (
        "```python",
        "import viditq",
        "",
        'pipeline = viditq.load_quantized("FOLDER")  # or the id of the repository that has it',
        "out = pipeline({given}).{result}",
        "```",
        "",
        "For other programs: `viditq export FOLDER --to diffusers` (and more: `--help`).",
    ),
    "comfyui": (
        "Put the file into ComfyUI's `models/diffusion_models` and choose it in the node Load Diffusion Model; VAE and "
        "text encoders are those of the float model.",
    ),
    "vllm-omni": (
        "vllm-omni serves the folder: `vllm serve FOLDER --omni`; it finds the method in the denoiser's config.json. A "
        "GPU of compute capability 8.0 or later.",
    ),
    "torchao": (
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline  # needs the package torchao, 0.18 or later",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("FOLDER", dtype={dtype})  # or the id of the repository',
        "out = pipeline({call}).{result}",
        "```",
    ),
    "sdnq": (
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline  # needs the package sdnq, 0.2.8",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("FOLDER", dtype={dtype})  # or the id of the repository',
        "out = pipeline({call}).{result}",
        "```",
    ),
    "diffusers": (
        "```python",
        "import torch",
        "import viditq  # lets diffusers know the method",
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("FOLDER", dtype={dtype})  # or the id of the repository',
        "out = pipeline({call}).{result}",
        "```",
        "",
        '`viditq.load_quantized("FOLDER")` gives the same samples, with these settings as defaults; it takes a '
        "`memory_budget`.",
    ),
}


def recipe_words(plan: Mapping[str, Any]) -> list[str]:
    """Such as "W4 channel, A8 token, smooth: 56 layers", by how the layers are treated; segments where they differ."""
    edges = list(pairwise(plan["edges"]))
    treated = Counter(tuple(names) for names in plan["layers"].values())
    lines = []
    for names, count in treated.most_common():
        words = [scheme_words(plan["schemes"].get(name)) for name in names]
        if len({*words}) > 1:
            spans = (f"{w} at noise levels {low:g} to {high:g}" for w, (low, high) in zip(words, edges, strict=True))
            what = "; ".join(spans)
        else:
            own = any(_differs(plan["schemes"].get(name)) for name in names) and len(names) > 1
            what = words[0] + (f", for each of {len(names)} ranges of noise levels" if own else "")
        lines.append(f"{what}: {count} layers")
    return lines


def scheme_words(scheme: Mapping[str, Any] | None) -> str:
    """One scheme of plan.json; None is float."""
    if scheme is None:
        return "float"
    words = [_format("W", scheme["weight"]), _format("A", scheme["activation"])]
    words += [str(transform["name"]) for transform in scheme["transforms"]]
    rounding = scheme["rounding"]["name"]
    words += [f"rounded by {rounding}"] if rounding != "nearest" else []
    words += [f"low-rank branch of {scheme['low_rank']}"] if scheme["low_rank"] else []
    return ", ".join(words)


def _format(side: str, spec: Mapping[str, Any] | None) -> str:
    if spec is None:
        return f"{side} float"
    group = f" {spec['group_size']}" if spec.get("group_size") else ""
    static = " static" if side == "A" and not spec["dynamic"] else ""
    full = " of full range" if spec.get("full_range") else ""
    return f"{side}{spec['bits']} {spec['granularity']}{group}{static}{' symmetric' if spec['symmetric'] else ''}{full}"


def _differs(scheme: Mapping[str, Any] | None) -> bool:
    """Whether its tensors are others at other noise levels."""
    if scheme is None:
        return False
    static = scheme["activation"] is not None and not scheme["activation"]["dynamic"]
    return static or any(transform.get("per_segment") for transform in scheme["transforms"])


def marked(text: str, command: str | None) -> str:
    """The text, and its mark in the last line."""
    body = f"{text}\n"
    note = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "command": command})
    return f"{body}\n{MARK}{note.replace('--', '-' + chr(92) + 'u002d')} -->\n"


def mark_of(text: str) -> dict[str, Any] | None:
    """What the mark says, `ours` with it: whether the text is as it was written; None = it has no mark."""
    body, found, rest = text.rpartition(f"\n{MARK}")
    try:
        note: dict[str, Any] = json.loads(rest.removesuffix("\n").removesuffix(" -->")) if found else {}
    except ValueError:
        return None
    digest = hashlib.sha256(body.encode()).hexdigest()
    return {**note, "ours": note.get("sha256") == digest and rest.endswith(" -->\n")} if note else None

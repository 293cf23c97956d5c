"""A pipeline's folder in diffusers' layout whose denoisers are quantized, as `viditq.export.diffusers` writes it.

Beside diffusers' own files it has DESCRIPTION: the pipeline's settings, as a ModelAdapter has them. A folder that
`save_pretrained` wrote has none: then diffusers' defaults hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from viditq.errors import UserError
from viditq.files import read_json
from viditq.interop.quantizer import ViditqConfig, plan_of, timestep_argument
from viditq.interop.register import METHOD
from viditq.interop.stored import AGAIN, Stored
from viditq.models.weight_files import DIFFUSERS, weight_files
from viditq.quant.artifact import StoredTensors, fill
from viditq.quant.description.plan import QuantPlan

DESCRIPTION, INDEX = "viditq.json", "model_index.json"
CHANGED = "changed"  # what an export says of itself that is other than in the artifact
VERSION = 1
REMEDY = f"The folder is damaged; {AGAIN}."


def is_pipeline(folder: Path) -> bool:
    """Whether it is laid out as diffusers' pipelines are."""
    return (folder / INDEX).is_file()


def quantized_parts(folder: Path) -> list[str]:
    """The parts of a pipeline's folder that viditq quantized; UserError where there is none."""
    index = read_json(folder / INDEX, REMEDY)
    parts = [name for name, entry in index.items() if isinstance(entry, list) and _quantization(folder / name)]
    if not parts:
        raise UserError(
            f"{folder} is a pipeline without parts that viditq quantized. Load it with diffusers' own from_pretrained, "
            "or give the folder of a run, of an artifact, or of an export."
        )
    return parts


def read_description(folder: Path) -> dict[str, Any] | None:
    """The fields of the ModelAdapter; None = the folder has none. UserError for another version."""
    if not (folder / DESCRIPTION).is_file():
        return None
    found = read_json(folder / DESCRIPTION, REMEDY)
    if found.get("format_version") != VERSION:
        raise UserError(
            f"{folder / DESCRIPTION} has format version {found.get('format_version')}; this program reads {VERSION}. "
            f"Install the version that it was exported with, or {AGAIN}."
        )
    model: dict[str, Any] = found["model"]
    return model


def _quantization(part: Path) -> dict[str, Any] | None:
    if not (part / "config.json").is_file():
        return None
    values = read_json(part / "config.json", REMEDY).get("quantization_config")
    return values if isinstance(values, dict) and values.get("quant_method") == METHOD else None


@dataclass(frozen=True)
class QuantizedParts:
    """The quantized denoisers of one folder, of one pipeline; none of their values is read before it is used."""

    plan: QuantPlan
    meta: dict[str, Any]
    tensors: StoredTensors
    dtype: str | None
    float_dtype: str | None

    @classmethod
    def of_folder(cls, folder: Path, names: Sequence[str]) -> QuantizedParts:
        """names: of the parts; where there are several, those of tensors and layers begin with them."""
        schemes: dict[str, Any] = {}
        layers: dict[str, Any] = {}
        told: dict[str, dict[str, str]] = {"digests": {}, "widened": {}, "equal": {}, "dtypes": {}}
        files: dict[Path, str] = {}
        for name in names:
            prefix = f"{name}." if len(names) > 1 else ""
            config = ViditqConfig(**(_quantization(folder / name) or {}))
            plan, mine = plan_of(config.plan), weight_files(folder / name, DIFFUSERS, None)
            stored = Stored.of_files(mine)
            files |= dict.fromkeys(mine, prefix)
            for key, values in told.items():
                before = prefix if key == "equal" else ""  # whose values are names too
                values |= {f"{prefix}{n}": f"{before}{v}" for n, v in getattr(stored, key).items()}
            schemes |= {f"{prefix}{n}": scheme for n, scheme in plan.schemes.items()}
            layers |= {f"{prefix}{n}": [s and f"{prefix}{s}" for s in of] for n, of in plan.layers.items()}
        whole = QuantPlan(plan.edges, schemes, layers)
        meta = {**told, "timestep_scale": config.timestep_scale}
        return cls(whole, meta, StoredTensors(folder, meta, files), config.dtype, config.float_dtype)

    @property
    def timestep_argument(self) -> str:
        """The argument of the denoisers' forward that holds the timestep."""
        return timestep_argument(self.meta["timestep_scale"])

    def fill(self, denoiser: nn.Module, backend: str, memory_budget: int | None) -> nn.Module:
        """The denoiser itself, which was just built; errors as of `load_denoiser`."""
        fill(denoiser, self.plan, self.meta, self.tensors, backend, memory_budget)
        return denoiser

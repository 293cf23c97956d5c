"""Which programs could be handed an artifact exactly, asked without writing anything."""

from functools import partial
from pathlib import Path

from viditq.errors import UserError
from viditq.export.folding import folded
from viditq.export.refusal import raise_refused, refuse_correction
from viditq.export.targets import TARGETS
from viditq.models.adapter import ModelAdapter
from viditq.quant.artifact import read_meta

OURS = "diffusers"  # takes everything, and needs viditq to load it


def exact_targets(artifact: Path) -> list[str]:
    """The programs of `--to` that run without viditq and hold this artifact as it is."""
    meta = read_meta(artifact)
    denoiser = ModelAdapter.from_dict(meta["model"]).build_denoiser()
    found = []
    for name, target in TARGETS.items():
        if name == OURS:
            continue
        try:
            refuse_correction(name, meta)
            cannot_hold = partial(target.load().cannot_hold, denoiser=denoiser)
            raise_refused(name, folded(artifact, meta, denoiser, cannot_hold, False)[1], False)
        except UserError:
            continue
        found.append(name)
    return found

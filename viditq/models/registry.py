"""Pipelines and models that diffusers lacks and this package has; every other class is diffusers' own.

Of a modular pipeline it is one that drives it.
"""

from typing import Any

import diffusers

from viditq.models.modular import driver
from viditq.models.opensora_pipeline import OpenSoraPipeline
from viditq.models.outline import OWN_PIPELINES
from viditq.models.stdit import STDiT

OWN = {**dict(zip(OWN_PIPELINES, [OpenSoraPipeline], strict=True)), "STDiT": STDiT}


def find_class(name: str) -> Any:
    """The class of that name, ours or diffusers'; None if there is none."""
    return OWN.get(name) or driver(name) or getattr(diffusers, name, None)

"""What the page says of a search of treatments."""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viditq.report.budget_curve import decibels
from viditq.report.wording import num_bytes


@dataclass(frozen=True)
class TreatmentsView:
    """picture: as a data address. finalists: how found, bytes, weight bits, PSNR on held-out prompts. parts: name,
    treatment, how many were tried.
    """

    picture: str
    num_prompts: int
    finalists: tuple[tuple[str, str, str, str], ...]
    parts: tuple[tuple[str, str, int], ...]


def treatments_view(result: Mapping[str, Any], picture: Path) -> TreatmentsView:
    """Shape treatments.json; picture: PNG."""
    chosen = next(one for one in result["finalists"] if one["how"] == result["chosen"])
    return TreatmentsView(
        picture=f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}",
        num_prompts=result["prompts"],
        finalists=tuple(
            (one["how"], num_bytes(one["size"]), f"{one['weight_bits']:.2f}", f"{decibels(one['measured']):.1f}")
            for one in result["finalists"]
        ),
        parts=tuple(
            (name.replace("_", " "), treatment, len(result["found"][name]["own"]))
            for name, treatment in chosen["parts"].items()
        ),
    )

"""What the page says of a sensitivity search."""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viditq.report.budget_curve import axis_label, decibels, in_decibels, predicted_quality, spent
from viditq.report.wording import num_bytes

MAX_PARTS = 12


@dataclass(frozen=True)
class Part:
    """One candidate, in words."""

    name: str
    segment: str
    what: str
    error: str
    how: str


@dataclass(frozen=True)
class SearchView:
    """heat_map, curve: the pictures as data: addresses ("" = none). points: the predicted curve, (budget, quality).
    error, quality: what the numbers of parts and of points are. parts: the most sensitive ones. used: budget ->
    (spent, limit).
    """

    heat_map: str
    curve: str
    axis: str
    points: tuple[tuple[str, str], ...]
    num_groups: int
    num_measured: int
    num_candidates: int
    num_prompts: int
    error: str
    quality: str
    predicted: str
    parts: tuple[Part, ...]
    used: tuple[tuple[str, str, str], ...]


def search_view(search: Mapping[str, Any], heat_map: Path, curve: Path | None = None) -> SearchView:
    """Shape search.json; heat_map, curve: its pictures (PNG)."""
    edges, candidates = search["edges"], search["candidates"]
    worst = sorted(candidates, key=lambda c: -c["output"])[:MAX_PARTS]
    parts = [
        Part(
            name=c["group"].replace("_", " "),
            segment=f"{edges[c['segment']]:g}–{edges[c['segment'] + 1]:g}",
            what=f"{c['side']}s at {c['bits']} bits",
            error=f"{c['output']:.2e}",
            how="measured" if c["measured"] else "predicted",
        )
        for c in worst
    ]
    limits = {name: search["budget"].get(name) for name in search["used"]}
    return SearchView(
        heat_map=_address(heat_map),
        curve="" if curve is None else _address(curve),
        axis="" if curve is None else axis_label(search),
        points=() if curve is None else tuple(_point(search, p) for p in search["predicted_curve"]),
        num_groups=len(search["groups"]),
        num_measured=sum(c["measured"] for c in candidates),
        num_candidates=len(candidates),
        num_prompts=search["prompts"],
        error="mean square error" if in_decibels(search) else "proxy of the error (no unit)",
        quality="predicted PSNR, dB" if in_decibels(search) else "sum of proxies",
        predicted=predicted_quality(search, search["predicted"]),
        parts=tuple(parts),
        used=tuple(
            (name.replace("_", " ").removesuffix(" bytes"), amount(name, value), amount(name, limits[name]))
            for name, value in search["used"].items()
        ),
    )


def amount(name: str, value: float | None) -> str:
    """A budget in words: bytes as `2.17 MB`, others as a number; – where there is none."""
    if value is None:
        return "–"
    return num_bytes(int(value)) if name.endswith("bytes") else f"{value:.6g}"


def _address(picture: Path) -> str:
    return f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}"


def _point(search: Mapping[str, Any], point: Mapping[str, Any]) -> tuple[str, str]:
    error = point["predicted"]
    return f"{spent(search, point):.3g}", f"{decibels(error):.1f}" if in_decibels(search) else f"{error:.2e}"

"""What the verdicts of metrics.json say together, in words; knows no torch, so that a finished run is told at once."""

from collections.abc import Mapping
from typing import Any

EQUAL, WORSE, BETTER = "equal within noise", "worse", "better"


def headline(entries: Mapping[str, Mapping[str, Any]], labels: Mapping[str, Mapping[str, Any]]) -> str:
    """All verdicts in one line: `worse than float in 2 of 9 metrics: PSNR, SSIM; equal within noise in 7`."""
    told = {name: entry["verdict"] for name, entry in entries.items() if is_told(entry)}
    named = {word: [labels[n]["label"] for n, v in told.items() if v == word] for word in (WORSE, BETTER)}
    parts = [f"{word} than float in {len(names)}: {', '.join(names)}" for word, names in named.items() if names]
    if equal := len(told) - sum(map(len, named.values())):
        parts.append(f"equal within noise in {equal}")
    if untold := [labels[name]["label"] for name in entries if name not in told]:
        parts.append(f"nothing can be told in {len(untold)}: {', '.join(untold)}")
    if not parts:
        return "no metric was computed"
    metrics = f" of {len(entries)} metric{'s' * (len(entries) > 1)}"
    head, colon, names = parts[0].partition(":")
    return "; ".join([head + metrics + colon + names, *parts[1:]])


def is_told(entry: Mapping[str, Any]) -> bool:
    """Whether there was anything to judge by."""
    return entry["difference_interval"] is not None

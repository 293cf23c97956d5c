"""What the verdicts of metrics.json say together, in words; knows no torch, so that a finished run is told at once."""

from collections.abc import Mapping
from typing import Any

EQUAL, WORSE, BETTER = "equal within noise", "worse", "better"
DIFFERS = "differs"  # of a fidelity metric: further from float than bfloat16 is, which every low-bit model is


def headline(entries: Mapping[str, Mapping[str, Any]], labels: Mapping[str, Mapping[str, Any]]) -> str:
    """All verdicts in one line, what became of quality first: `quality: equal within noise in 4 of 4 metrics; samples:
    differ from float's in 2 of 3 metrics: PSNR, SSIM; equal within noise in 1`.
    """
    near = {name: entry for name, entry in entries.items() if entry["kind"] == "fidelity"}
    own = {name: entry for name, entry in entries.items() if name not in near}
    parts = []
    if own:
        parts.append(f"quality: {_counted(own, labels, {WORSE: 'worse than float', BETTER: 'better than float'})}")
    if near:  # in runs evaluated before there was that word, they are called worse
        near = {n: {**entry, "verdict": DIFFERS} if entry["verdict"] == WORSE else entry for n, entry in near.items()}
        samples = _counted(near, labels, {DIFFERS: "differ from float's"})
        parts.append(f"samples: {samples}" if own else f"quality: not measured; samples: {samples}")
    return "; ".join(parts) or "no metric was computed"


def _counted(
    entries: Mapping[str, Mapping[str, Any]], labels: Mapping[str, Mapping[str, Any]], words: Mapping[str, str]
) -> str:
    """words: a verdict -> how it is said."""
    told = {name: entry["verdict"] for name, entry in entries.items() if is_told(entry)}
    named = {word: [labels[n]["label"] for n, v in told.items() if v == word] for word in words}
    parts = [f"{words[word]} in {len(names)}: {', '.join(names)}" for word, names in named.items() if names]
    if equal := len(told) - sum(map(len, named.values())):
        parts.append(f"equal within noise in {equal}")
    if untold := [labels[name]["label"] for name in entries if name not in told]:
        parts.append(f"nothing can be told in {len(untold)}: {', '.join(untold)}")
    metrics = f" of {len(entries)} metric{'s' * (len(entries) > 1)}"
    head, colon, names = parts[0].partition(":")
    return "; ".join([head + metrics + colon + names, *parts[1:]])


def is_told(entry: Mapping[str, Any]) -> bool:
    """Whether there was anything to judge by."""
    return entry["difference_interval"] is not None

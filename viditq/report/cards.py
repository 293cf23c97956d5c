"""The pairs as cards, and the orders they can be put into."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from viditq.report.content import PageContent, Pair
from viditq.report.media import Encoding, Sheet, make_sheet
from viditq.report.wording import digits_for, finite, plain

LONG_PROMPT = 180
OF_CONDITIONS, OF_SMALL_ONES = Encoding(128, 80), Encoding(64)  # what samples started from; where no side is above 64
PROMPT_ORDER = ""


@dataclass(frozen=True)
class SortKey:
    """One way of ordering the pairs."""

    metric: str
    label: str


@dataclass(frozen=True)
class Card:
    """One pair as the template draws it; `scores` are (label, words), `conditions` (words, what was given)."""

    index: int
    prompt: str
    is_long: bool
    reference: Sheet
    sample: Sheet
    scores: tuple[tuple[str, str], ...]
    conditions: tuple[tuple[str, Sheet], ...] = ()


def sort_keys(content: PageContent) -> list[SortKey]:
    """One per metric; where the float model has scores too, the change against them orders the pairs."""
    compared = {True: "largest drop", False: "largest rise", None: "largest change"}
    keys = []
    for name in content.scored:
        words = (
            compared[content.higher_is_better(name)] if f"{name}_float" in content.per_prompt["metrics"] else "worst"
        )
        keys.append(SortKey(name, f"{content.label(name)}, {words} first"))
    return keys


def badness(content: PageContent, pair: Pair, name: str) -> float:
    """Larger is worse, -inf without a score."""
    score = finite(pair.scores.get(name))
    if score is None:
        return -inf
    change = score - (content.reference_score(name, pair.index) or 0.0)
    return {True: -change, False: change, None: abs(change)}[content.higher_is_better(name)]


def given(argument: str) -> str:
    """What a pipeline's argument for pictures is called on the page: `given last picture` of last_image."""
    return f"given {argument.replace('image', 'picture').replace('_', ' ')}"


def make_card(content: PageContent, pair: Pair, sheets: tuple[Sheet, Sheet]) -> Card:
    """Scores in words, the float model's own in brackets."""
    scores = []
    for name in content.scored:
        score, reference = finite(pair.scores.get(name)), content.reference_score(name, pair.index)
        digits = digits_for(score)
        own = f" (float {plain(reference, digits)})" if reference is not None else ""
        scores.append((content.label(name), plain(score, digits, content.unit(name)) + own))
    conditions = tuple(
        (given(name), make_sheet(clip, OF_SMALL_ONES if max(clip.shape[2:]) <= 64 else OF_CONDITIONS))
        for name, clip in pair.conditions.items()
    )
    return Card(pair.index, pair.prompt, len(pair.prompt) > LONG_PROMPT, *sheets, tuple(scores), conditions)


def clip_data(content: PageContent, sheets: Sequence[tuple[Sheet, Sheet]]) -> dict[str, Any]:
    """What the script needs beside the elements: the geometry of the sheets and the orders of the cards."""
    pairs = content.pairs
    orders = {
        name: sorted(range(len(pairs)), key=lambda i: -badness(content, pairs[i], name)) for name in content.scored
    }
    orders[PROMPT_ORDER] = sorted(range(len(pairs)), key=lambda i: pairs[i].index)
    clips = [{"frames": s.num_frames, "columns": s.columns, "width": s.width, "height": s.height} for s, _ in sheets]
    return {"framesPerSecond": content.frames_per_second, "clips": clips, "orders": orders}

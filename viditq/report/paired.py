"""Paired differences between rows of a leaderboard: the same prompts and noise, the method swapped."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from viditq.report.table import decimals, number

Interval = tuple[float, float]
IntervalOf = Callable[[Sequence[float]], Interval | None]  # the 95 % interval of a mean; None for too few values
Prompt = tuple[int, str]  # its place and its words, which may recur
Paired = tuple[float, Interval | None]  # a difference and its interval
Z95 = 1.959964  # a normal distribution's 95 % interval, in standard errors
PAIRED_NOTE = (
    "To the row above: the paired difference over the same prompts and noise, with its 95 % interval over prompts; "
    "where that includes 0, their order is not certain. Pairing takes out what methods share: it tells more than ±."
)


def paired_difference(
    mine: Mapping[Prompt, Sequence[float]], theirs: Mapping[Prompt, Sequence[float]], interval_of: IntervalOf
) -> Paired | None:
    """Mean of mine - theirs over prompts, a prompt's mean over seeds being one value. Prompt -> values by seed.

    None where the two have no values for the same prompts.
    """
    if not mine or mine.keys() != theirs.keys():
        return None
    differences = [statistics.fmean(mine[prompt]) - statistics.fmean(theirs[prompt]) for prompt in mine]
    return statistics.fmean(differences), interval_of(differences)


def paired_text(paired: Paired | None) -> str:
    """`-0.42 [-0.61, -0.23]`"""
    if paired is None:
        return "-"
    difference, interval = paired
    if interval is None:
        return number(difference, decimals(difference), "+")
    digits = decimals(difference, (interval[1] - interval[0]) / (2 * Z95))
    low, high = (number(bound, digits, "+") for bound in interval)
    return f"{number(difference, digits, '+')} [{low}, {high}]"

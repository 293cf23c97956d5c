"""Which inputs of a block are kept: a uniform sample, spread over noise levels, guidance branches and prompts.

Every input has a place in an order that hangs on nothing but what it is (a hash of seed, noise level and branch) and
what else was seen, so that the first n are the same in whatever order, by however many processes and with however many
interruptions they came. The order takes one input of each stratum (a bucket of noise level, a branch) before a second
of any, and inside a stratum one of each prompt before a second of any.

The first n of all are also the first n of (the first n of a part, and the rest): an input's place can only move back
when more is seen, and one that has fallen out stands behind all that its stratum keeps. So it can be deleted at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

GOLDEN = 0.6180339887498949
LEVELS = 2**24


class Item(NamedTuple):
    """One prompt's share of one call of a block: the prompt's seed, the noise level in 1 / 2^24, the branch.

    The level is rounded down, so that one at a boundary stays in the lower bucket and segment, as everywhere else.
    """

    seed: int
    level: int
    branch: int

    @property
    def name(self) -> str:
        """Also a file name."""
        return f"{self.seed}-{self.level}-{self.branch}"

    @classmethod
    def of(cls, name: str) -> Item:
        """Inverse of `name`."""
        return cls(*map(int, name.split("-")))

    @property
    def noise_level(self) -> float:
        return self.level / LEVELS


@lru_cache(maxsize=2**20)
def key_of(block: str, item: Item) -> int:
    """The hash that the choice inside a stratum follows."""
    return int.from_bytes(blake2b(f"{block}/{item.name}".encode(), digest_size=8).digest())


def ranked(block: str, items: Iterable[Item], num_buckets: int) -> list[Item]:
    """The items in the order in which they are kept."""
    strata: dict[tuple[int, int], list[Item]] = {}
    for item in items:
        bucket = max(-(-item.level * num_buckets // LEVELS) - 1, 0)
        strata.setdefault((bucket, item.branch), []).append(item)
    start = key_of(block, Item(0, 0, 0)) / 2**64  # so that blocks that keep few do not all keep the same
    places = []
    for (bucket, branch), members in strata.items():
        # Multiples of the golden ratio: those below any limit are spread evenly over the buckets.
        slot = (start + bucket * GOLDEN + branch / 2) % 1
        places += [(level, slot, bucket, branch, item) for level, item in enumerate(_by_prompt(block, members))]
    return [place[-1] for place in sorted(places)]


def _by_prompt(block: str, members: list[Item]) -> list[Item]:
    """By hash, one of each prompt before a second of any."""
    seen: Counter[int] = Counter()
    ranks = []
    for item in sorted(members, key=lambda member: key_of(block, member)):
        ranks.append((seen[item.seed], key_of(block, item), item))
        seen[item.seed] += 1
    return [rank[-1] for rank in sorted(ranks)]

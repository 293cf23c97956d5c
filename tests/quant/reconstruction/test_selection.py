"""The order in which inputs are kept: streamed as whole, spread over strata and prompts."""

import random
from collections import Counter
from itertools import product

import pytest

from viditq.quant.reconstruction.selection import LEVELS, Item, ranked

BUCKETS = 10
SEEDS, STEPS, BRANCHES = range(100, 112), [round(LEVELS * (i + 0.5) / 24) for i in range(24)], (0, 1)
ITEMS = [Item(*parts) for parts in product(SEEDS, STEPS, BRANCHES)]


@pytest.mark.parametrize("count", [1, 3, 17, 50, 200])
def test_streaming_with_eviction_keeps_the_first_of_all(count: int) -> None:
    whole = ranked("block", ITEMS, BUCKETS)[:count]
    for seed in range(3):
        items = ITEMS.copy()
        random.Random(seed).shuffle(items)
        kept: list[Item] = []
        while items:
            batch = [items.pop() for _ in range(min(8, len(items)))]
            kept = ranked("block", [*kept, *batch], BUCKETS)[:count]
        assert kept == whole


def test_the_count_may_fall_while_streaming() -> None:
    kept: list[Item] = []
    for start in range(0, len(ITEMS), 12):
        count = max(300 - start, 25)
        kept = ranked("block", [*kept, *ITEMS[start : start + 12]], BUCKETS)[:count]
    assert kept == ranked("block", ITEMS, BUCKETS)[:25]


def test_noise_levels_branches_and_prompts_get_equal_shares() -> None:
    strata = BUCKETS * len(BRANCHES)
    first = ranked("block", ITEMS, BUCKETS)[: 12 * strata]
    shares = Counter((item.level * BUCKETS // LEVELS, item.branch) for item in first)
    assert set(shares.values()) == {12} and len(shares) == strata
    by_prompt = Counter((item.level * BUCKETS // LEVELS, item.branch, item.seed) for item in first)
    assert max(by_prompt.values()) == 1  # all of 12 prompts before any twice


@pytest.mark.parametrize("block", ["a", "b", "c"])
def test_few_are_spread_over_the_noise_levels(block: str) -> None:
    first = ranked(block, ITEMS, BUCKETS)[:6]
    assert {item.branch for item in first} == {0, 1}
    levels = sorted(item.noise_level for item in first)
    assert levels[0] < 0.35 and levels[-1] > 0.65
    assert len({round(level * 20) for level in levels}) >= 5


def test_blocks_choose_for_themselves_and_names_round_trip() -> None:
    one, other = (ranked(block, ITEMS, BUCKETS)[:20] for block in ("one", "other"))
    assert one != other and len({*one} & {*other}) < 15
    assert [Item.of(item.name) for item in one] == one

"""The knapsack against every choice there is."""

import itertools
import random

import pytest

from viditq.errors import UserError
from viditq.quant.search.knapsack import Option, Problem, solve_exact, solve_greedy


def random_problem(seed: int, num_cells: int = 5, shared: bool = False) -> Problem:
    """Options of 2 to 4 widths that cost less the wider they are, with some exceptions; two limits, perhaps a size."""
    draw = random.Random(seed)
    cells, sizes = [], {}
    for c in range(num_cells):
        options = []
        for width in sorted(draw.sample(range(2, 9), draw.randint(2, 4))):
            thing = (c // 2, width)
            sizes[thing] = 10.0 * width * (1 + c // 2)
            uses = {"first": width * draw.uniform(0.5, 1.5), "second": float(width)}
            options.append(Option(draw.uniform(0, 2.0 ** (8 - width)), uses, thing))
        cells.append(options)
    limits = {}
    for name in ("first", "second"):
        low, high = (sum(pick(o.uses[name] for o in cell) for cell in cells) for pick in (min, max))
        limits[name] = low + draw.uniform(0.1, 0.8) * (high - low)
    largest = sum(sizes.values())
    return Problem(cells, limits, sizes, draw.uniform(0.5, 0.9) * largest if shared else None)


def best_cost(problem: Problem) -> float | None:
    """By trying everything."""
    every = itertools.product(*(range(len(cell)) for cell in problem.cells))
    return min((problem.cost(choice) for choice in every if problem.fits(choice)), default=None)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_exact_is_the_best_of_all_and_greedy_fits(seed: int, shared: bool) -> None:
    problem = random_problem(seed, shared=shared)
    best = best_cost(problem)
    if best is None:
        with pytest.raises(UserError):
            solve_exact(problem)
        with pytest.raises(UserError):
            solve_greedy(problem)
        return
    exact = solve_exact(problem)
    assert problem.fits(exact) and problem.cost(exact) == pytest.approx(best, rel=1e-6)
    try:
        greedy = solve_greedy(problem)
    except UserError:  # uses are random, so the leanest option of one limit need not be that of another
        return
    assert problem.fits(greedy) and problem.cost(greedy) >= best - 1e-9


def many_decades(seed: int) -> Problem:
    """Costs over nine decades, drawn evenly from their logarithms or from powers of ten, of which many are equal."""
    draw = random.Random(seed)
    cells, sizes, powers = [], {}, draw.random() < 0.5
    for c in range(draw.randint(2, 6)):
        widths = sorted(draw.sample((2, 3, 4, 6, 8), draw.randint(2, 3)))
        costs = sorted((10.0 ** -(draw.randint(0, 9) if powers else draw.uniform(0, 9)) for _ in widths), reverse=True)
        sizes |= {(c // 2, width): width * (1.0 + c // 2) for width in widths}
        cells.append([Option(cost, {"bits": w}, (c // 2, w)) for cost, w in zip(costs, widths, strict=True)])
    low, high = (sum(cell[end].uses["bits"] for cell in cells) for end in (0, -1))
    size_limit = draw.uniform(0.4, 0.9) * sum(sizes.values()) if draw.random() < 0.3 else None
    return Problem(cells, {"bits": draw.randint(int(low), int(high))}, sizes, size_limit)


@pytest.mark.parametrize("seed", range(60))
def test_exact_is_exact_over_nine_decades_of_costs(seed: int) -> None:
    problem = many_decades(seed)
    best = best_cost(problem)
    if best is None:
        with pytest.raises(UserError):
            solve_exact(problem)
    else:
        assert problem.cost(solve_exact(problem)) == pytest.approx(best, rel=1e-12, abs=0)


def test_small_costs_count_beside_large_ones() -> None:
    def cell(low: float, high: float) -> list[Option]:
        return [Option(low, {"bits": 2.0}), Option(high, {"bits": 4.0})]

    cells = [cell(1, 0), cell(3e-8, 1e-8), cell(5e-8, 1e-8)]
    assert solve_exact(Problem(cells, {"bits": 10.0})) == (1, 0, 1)
    forced = [[Option(1e9, {"bits": 4.0})], *cells]
    assert solve_exact(Problem(forced, {"bits": 14.0})) == (0, 1, 0, 1)
    tiny = [[Option(o.cost * 1e-290, o.uses) for o in cell] for cell in cells]
    assert solve_exact(Problem(tiny, {"bits": 10.0})) == (1, 0, 1)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_on_a_large_problem_fits_and_comes_close(seed: int) -> None:
    draw = random.Random(seed)
    cells = [[Option(draw.uniform(1, 9) * 4.0**-b, {"bits": b / 80}) for b in (4, 6, 8)] for _ in range(80)]
    problem = Problem(cells, {"bits": 5.0})
    exact, greedy = solve_exact(problem), solve_greedy(problem)
    assert problem.fits(exact) and problem.fits(greedy)
    assert problem.cost(exact) <= problem.cost(greedy) * (1 + 1e-9) <= 1.1 * problem.cost(exact)


def test_what_several_options_keep_is_counted_once() -> None:
    wide, narrow = Option(0.0, {}, "wide"), Option(1.0, {}, "narrow")
    problem = Problem([[wide, narrow]] * 3, {}, {"wide": 8.0, "narrow": 4.0}, size_limit=8.0)
    assert problem.size((0, 0, 0)) == 8 and problem.size((0, 1, 0)) == 12
    assert solve_exact(problem) == (0, 0, 0)  # greedy would have to pass through 12


def test_a_larger_thing_that_cells_share_can_be_the_leanest() -> None:
    """Each cell's own smallest take 4 + 4, the shared one 5; three cells with a chain of shared things take 5 + 4."""
    sizes = {"a": 4.0, "b": 4.0, "both": 5.0}
    cells = [[Option(0.0, {}, "a"), Option(1.0, {}, "both")], [Option(0.0, {}, "b"), Option(1.0, {}, "both")]]
    for limit in (5.0, 7.9):
        assert solve_exact(Problem(cells, {}, sizes, limit)) == (1, 1)
        with pytest.raises(UserError, match="solver=exact"):
            solve_greedy(Problem(cells, {}, sizes, limit))
    with pytest.raises(UserError, match=r"size_bytes=4\.9 is not possible: .* 5\."):
        solve_exact(Problem(cells, {}, sizes, 4.9))
    longer = [*cells, [Option(0.0, {}, "a"), Option(1.0, {}, "c"), Option(2.0, {})]]
    assert solve_exact(Problem(longer, {}, sizes | {"c": 3.0}, 8.0)) == (0, 0, 0)
    assert solve_exact(Problem(longer, {}, sizes | {"c": 3.0}, 5.0)) == (1, 1, 2)


def test_limits_too_low_say_what_is_possible() -> None:
    cells = [[Option(1.0, {"weight_bits": 4.0}, "a"), Option(0.0, {"weight_bits": 8.0}, "b")]]
    for solve in (solve_exact, solve_greedy):
        with pytest.raises(UserError, match=r"weight_bits=3 is not possible: .* 4"):
            solve(Problem(cells, {"weight_bits": 3.0}))
        with pytest.raises(UserError, match=r"size_bytes=10 is not possible: .* 16"):
            solve(Problem(cells, {"weight_bits": 9.0}, {"a": 16.0, "b": 32.0}, 10.0))

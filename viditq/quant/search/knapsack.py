"""Multiple-choice knapsack: one option in each cell, at the least total cost, within several limits.

Solved exactly (branch and bound of scipy's HiGHS) or greedily. A limit is either a sum over the chosen options, or a
size: that of all things which the chosen options keep, each counted once however many options keep it.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from viditq.errors import UserError

TOLERANCE = 1e-6  # relative: by how much rounding may exceed a limit (HiGHS works to 1e-7 itself)
LARGEST_COST = 1e6  # of an option, as HiGHS sees it: it takes sums that differ by 1e-6 for equal
Choice = tuple[int, ...]
"""Index of the option taken in each cell."""


@dataclass(frozen=True)
class Option:
    """cost >= 0; uses: how much it takes of each limit, by name; keeps: the thing it needs stored, if any."""

    cost: float
    uses: Mapping[str, float] = field(default_factory=dict)
    keeps: Hashable | None = None


@dataclass(frozen=True)
class Problem:
    """limits: name -> most that may be used, above 0. sizes: thing -> size; size_limit: of all kept, if limited;
    always: size of what is kept whatever is chosen.
    """

    cells: Sequence[Sequence[Option]]
    limits: Mapping[str, float]
    sizes: Mapping[Hashable, float] = field(default_factory=dict)
    size_limit: float | None = None
    always: float = 0.0

    def cost(self, choice: Choice) -> float:
        """Sum over the chosen options."""
        return sum(cell[i].cost for cell, i in zip(self.cells, choice, strict=True))

    def used(self, choice: Choice) -> dict[str, float]:
        """How much of each limit."""
        chosen = [cell[i] for cell, i in zip(self.cells, choice, strict=True)]
        return {name: sum(option.uses[name] for option in chosen) for name in self.limits}

    def size(self, choice: Choice) -> float:
        """Size of everything kept."""
        things = {cell[i].keeps for cell, i in zip(self.cells, choice, strict=True)}
        return self.always + sum(self.sizes[thing] for thing in things if thing is not None)

    def fits(self, choice: Choice) -> bool:
        """Whether no limit is exceeded."""
        size_fits = self.size_limit is None or self.size(choice) <= self.size_limit * (1 + TOLERANCE)
        return size_fits and all(v <= self.limits[n] * (1 + TOLERANCE) for n, v in self.used(choice).items())


def check_possible(problem: Problem) -> None:
    """Raises UserError naming a limit that even the leanest options exceed, and the least it can be."""
    for name, limit in problem.limits.items():
        least = sum(min(option.uses[name] for option in cell) for cell in problem.cells)
        if least > limit * (1 + TOLERANCE):
            raise UserError(f"{name}={limit:g} is not possible: the least that the choices allow is {least:.6g}.")
    if _fits_size(problem, _least(problem, lambda option: _size_of(problem, option))):
        return
    smallest = _smallest(problem)  # cells that share a larger thing may take less than cells with the smallest each
    if not _fits_size(problem, smallest):
        least = problem.size(smallest)
        raise UserError(
            f"size_bytes={problem.size_limit:g} is not possible: the least that the choices allow is {least:.0f}."
        )


def _least(problem: Problem, load: Callable[[Option], float]) -> Choice:
    """In each cell the option of the least load."""
    loads = [[load(option) for option in cell] for cell in problem.cells]
    return tuple(of_cell.index(min(of_cell)) for of_cell in loads)


def _size_of(problem: Problem, option: Option) -> float:
    return 0.0 if option.keeps is None else problem.sizes[option.keeps]


def _fits_size(problem: Problem, choice: Choice) -> bool:
    return problem.size_limit is None or problem.size(choice) <= problem.size_limit * (1 + TOLERANCE)


def solve_greedy(problem: Problem) -> Choice:
    """From the leanest options upwards, always the change that saves most cost for what it uses of the limits' room.

    Ends within the limits or raises UserError, as it does where limits contradict each other for the leanest options.
    """
    check_possible(problem)
    weight = {name: 1 / limit for name, limit in problem.limits.items()}
    by_size = 0.0 if problem.size_limit is None else 1 / problem.size_limit

    def load(option: Option) -> float:
        return sum(weight[n] * option.uses[n] for n in weight) + by_size * _size_of(problem, option)

    choice = [*_least(problem, load)]
    if not problem.fits(tuple(choice)):
        raise UserError("The greedy solver found nothing within all limits; use solver=exact, or give more room.")
    while (better := _best_change(problem, choice, load)) is not None:
        cell, option = better
        choice[cell] = option
    return tuple(choice)


def _best_change(problem: Problem, choice: list[int], load: Callable[[Option], float]) -> tuple[int, int] | None:
    best, best_gain = None, 0.0
    for c, cell in enumerate(problem.cells):
        now = cell[choice[c]]
        for i, option in enumerate(cell):
            saved, more = now.cost - option.cost, load(option) - load(now)
            if saved <= 0:
                continue
            gain = saved / more if more > 0 else inf
            if gain > best_gain and problem.fits((*choice[:c], i, *choice[c + 1 :])):
                best, best_gain = (c, i), gain
    return best


def solve_exact(problem: Problem) -> Choice:
    """The cheapest choice within the limits; raises UserError where there is none.

    Costs may span many decades: options that alone cost more than a choice already found are left out, and those that
    remain are solved again on a scale of their own.
    """
    check_possible(problem)
    cheapest = (min(option.cost for option in cell) for cell in problem.cells)
    extras = [[option.cost - least for option in cell] for cell, least in zip(problem.cells, cheapest, strict=True)]
    every = [extra for cell in extras for extra in cell]
    most, of_things = inf, [0.0] * len(problem.sizes)
    while True:
        choice = _minimize(problem, [extra if extra <= most else inf for extra in every], of_things)
        if choice is None:
            raise UserError("No choice lies within all limits together; give more room to one of them.")
        largest = max(extra for extra in every if extra <= most)
        most = sum(cell[i] for cell, i in zip(extras, choice, strict=True))
        if most == 0 or most > largest / 2:
            return choice


def _smallest(problem: Problem) -> Choice:
    """That of the least size, whatever else it uses."""
    unlimited = replace(problem, limits={}, size_limit=inf)
    choice = _minimize(unlimited, [0.0] * sum(map(len, problem.cells)), list(problem.sizes.values()))
    assert choice is not None
    return choice


def _minimize(problem: Problem, of_options: Sequence[float], of_things: Sequence[float]) -> Choice | None:
    """The choice of the least summed costs of its options (inf: not to be taken) and of what it keeps, if there is one.

    Columns: one per option (0 or 1), then, with a size limit, one per thing: at least every option that keeps it.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    rows, low, high = _rows(problem)
    num_things = len(problem.sizes) if problem.size_limit is not None else 0
    entries = [(r, column, value) for r, row in enumerate(rows) for column, value in row.items()]
    r, columns, values = (list(of) for of in zip(*entries, strict=True))
    costs = np.array([*of_options, *of_things[:num_things]])
    allowed = np.isfinite(costs)
    costs[~allowed] = 0.0
    matrix = coo_array((values, (r, columns)), shape=(len(rows), len(costs))).tocsr()
    result = milp(
        costs / (costs.max() or 1.0) * LARGEST_COST,
        integrality=np.array([1] * len(of_options) + [0] * num_things),
        bounds=Bounds(0, allowed.astype(float)),
        constraints=LinearConstraint(matrix, low, high),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    choice, start = [], 0
    for cell in problem.cells:
        choice.append(int(result.x[start : start + len(cell)].argmax()))
        start += len(cell)
    return tuple(choice)


def _rows(problem: Problem) -> tuple[list[dict[int, float]], list[float], list[float]]:
    """Constraints as (column -> value) with their lower and upper bounds, limits scaled to 1."""
    options = [(c, option) for c, cell in enumerate(problem.cells) for option in cell]
    cells: list[dict[int, float]] = [{} for _ in problem.cells]
    for column, (c, _) in enumerate(options):
        cells[c][column] = 1.0
    low, high, rows = [1.0] * len(cells), [1.0] * len(cells), cells
    for name, limit in problem.limits.items():
        rows.append({column: option.uses[name] / limit for column, (_, option) in enumerate(options)})
        low, high = [*low, -inf], [*high, 1.0]
    if problem.size_limit is not None:
        things = {thing: len(options) + i for i, thing in enumerate(problem.sizes)}
        rows.append({column: problem.sizes[thing] / problem.size_limit for thing, column in things.items()})
        kept = [(column, option.keeps) for column, (_, option) in enumerate(options) if option.keeps is not None]
        rows += [{column: 1.0, things[thing]: -1.0} for column, thing in kept]
        room = 1.0 - problem.always / problem.size_limit
        low, high = [*low, *[-inf] * (1 + len(kept))], [*high, room, *[0.0] * len(kept)]
    return rows, low, high


SOLVERS = {"exact": solve_exact, "greedy": solve_greedy}

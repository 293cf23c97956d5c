"""Which rows of a leaderboard rank together: those of the same inputs, that is seeds, prompts and float samples."""

from collections import defaultdict
from collections.abc import Sequence

from viditq.report.row import Row

INPUTS_NOTE = (
    "Rows rank, and stand in plots, only beside rows of the same inputs: seeds, prompts, and the float samples that "
    "they are set against (which the model's weights and sampling settings decide). Plots show those of most rows."
)


def by_inputs(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same inputs together; first come the inputs of most rows, then those of most seeds and prompts."""
    groups: dict[tuple[tuple[int, str], ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.inputs].append(row)

    def size(group: Sequence[Row]) -> tuple[int, int, int, tuple[tuple[int, str], ...]]:
        return -len(group), -len(group[0].seeds), -group[0].pairs, group[0].inputs

    return sorted(groups.values(), key=size)


def what_differs(row: Row, first: Row) -> str:
    """How a row's inputs differ from the first's: `seeds 0 1, other prompts`; empty where they do not."""
    words = []
    if row.seeds != first.seeds:
        words.append(f"seed{'s' * (len(row.seeds) > 1)} {' '.join(map(str, row.seeds))}")
    if row.prompts != first.prompts:
        words.append("other prompts")
    elif any(seed in first.seeds and (seed, samples) not in first.inputs for seed, samples in row.inputs):
        words.append("other float samples")
    return ", ".join(words)

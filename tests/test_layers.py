"""Imports go down: a module imports its own floor or a lower one, and nothing goes in a circle."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom. A room is a module or a folder with all that lies in it; the longest name counts.
FLOORS: list[list[str]] = [
    [
        *["errors", "files", "memory", "assets", "byte_numbers", "hooks", "kernels", "mapped", "on_disk", "parent"],
        *["prompt", "wav", "work_folder"],
    ],
    ["quant.numerics", "quant.description"],
    ["quant.calibration"],
    ["quant.methods"],
    ["quant.execution"],
    ["quant.reconstruction"],
    ["quant.convert"],
    ["quant.diagnosis"],
    ["quant.search", "quant.correction"],
    ["quant.artifact", "quant.artifact_writer", "quant.streaming", "quant.setting", "quant.text_encoder"],
    ["quant.sizes", "quant"],
    ["models", "data", "metrics", "report"],
    ["engine", "fusion", "tiny", "run_dir", "seconds"],
    [
        *[
            "",
            "__main__",
            "cache_entries",
            "callbacks",
            "card",
            "checks",
            "checkpoints",
            "cli",
            "commands",
            "conf_folder",
            "config",
        ],
        *["console", "describe", "ending", "equipment", "estimate", "experiment", "external", "plans"],
        *[
            "export",
            "finished",
            "forecast",
            "gate",
            "importing",
            "interop",
            "job",
            "layer_table",
            "log_file",
            "out_of_memory",
        ],
        *[
            "loading",
            "lora",
            "nulls",
            "program",
            "provenance",
            "run_name",
            "runner",
            "settled",
            "shown_config",
            "signatures",
            "stages",
            "summary",
            "sweeps",
        ],
        *["treated_parts", "trial", "worker"],
    ],
]
BASIC = set(FLOORS[0])
# Rooms that share a floor without knowing each other; models, data, metrics and report do not know quant either.
APART = [{"quant.numerics", "quant.description"}, {"quant.search", "quant.correction"}]
SIBLINGS = {"models", "data", "metrics", "report"}
ABOVE_ONLY = {"hydra", "omegaconf", "lightning", "pytorch_lightning", "lightning_fabric", "wandb"}
TOP_FLOORS = 2  # those that may import ABOVE_ONLY
ENTRIES_IN_QUANT = 8  # beside folders
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "viditq").rglob("*.py"))
}


def room_of(module: str) -> tuple[int, str]:
    """Floor and name of the longest entry of FLOORS that `module` lies in."""
    parts = module.split(".")[1:]
    for length in range(len(parts), -1, -1):
        name = ".".join(parts[:length])
        floor = next((i for i, names in enumerate(FLOORS) if name in names), None)
        if floor is not None and (name or not parts) and (name != "quant" or module == "viditq.quant"):
            return floor, name
    raise AssertionError(f"{module} is in no room: put it into one, or add a room to FLOORS in {__file__}")


@cache
def imports(path: Path) -> set[str]:
    """Every module that `path` imports, at the top, inside a function or for type checking; not to be changed."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def all_imports() -> dict[str, set[str]]:
    """Not as the tests are collected, which each of the processes that run them does."""
    return {module: imports(path) for module, path in MODULES.items()}


def complaint(module: str, imported: str) -> str | None:
    """What is wrong with this import, and where the line would have to live."""
    (floor, room), (target_floor, target) = room_of(module), room_of(imported)
    names = " or ".join(name or "the top of viditq" for name in FLOORS[target_floor])
    if target_floor > floor:
        return (
            f"{module} lies in {room} (floor {floor}) and imports {imported} from {target} (floor {target_floor}). "
            f"What needs it has to move up, to {names} or above; what is imported could move down, to {room} or below."
        )
    for pair in APART:
        if {room, target} == pair:
            return f"{module} imports {imported}: {room} and {target} do not know each other. Move it above both."
    if room in SIBLINGS and target != room and target not in BASIC:
        return (
            f"{module} imports {imported}: {room} knows itself, {', '.join(sorted(BASIC))} alone. "
            "What needs both has to move up, to engine or stages."
        )
    return None


def complaints(module: str) -> Iterator[str]:
    floor, room = room_of(module)
    for imported in imports(MODULES[module]):
        top = imported.split(".")[0]
        if top == "viditq" and (wrong := complaint(module, imported)):
            yield wrong
        if floor < len(FLOORS) - TOP_FLOORS and top in ABOVE_ONLY:
            may = ", ".join(name for names in FLOORS[-TOP_FLOORS:] for name in names if name)
            yield f"{module} lies in {room} (floor {floor}) and imports {top}, which only {may} may: move it there."


def test_imports_go_down() -> None:
    found = [wrong for module in MODULES for wrong in complaints(module)]
    assert not found, "\n".join(found)


def test_a_complaint_says_which_room_a_line_would_have_to_move_to() -> None:
    upward = complaint("viditq.quant.numerics.affine", "viditq.quant.methods.quantizer")
    assert upward is not None and "move up, to quant.methods or above" in upward
    assert "no room" not in (complaint("viditq.quant.numerics.packing", "viditq.quant.description.plan") or "no room")
    sideways = complaint("viditq.metrics.flow", "viditq.quant.convert")
    assert sideways is not None and "engine or stages" in sideways
    assert complaint("viditq.quant.convert", "viditq.quant.numerics.affine") is None
    with pytest.raises(AssertionError, match="is in no room"):
        room_of("viditq.quant.new_file")


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Each import circle once found, as the modules along it; a package stands for its own __init__ alone."""
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> Iterator[list[str]]:
        state[module] = 1
        for imported in sorted(graph.get(module, set())):
            if state.get(imported) == 1:
                yield [*path[path.index(imported) :], imported]
            elif imported not in state and imported in graph:
                yield from visit(imported, [*path, imported])
        state[module] = 2

    for module in graph:
        if module not in state:
            yield from visit(module, [module])


def test_no_import_goes_in_a_circle() -> None:
    found = [" -> ".join(circle) for circle in circles(all_imports())]
    assert not found, "import circles: " + "; ".join(found)


def test_circles_are_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == [["a", "b", "c", "a"]]
    assert list(circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})) == []


def test_quant_needs_torch_only() -> None:
    """The solver of a search needs scipy; `import viditq.quant` brings in no search."""
    allowed = {"torch", "safetensors", "viditq", *sys.stdlib_module_names}
    for module in (module for module in MODULES if module.startswith("viditq.quant")):
        more = {"numpy", "scipy"} if module == "viditq.quant.search.knapsack" else set()
        if module.startswith("viditq.quant.execution.backends.triton.") and module.endswith(
            "kernels"
        ):  # when asked for
            more = {"triton"}
        found = {name.split(".")[0] for name in imports(MODULES[module])} - allowed - more
        assert not found, f"{module} imports {', '.join(sorted(found))}"


def test_a_notebook_s_import_brings_in_no_search() -> None:
    seen, waiting = set(), ["viditq.quant"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting += [name for name in imports(MODULES[module]) if name in MODULES and name not in seen]
    assert not [name for name in seen if name.startswith("viditq.quant.search")]


def test_quant_is_rooms_not_a_hall() -> None:
    entries = [path.name for path in (ROOT / "viditq" / "quant").iterdir() if path.is_file()]
    assert len(entries) <= ENTRIES_IN_QUANT, f"{entries}: put new files into one of the rooms"


@pytest.mark.parametrize("path", sorted((ROOT / "viditq").glob("quant/*/__init__.py")), ids=lambda p: p.parent.name)
def test_a_room_says_what_it_is_for_and_what_it_may_not_know(path: Path) -> None:
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
    assert " Knows no" in first or "not " in first, f"{path}: {first!r}"

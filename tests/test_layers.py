"""Imports go down: a module imports its own floor or a lower one."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {
        "errors",
        "files",
        "assets",
        "knapsack",
        *(f"quant.{n}" for n in ["granularity", "affine", "packing", "hadamard", "registry", "strict"]),
        *(f"quant.{n}" for n in ["noise_level", "blocks"]),
    },
    {"quant.specs", "quant.scheme", "quant.plan", "quant.recipe", "quant.quantizer"},
    {
        *(f"quant.{n}" for n in ["observers", "moments", "error_sums", "transforms", "ranges", "rounding"]),
        *(f"quant.{n}" for n in ["low_rank", "fit", "incoherence"]),
    },
    {"quant.context", "quant.linear", "quant.backends"},
    {
        *("quant", "quant.observed_diagnosis"),
        *(
            f"quant.{n}"
            for n in ["calibration", "convert", "artifact", "diagnosis", "reached", "sizes", "sensitivity", "allocate"]
        ),
    },
    {"models", "data", "metrics", "report"},
    {"engine", "tiny", "run_dir"},
    {
        "",
        "callbacks",
        "checks",
        "cli",
        "config",
        "console",
        "estimate",
        "experiment",
        "gate",
        "job",
        "loading",
        "provenance",
        "runner",
        "signatures",
        "stages",
        "summary",
        "sweep",
        "sweep_table",
        "tuning",
        "worker",
    },
]
SIBLINGS = 5  # models, data, metrics and report import neither each other nor quant
ABOVE_ONLY = {"hydra", "omegaconf", "lightning", "pytorch_lightning", "lightning_fabric", "wandb"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "viditq").rglob("*.py"))
}


def room(module: str) -> tuple[int, str]:
    """Floor and name of the longest entry of FLOORS that `module` lies in."""
    parts = module.split(".")[1:]
    for length in range(len(parts), -1, -1):
        name = ".".join(parts[:length])
        floor = next((i for i, names in enumerate(FLOORS) if name in names), None)
        if floor is not None and (name or not parts):
            return floor, name
    raise AssertionError(f"{module} is on no floor: add it to FLOORS in {__file__}")


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    floor, name = room(module)
    for imported in imports(MODULES[module]):
        top = imported.split(".")[0]
        if top == "viditq":
            target_floor, target = room(imported)
            assert target_floor <= floor, f"{module} (floor {floor}) imports {imported} (floor {target_floor})"
            own_or_basic = target == name or (target_floor == 0 and not target.startswith("quant"))
            assert floor != SIBLINGS or own_or_basic, f"{module} imports {imported}, which is no room of its own"
        assert floor >= 6 or top not in ABOVE_ONLY, f"{module} (floor {floor}) imports {top}"


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("viditq.quant")])
def test_quant_needs_torch_only(module):
    allowed = {"torch", "safetensors", "viditq", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(MODULES[module])} <= allowed

#!/usr/bin/env bash
# scipy's milp (HiGHS) calls a solution optimal that costs more than another one, where objectives are small numbers.
#
# Expected: with mip_rel_gap=0 the reported optimum is the best one, whatever unit the costs are in.
# Seen with scipy 1.17.1: of two feasible choices that cost 2e-7 and 1e-7, the dearer may be returned with status 0 and mip_gap 0.0: HiGHS
# also stops at an absolute gap (1e-6 unless set), which scipy does not let one set. Mean squared errors, the costs of a search
# for bit-widths, are such numbers. What helps: divide costs by their smallest difference, or by the cheapest bound, before solving.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scipy==1.17.1 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import itertools
import numpy as np
import scipy
from scipy.optimize import Bounds, LinearConstraint, milp

print("scipy", scipy.__version__)


def worst_excess(unit: float) -> float:
    """The largest (found - best) / best of 60 random problems: 8 cells, 3 options each, one limit; costs about `unit`."""
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(60):
        costs, sizes = rng.uniform(1, 9, (8, 3)) * unit, rng.integers(2, 9, (8, 3)).astype(float)
        limit = float(sizes.mean() * 8)
        one_each = np.kron(np.eye(8), np.ones(3))
        limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes.reshape(1, -1), -np.inf, limit)]
        found = milp(costs.ravel(), constraints=limits, integrality=np.ones(24), bounds=Bounds(0, 1), options={"mip_rel_gap": 0})
        if found.status != 0:
            continue
        chosen = np.round(found.x).reshape(8, 3)
        best = min(
            sum(costs[i, o] for i, o in enumerate(options))
            for options in itertools.product(range(3), repeat=8)
            if sum(sizes[i, o] for i, o in enumerate(options)) <= limit
        )
        worst = max(worst, float((chosen * costs).sum() / best - 1))
    return worst


found = {unit: worst_excess(unit) for unit in (1.0, 1e-4, 1e-8)}
print("most that a reported optimum costs above the best, by the unit of costs:", {u: f"{100 * e:.2g} %" for u, e in found.items()})
assert found[1.0] < 1e-6 and found[1e-8] > 1e-3, "the behaviour has changed"
PY

"""Search plans for one or several budgets without a whole run; what is measured once serves every budget.

python scripts/search_plan.py experiment=w4a8_mp_search
python scripts/search_plan.py experiment=w4a8_mp_search --weight-bits 4.5 5 6 --out outputs/plans
python run.py quant/policy=plan_file quant.policy.path=outputs/plans/tiny_video/weight_bits_5/plan.json

Overrides are those of run.py, but for the folder, which --out chooses, and the stages. Each budget leaves plan.json,
search.json and sensitivity.png in a folder of its own; quality against bits of all of them is printed and drawn
(budget_curve.png), measured on the search's prompts.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from viditq import config
from viditq.cli import guarded
from viditq.errors import UserError
from viditq.files import atomic, read_json
from viditq.report.budget_curve import budget_curve_picture, curve_table
from viditq.runner import run

CONF = Path(__file__).parents[1] / "conf"
STAGES = "stages=[prompts,calibrate,search]"
CHOICE = "--out FOLDER"
REFUSED = {  # keys of run.py that mean nothing here -> what to do
    "hydra": f"Choose the folder with {CHOICE}; nothing is swept",
    "launcher": "Leave it out: nothing is swept",
    "stages": f"Leave it out: the stages are {STAGES[7:]}",
    "quant/policy": "Leave it out: the policy is sensitivity",
}


def configured(overrides: list[str]) -> DictConfig:
    """conf/config.yaml with the policy sensitivity (unless the experiment has it) and these overrides.

    Raises UserError for overrides that would do nothing.
    """
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        remedy = REFUSED.get(key) or REFUSED.get(re.split("[./]", key)[0])
        if remedy and text != "quant/policy=sensitivity":
            raise UserError(f"search_plan.py does not take {text}. {remedy}.")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["quant/policy=sensitivity", "logger=none", "name=plan", *overrides, STAGES])


def search_all(overrides: list[str], budgets: list[float], out: Path) -> None:
    """One search per budget, and their curve."""
    points: list[dict[str, Any]] = []
    for bits in budgets or [None]:  # type: ignore[list-item]
        budget = [] if bits is None else [f"quant.policy.budget.weight_bits={bits:g}"]
        cfg = configured([*overrides, *budget, "quant.policy.curve=[0]"])
        folder = out / cfg.model.name / ("plan" if bits is None else f"weight_bits_{bits:g}")
        run(cfg, folder, CHOICE)
        if config.only_estimates(cfg):  # nothing was searched
            continue
        found = read_json(folder / "search.json")
        points += found["curve"]
    if not points:
        return
    print(curve_table(found, points))
    budget_curve_picture({**found, "curve": points}, out / cfg.model.name / "budget_curve.png")
    with atomic(out / cfg.model.name / "budget_curve.md") as temporary:
        temporary.write_text(curve_table(found, points))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as run.py takes them")
    parser.add_argument("--weight-bits", nargs="+", type=float, default=[], help="budgets; default: that of the policy")
    parser.add_argument("--out", type=Path, default=Path("outputs/plans"))
    args = parser.parse_args()
    config.register()
    debug = DictConfig({"debug": "debug=true" in args.overrides})
    sys.exit(
        guarded(
            debug,
            lambda: search_all(args.overrides, args.weight_bits, args.out),
            choice=f"{CHOICE} and cache_dir=FOLDER",
        )
    )


if __name__ == "__main__":
    main()

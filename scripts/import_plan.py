"""Turn the original project's mixed-precision yaml files into a plan.json.

python scripts/import_plan.py --weight t20_weight_4_mp.yaml --activation t20_act_8_mp.yaml --out plan.json
python run.py model=opensora_v1 quant=w4a8 quant/policy=plan_file quant.policy.path=plan.json

Formats (per-channel weights, per-token activations) and smoothing come from a recipe: any choice of the group quant,
with overrides, as `python run.py` takes them.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from viditq import config
from viditq.cli import guarded
from viditq.errors import UserError
from viditq.files import atomic
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.description.step_ranges import RENAMES, import_plan
from viditq.quant.setting import QuantSetting

CONF = Path(__file__).parents[1] / "conf"


def read(path: Path | None) -> Any:
    """The values of a yaml file; None without one."""
    if path is None:
        return None
    try:
        fields = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as yaml: {error}") from error
    return {} if fields is None else fields  # an empty file


def scheme_of(overrides: list[str]) -> LayerScheme:
    """The scheme that a recipe gives any Linear; raises UserError if it differs by segment or quantizes nothing."""
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        setting: QuantSetting = instantiate(compose("config", ["name=import", *overrides]).quant, _convert_="all")
    plan = setting.recipe.with_rules([]).resolve(["any"])
    if len(plan.schemes) != 1:
        raise UserError("the recipe must treat all segments alike and quantize something, such as --recipe quant=w4a8.")
    return next(iter(plan.schemes.values()))


def write(args: argparse.Namespace) -> None:
    """The plan as --out, and a line about it."""
    weights, activations = read(args.weight), read(args.activation)
    labels = (str(args.weight), str(args.activation))
    plan = import_plan(weights, activations, RENAMES[args.names], scheme_of(args.recipe), labels=labels)
    with atomic(args.out) as temporary:
        temporary.write_text(plan.to_json())
    schemes = ", ".join(sorted(plan.schemes))
    print(f"{len(plan.layers)} Linears in {plan.num_segments} segments with {schemes}: {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", type=Path, help="yaml with the bits of weights")
    parser.add_argument("--activation", type=Path, help="yaml with the bits of activations")
    parser.add_argument("--names", default="open_sora", choices=sorted(RENAMES), help="how layers are called here")
    parser.add_argument("--recipe", nargs="+", default=["quant=w4a8"], help="overrides that choose the formats")
    parser.add_argument("--out", type=Path, default=Path("plan.json"))
    args = parser.parse_args()
    debug = DictConfig({"debug": False})
    sys.exit(guarded(debug, lambda: write(args), choice="--out FILE"))


if __name__ == "__main__":
    main()

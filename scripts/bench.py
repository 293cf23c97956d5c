"""The bench of docs/bench.md: methods, float formats, rivals and `best` on the tiny models; the same command resumes.

    python scripts/bench.py                                  # with the extra rivals (docs/bench.md)
    python scripts/bench.py --models tiny_image --seeds 0    # part of it
    python scripts/bench.py --parts best table               # with the runs that are there

The last part, `table`, sets `best` against every other row of no fewer bytes, by paired differences.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from viditq.errors import UserError
from viditq.files import read_json
from viditq.run_dir import overrides_of
from viditq.sweeps.equal_bytes import equal_bytes
from viditq.sweeps.gathered import is_run

ROOT = Path(__file__).parents[1]
MODELS = ("tiny_image", "tiny_image_hard", "tiny_video", "tiny_video_hard")
NUM_PROMPTS, NUM_CLIPS = 32, 16
STEP = 10_000  # of a budget in bytes, in which seeds do not differ
STAGES = "stages=[prompts,reference,noise_floor,calibrate,search,quantize,generate,benchmark,evaluate]"
COMMON = (STAGES, "diagnosis.num_prompts=0", "logger=none", "benchmark.rounds=5")
METHODS = "experiment=naive,per_token,smoothquant,viditq,q_dit,svdquant"
EXTERNAL = "torchao_int8_dynamic sdnq_int8 torchao_int8 quanto_int8 sdnq_uint4 sdnq_uint4_svd quanto_int4"


@dataclass(frozen=True)
class Best:
    """`best` in no more bytes than a run of `recipe`, with activations of so many bits."""

    recipe: str
    bits: str = ""
    activation: int = 8

    @property
    def name(self) -> str:
        return "_".join(part for part in ("best", self.recipe, self.bits) if part)

    def overrides(self, folder: Path, seeds: Sequence[int]) -> list[str]:
        """folder: of the model's runs. Raises UserError where those of the recipe are not there."""
        bits, sizes = [f"bits={self.bits}"] if self.bits else [], []
        for seed in seeds:
            found = [run for run in sorted(folder.glob("*")) if is_run(run) and _is(run, self.recipe, bits, seed)]
            if not found:
                what = f"{self.recipe} {self.bits}".strip()
                raise UserError(
                    f"{folder} has no run of {what} with seed {seed}: run the parts before {self.name} first."
                )
            sizes.append(int(read_json(found[0] / "metrics.json")["size_bytes"]))
        choices = f"quant.policy.activation_choices=[{self.activation}]"
        size = min(sizes) // STEP * STEP
        return ["experiment=best", f"name={self.name}", f"quant.policy.budget.size={size}", choices]


Sweep = Sequence[str] | Best
SWEEPS: Mapping[str, Sequence[Sweep]] = {
    "methods": [(METHODS, "bits=w8a8,w4a8")],
    "rivals": [("quant=" + ",".join(f"external/{name}" for name in EXTERNAL.split()),)],
    "weights": [
        ("quant=w8,w4",),
        ("quant=w4", "quant/format@quant.weight=int4_group64", "quant/rounding=gptq", "name=w4_group64_gptq"),
    ],
    "formats": [("quant=w8a8_fp8,w8a8_mxfp8,w4a8_mxfp4,w4a4_mxfp4,w4a4_nvfp4",)],
    "best": [
        *(Best(recipe, bits) for bits in ("w4a8", "w8a8") for recipe in ("q_dit", "per_token")),
        *(Best(recipe, activation=16) for recipe in ("w4_group64_gptq", "w8")),
    ],
    "widths": [(METHODS, "bits=w6a6,w4a4"), Best("q_dit", "w6a6", activation=6), Best("q_dit", "w4a4", activation=4)],
}
PARTS = (*SWEEPS, "table")


def _is(run: Path, recipe: str, bits: Sequence[str], seed: int) -> bool:
    config = read_json(run / "run.json")
    return config["name"] == recipe and config["seed"] == seed and {*bits} <= {*overrides_of(run)}


def commands(model: str, part: str, seeds: Sequence[int], outputs: Path) -> Iterator[list[str]]:
    """The overrides of each sweep of a part."""
    count = NUM_CLIPS if "video" in model else NUM_PROMPTS
    common = [f"model={model}", f"seed={','.join(map(str, seeds))}", f"data.num_prompts={count}", *COMMON]
    common += [f"hydra.sweep.dir={outputs}", f"cache_dir={outputs / '_cache'}"]
    for sweep in SWEEPS[part]:
        yield [*(sweep.overrides(outputs / model, seeds) if isinstance(sweep, Best) else sweep), *common]


def run(models: Sequence[str], parts: Sequence[str], seeds: Sequence[int], outputs: Path) -> int:
    """The exit status: 0, or of the sweeps that went wrong the first one's; the others run all the same."""
    status = 0
    for model in models:
        for part in (part for part in parts if part != "table"):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            for overrides in commands(model, part, seeds, outputs):
                code = subprocess.run([sys.executable, str(ROOT / "run.py"), "-m", *overrides], cwd=ROOT).returncode
                status = status or code
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            minutes = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
            print(f"bench: {model}, {part}: {minutes:.1f} minutes of processor time", flush=True)
    if "table" in parts:
        print(equal_bytes([*(str(outputs / model) for model in models)], is_best))
    return status


def is_best(name: str) -> bool:
    return name.startswith("best_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = [model for model in MODELS if (ROOT / f"conf/model/{model}.yaml").is_file()]
    parser.add_argument("--models", nargs="+", choices=shipped, default=shipped)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--outputs", type=Path, default=Path("outputs/bench"))
    args = parser.parse_args()
    try:
        sys.exit(run(args.models, args.parts, args.seeds, args.outputs.resolve()))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

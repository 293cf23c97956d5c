"""Set runs of the same model, seed and prompts side by side: pictures in rows and paired differences.

    python scripts/compare_runs.py outputs/tiny_video/w4a8_naive outputs/tiny_video/w4a8_ts_smooth \\
        --prompts 0 3 5 --out comparison.png      # comparison.gif: in motion

The first row is the float model. Differences are per prompt against the first run, with their standard error.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from viditq.cli import user_message
from viditq.data.samples import load_sample
from viditq.errors import UserError
from viditq.files import read_mapping
from viditq.report.pictures import rows_gif, rows_picture
from viditq.run_dir import check_folder
from viditq.sweeps.unfinished import why_left_out

FIRST = 3  # prompts, where none are chosen


def clips(folder: Path, indices: list[int]) -> Tensor:
    """The samples of these prompts, uint8 [B, F, C, H, W]."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing. The run's own command samples again what is gone.")
    files = {int(path.stem): path for path in folder.iterdir() if path.stem.isdigit() and path.suffix != ".wav"}
    absent = [i for i in indices if i not in files]
    if absent:
        raise UserError(f"{folder} has no sample of prompt {absent[0]}; it has {len(files)}.")
    return torch.stack([load_sample(files[i]) for i in indices])


def read(run: Path) -> dict[str, Any]:
    """A finished run's per_prompt.json."""
    if not (run / "per_prompt.json").is_file():
        raise UserError(f"{why_left_out(run)}. A finished run is needed, which has a per_prompt.json.")
    return read_mapping(run / "per_prompt.json", ("prompts", "metrics", "reference"))


def print_differences(names: list[str], results: list[dict[str, Any]]) -> None:
    """For every metric with one value per prompt: later runs minus the first."""
    for name, other in zip(names[1:], results[1:], strict=True):
        print(f"{name} minus {names[0]}, {len(other['prompts'])} prompts")
        for metric in (m for m in other["metrics"] if m in results[0]["metrics"] and not m.endswith("_float")):
            pairs = zip(other["metrics"][metric], results[0]["metrics"][metric], strict=True)
            known = torch.tensor([mine - first for mine, first in pairs if None not in (mine, first)])
            if not len(known):
                print(f"  {metric:12s} undefined")
                continue
            error = f"{known.std() / len(known) ** 0.5:.4f}" if len(known) > 1 else "unknown, of one prompt"
            print(f"  {metric:12s} {known.mean():+9.4f} ± {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--prompts", nargs="+", type=int, help="their numbers, from 0 (default: the first three)")
    parser.add_argument("--labels", nargs="+", help="one per run (default: its folder's name)")
    parser.add_argument("--out", type=Path, default=Path("outputs/comparison.png"), help="a .png, or a .gif")
    args = parser.parse_args()
    try:
        check_folder(str(args.out.parent), "--out FILE")
        if args.out.suffix not in (".png", ".gif"):
            raise UserError(f"--out {args.out}: the name of a picture ends with .png or .gif.")
        results = [read(run) for run in args.runs]
        if any(r["prompts"] != results[0]["prompts"] for r in results):
            raise UserError("These runs have different prompts, so their samples cannot be paired.")
        if len({Path(r["reference"]).name for r in results}) > 1:
            raise UserError("These runs have different float samples (seed, model or steps): they cannot be paired.")
        labels = args.labels or [run.name for run in args.runs]
        if len(labels) != len(args.runs):
            raise UserError(f"{len(labels)} labels for {len(args.runs)} runs; give one for each.")
        shown = args.prompts or [*range(min(FIRST, len(results[0]["prompts"])))]
        rows = [("float", clips(Path(results[0]["reference"]), shown))]
        rows += [(label, clips(run / "samples", shown)) for label, run in zip(labels, args.runs, strict=True)]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw = rows_gif if args.out.suffix == ".gif" else rows_picture
        draw(rows, args.out, [results[0]["prompts"][i] for i in shown])
    except (UserError, OSError) as error:
        sys.exit(f"error: {user_message(error, '--out FILE') or error}")
    print_differences(labels, results)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()

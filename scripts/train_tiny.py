"""Train everything this project ships: judge, VAE, text encoder, image and video denoiser, CLIP.

    python scripts/train_tiny.py                       # all stages, resumes where it stopped
    python scripts/train_tiny.py --stages judge vae    # some of them
    python scripts/train_tiny.py --stages image_hard video_hard export_hard   # docs/tiny_models.md
    python scripts/train_tiny.py --stages vae_i2v i2v export_i2v              # the image-to-video model
    python scripts/train_tiny.py --max-steps 3 --work /tmp/try --out /tmp/try/assets   # a quick look

Each stage trains with Lightning (checkpoints every 200 steps, csv logs) and ends by writing <work>/<stage>.safetensors.
The export stage lays the pipelines out as diffusers folders under --out; `scripts/judge_tiny.py` checks the gate.
"""

import argparse
from pathlib import Path

from viditq.tiny.stages import STAGES
from viditq.tiny.workshop import Workshop

SHIPPED = [stage for stage in STAGES if not stage.endswith(("_hard", "i2v"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/train_tiny"), help="checkpoints, logs, finished stages"
    )
    parser.add_argument("--out", type=Path, default=Path("viditq/assets"), help="where the pipelines are exported to")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=SHIPPED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, help="cap the steps of every stage (for tests)")
    args = parser.parse_args()
    if args.max_steps is not None and args.max_steps < 1:
        parser.error(f"--max-steps {args.max_steps}: give 1 or more")
    workshop = Workshop(args.work, args.out, args.seed, args.max_steps)
    for stage in args.stages:
        STAGES[stage](workshop)


if __name__ == "__main__":
    main()

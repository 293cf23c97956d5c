"""Do the tiny models draw what they are told? The gate for shipping them.

    python scripts/judge_tiny.py                  # 256 guided samples of each model
    python scripts/judge_tiny.py --models tiny_video --count 64

Prints the share of samples whose attributes the judge (checked on real clips first) reads as captioned. Exit status 1
if colour < 0.98, shape < 0.95, a motion direction < 0.95, or the judge itself < 0.99. tiny_i2v starts from the first
frames of real clips: its own first frame must be within 25 dB of them (median). Saves a contact sheet each.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from tqdm import tqdm

from viditq import config
from viditq.data.moving_shapes import ATTRIBUTES, SCENES, Scene, draw_scenes, labels, render
from viditq.data.samples import save_sample
from viditq.metrics.shapes import ShapesJudge, load_judge
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import generate
from viditq.models.text import encode_prompt
from viditq.prompt import Prompt
from viditq.report.pictures import rows_picture
from viditq.runner import quiet_libraries

CONF = Path(__file__).parents[1] / "conf"
GATE = {"color": 0.98, "shape": 0.95, "size": 0.95, "background": 0.95}
DIRECTION_GATE, JUDGE_GATE = 0.95, 0.99
FIRST_FRAME_GATE = 25.0  # dB
MODELS = ["tiny_image", "tiny_video", "tiny_image_hard", "tiny_video_hard", "tiny_i2v"]


@torch.no_grad()
def accuracies(judge: ShapesJudge, clips_BFCHW: Tensor, scenes: list[Scene], video: bool) -> dict[str, float]:
    """Attribute -> share read as captioned; for video also each motion direction on its own."""
    predicted = {name: logits.argmax(1) for name, logits in judge(clips_BFCHW.float() / 255).items()}
    wanted = labels(scenes)
    right = {name: (predicted[name] == wanted[name]).float() for name in ATTRIBUTES if video or name != "motion"}
    shares = {name: float(r.mean()) for name, r in right.items() if name != "motion"}
    for number, direction in enumerate(ATTRIBUTES["motion"] if video else ()):
        shares[f"motion {direction}"] = float(right["motion"][wanted["motion"] == number].mean())
    return shares


def first_frames(scenes: list[Scene], seed: int) -> Tensor:
    """The first frame of a real clip of each scene, uint8 [B, C, H, W]."""
    clips_BFCHW = render(scenes, torch.Generator().manual_seed(54_321 + seed))
    return (clips_BFCHW[:, 0] * 255).round().to(torch.uint8)


def prompts_of(adapter: ModelAdapter, scenes: list[Scene], seed: int, folder: Path) -> list[str]:
    """The scenes' captions; with first frames, written to `folder`, where the pipeline samples from one."""
    captions = [s.caption(adapter.modality == "video") for s in scenes]
    if not adapter.conditions:
        return captions
    prompts: list[str] = []
    for number, (caption, frame_CHW) in enumerate(zip(captions, first_frames(scenes, seed), strict=True)):
        file = folder / f"{number:04d}.png"
        save_sample(file, frame_CHW[None])
        prompts.append(Prompt(caption, {"image": file}))
    return prompts


def sample(adapter: ModelAdapter, prompts: list[str], seed: int, batch_size: int = 16) -> Tensor:
    """Guided samples of the prompts, uint8 [B, F, C, H, W]."""
    text = adapter.load_text_part()
    embeds = [encode_prompt(adapter, text, prompt) for prompt in prompts]
    pipeline = adapter.load()
    starts = range(0, len(prompts), batch_size)
    parts = []
    for start in tqdm(starts, desc=adapter.name):
        indices = list(range(start, min(start + batch_size, len(prompts))))
        parts.append(generate(adapter, pipeline, [embeds[i] for i in indices], indices, seed))
    return torch.cat(parts)


def first_frame_psnr(clips_BFCHW: Tensor, frames_BCHW: Tensor) -> float:
    """Median PSNR of the clips' first frames to the given ones, in dB."""
    error_B = (clips_BFCHW[:, 0].float() - frames_BCHW.float()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / error_B)).median())


def judge_itself(judge: ShapesJudge) -> dict[str, float]:
    """The judge's accuracies on 1,024 fresh real clips."""
    generator = torch.Generator().manual_seed(12_345)
    scenes = draw_scenes(1024, generator)
    clips = (render(scenes, generator) * 255).round().to(torch.uint8)
    return accuracies(judge, clips, scenes, video=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/judge_tiny"))
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count {args.count}: give 1 or more")
    quiet_libraries()
    config.register()
    judge = load_judge("shipped:judge")
    rows = {"judge on real clips": (judge_itself(judge), dict.fromkeys(ATTRIBUTES, JUDGE_GATE))}
    order = torch.randperm(len(SCENES), generator=torch.Generator().manual_seed(args.seed)).tolist()
    scenes = [SCENES[order[i % len(SCENES)]] for i in range(args.count)]
    for name in args.models:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            adapter = instantiate(compose("config", [f"model={name}"]).model, _convert_="all")
        with TemporaryDirectory() as folder:
            prompts = prompts_of(adapter, scenes, args.seed, Path(folder))
            clips = sample(adapter, prompts, args.seed)
        shares = accuracies(judge, clips, scenes, adapter.modality == "video")
        if adapter.conditions:
            shares["first frame, dB"] = first_frame_psnr(clips, first_frames(scenes, args.seed))
        rows[name] = (shares, GATE | {"first frame, dB": FIRST_FRAME_GATE})
        rows_picture([("float", clips[:12])], args.out / f"{name}.png", [str(p) for p in prompts[:12]], name)
        print(f"{name}: {args.out / name}.png")
    failed = False
    for name, (shares, gate) in rows.items():
        print(name)
        for attribute, share in shares.items():
            least = DIRECTION_GATE if attribute.startswith("motion") else gate.get(attribute, 0.0)
            failed |= share < least
            print(f"  {attribute:16s} {share:.4f}  (gate {least:.2f}) {'' if share >= least else 'FAILED'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Teach tiny_video a shape that it was never shown, the ring, by a LoRA in diffusers' form.

    python scripts/train_lora.py                           # a few minutes; leaves pytorch_lora_weights.safetensors
    python scripts/train_lora.py --steps 3 --out /tmp/try  # a quick look

Flow matching as in train_tiny.py, on the Linears of all blocks. Half of each batch are rings, half other scenes, so
that the word is learned and the other shapes stay. scripts/measure_lora.py judges it on a quantized model.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import LattePipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from viditq.assets import SHIPPED
from viditq.data.moving_shapes import SCENES, render
from viditq.files import write_tensors
from viditq.lora.branch import attach, branches
from viditq.lora.files import WEIGHT_NAMES, Update
from viditq.tiny import losses, networks
from viditq.tiny.captions import CAPTION_DROPOUT
from viditq.tiny.concept import WORD, concept_caption, concept_clips, concept_scenes
from viditq.tiny.text import encode, encode_null
from viditq.tiny.trainee import Batch, Schedule, Trainee

BATCH = 24  # as train_tiny.py has it
POOL = 1024  # clips of either kind


def add_trainable(denoiser: nn.Module, rank: int) -> dict[str, nn.Module]:
    """A LoRA of effect 0 beside every Linear of the blocks, alone trainable; returns them by name."""
    denoiser.requires_grad_(False)
    linears = {n: m for n, m in denoiser.named_modules() if "blocks." in n and isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        down_rC = torch.randn(rank, linear.in_features) / linear.in_features**0.5
        attach(linear, WORD, Update("transformer", name, down_rC, torch.zeros(linear.out_features, rank)), 1.0)
        for buffer in branches(linear)[0].buffers:
            part = getattr(linear, buffer)
            delattr(linear, buffer)
            linear.register_parameter(buffer, nn.Parameter(part))
    return dict(linears)


def weights_of(linears: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Under the names that diffusers and PEFT give them."""
    found = {}
    for name, linear in linears.items():
        for letter, buffer in zip("AB", branches(linear)[0].buffers, strict=True):
            found[f"transformer.{name}.lora_{letter}.weight"] = getattr(linear, buffer).detach()
    return found


@torch.no_grad()
def latents_of(vae: Any, clips_BFCHW: Tensor) -> Tensor:
    """[B, C, F, H, W], as the denoiser wants them."""
    parts = [vae.encode(part.flatten(0, 1) * 2 - 1).latent_dist.mode() for part in clips_BFCHW.split(64)]
    return torch.cat(parts).unflatten(0, clips_BFCHW.shape[:2]).transpose(1, 2)


def batches(pipeline: Any, count: int, seed: int) -> Callable[[torch.Generator], Batch]:
    """Draws batches from `count` clips of rings and as many of all other scenes, some without caption."""
    generator = torch.Generator().manual_seed(seed)
    learned = concept_scenes(held_out=False)
    scenes = [learned, SCENES]
    picks = [torch.randint(len(kind), (count,), generator=generator) for kind in scenes]
    clips = [
        draw([kind[i] for i in pick.tolist()], generator)
        for draw, kind, pick in zip((concept_clips, render), scenes, picks, strict=True)
    ]
    latents = torch.cat([latents_of(pipeline.vae, part) for part in clips])
    captions = [concept_caption(scene) for scene in learned] + [scene.caption(video=True) for scene in SCENES]
    text = encode(pipeline.text_encoder, pipeline.tokenizer, captions)
    text = torch.cat([text, encode_null(pipeline.text_encoder, pipeline.tokenizer, text.shape[1])[0]])
    rows = torch.cat([picks[0], picks[1] + len(learned)])

    def draw(generator: torch.Generator) -> Batch:
        drawn = torch.randint(count, (BATCH,), generator=generator)
        drawn[BATCH // 2 :] += count
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        return {"latents": latents[drawn], "text": text[torch.where(dropped, len(captions), rows[drawn])]}

    return draw


def train(steps: int, rank: int, rate: float, seed: int, pool: int) -> dict[str, Tensor]:
    """The LoRA's tensors by name, float32, averaged over the last steps."""
    torch.manual_seed(seed)
    pipeline = LattePipeline.from_pretrained(SHIPPED / "tiny_video", torch_dtype=torch.float32)
    denoiser = networks.video_denoiser()
    denoiser.load_state_dict(pipeline.transformer.state_dict())
    linears = add_trainable(denoiser, rank)
    schedule = Schedule(steps, rate, decay=0.5, warmup=20, ema_decay=0.98)
    trainee = Trainee(denoiser, batches(pipeline, pool, seed), losses.video_loss, schedule, seed)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(trainee, DataLoader(TensorDataset(torch.arange(steps))))  # batches are drawn by the trainee
    trainee.averaged()
    return weights_of(linears)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/lora"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("steps", "rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give 1 or more")
    file = args.out / WEIGHT_NAMES[0]
    write_tensors(file, train(args.steps, args.rank, args.rate, args.seed, POOL), {"format": "pt"})
    print(f"LoRA: {file}")


if __name__ == "__main__":
    main()

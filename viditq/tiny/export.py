"""Lay the trained networks out as the folders that ship: diffusers pipelines, a transformers CLIP, the judge."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, LattePipeline, PixArtAlphaPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from viditq.data.moving_shapes import FRAME_SIZE
from viditq.tiny import networks
from viditq.tiny.text import t5_tokenizer

FLOW_SHIFT = {"tiny_image": 2.0, "tiny_video": 4.0}


def export(shop: Any) -> None:
    """Write tiny_image/, tiny_video/, clip/ and judge/ under `shop.out`, weights in fp16."""
    _export_pipelines(shop, "", image="image", video="video")
    clip = networks.clip()
    clip.load_state_dict(load_file(shop.work / "clip.safetensors"))
    clip.half().save_pretrained(shop.out / "clip")
    t5_tokenizer().save_pretrained(shop.out / "clip")
    size = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size, "rescale_factor": 1 / 255}
    preprocessor |= {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_normalize": True}
    (shop.out / "clip" / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    _export_judge(shop.work / "judge.safetensors", shop.out / "judge")


def export_hard(shop: Any) -> None:
    """Write tiny_image_hard/ and tiny_video_hard/ under `shop.out`, weights in fp16."""
    _export_pipelines(shop, "_hard", image="image_hard_mild", video="video_hard_steep")


def _export_pipelines(shop: Any, kind: str, image: str, video: str) -> None:
    """image, video: the stages that the denoisers come from."""
    for name, cls, net, stage in (
        ("tiny_image", PixArtAlphaPipeline, networks.image_denoiser(), image),
        ("tiny_video", LattePipeline, networks.video_denoiser(), video),
    ):
        net.load_state_dict(load_file(shop.work / f"{stage}.safetensors"))
        _pipeline(cls, shop, net, name).to(torch.float16).save_pretrained(shop.out / f"{name}{kind}")


def _pipeline(cls: type[DiffusionPipeline], shop: Any, denoiser: nn.Module, name: str) -> DiffusionPipeline:
    return cls(
        tokenizer=t5_tokenizer(),
        text_encoder=shop.text_encoder,
        vae=shop.vae,
        transformer=denoiser,
        scheduler=networks.scheduler(FLOW_SHIFT[name]),
    )


def _export_judge(weights: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(networks.judge().config, indent=2) + "\n")
    save_file({k: v.half().contiguous() for k, v in load_file(weights).items()}, folder / "model.safetensors")

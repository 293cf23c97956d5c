"""The training stages, in order, and what each hands to the next (files under the work folder)."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from viditq.data.moving_shapes import ATTRIBUTES, draw_scenes, labels, render
from viditq.tiny import image_to_video, losses, networks
from viditq.tiny.captions import draw_captions, text_table
from viditq.tiny.export import export, export_hard
from viditq.tiny.hard import GAINS, MILD_GAINS, STEEP_GAINS, Gains, OutlierLoss, invite_outliers
from viditq.tiny.text import t5_tokenizer
from viditq.tiny.trainee import Batch
from viditq.tiny.workshop import Workshop, save

POOL_CLIPS = 16384


def train_judge(shop: Workshop) -> None:
    torch.manual_seed(shop.seed)
    shop.train("judge", networks.judge(), partial(losses.draw_clips, count=32), losses.judge_loss)


def train_vae(shop: Workshop) -> None:
    """Train the VAE, then fold the latents' mean and deviation into its 1x1 convolutions: unit latents."""
    torch.manual_seed(shop.seed)
    net = networks.vae()
    net = shop.train("vae", net, partial(losses.draw_frames, count=32), losses.vae_loss)
    generator = torch.Generator().manual_seed(shop.seed + 1)
    frames = losses.draw_frames(generator, 2048 if shop.max_steps is None else 256)["frames"] * 2 - 1
    with torch.no_grad():
        latents = torch.cat([net.encode(f).latent_dist.mode() for f in frames.split(256)])
    networks.to_unit_latents(net, latents)
    save(net, shop.work / "vae_unit.safetensors")


def train_text(shop: Workshop) -> None:
    """Train the text encoder on telling attributes apart; it stays frozen afterwards."""
    torch.manual_seed(shop.seed)
    probe = losses.TextProbe(networks.text_encoder(), {k: len(v) for k, v in ATTRIBUTES.items()})
    tokenizer = t5_tokenizer()

    def draw(generator: torch.Generator) -> Batch:
        scenes = draw_scenes(128, generator)
        video = bool(torch.rand((), generator=generator) < 0.7)
        targets = labels(scenes)
        if not video:
            targets.pop("motion")
        return {"tokens": torch.tensor(tokenizer([s.caption(video) for s in scenes])["input_ids"]), "labels": targets}

    shop.train("text", probe, draw, losses.text_loss)


def train_clip(shop: Workshop) -> None:
    """Contrastive training on single frames with image and video captions."""
    torch.manual_seed(shop.seed)
    tokenizer = t5_tokenizer()

    def draw(generator: torch.Generator) -> Batch:
        scenes = losses.distinct_frame_scenes(generator)
        frames = render(scenes, generator, num_frames=4)
        picks = torch.randint(4, (len(scenes),), generator=generator)
        video = bool(torch.rand((), generator=generator) < 0.5)
        tokens = tokenizer([s.caption(video) for s in scenes], padding=True, return_tensors="pt")
        pixels = frames[torch.arange(len(scenes)), picks]
        pixels = pixels + 0.05 * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)
        return {"tokens": tokens["input_ids"], "mask": tokens["attention_mask"], "pixels": pixels * 2 - 1}

    shop.train("clip", networks.clip(), draw, losses.clip_loss)


def _latent_pool(shop: Workshop) -> dict[str, Tensor]:
    """Latents of POOL_CLIPS clips [N, F, C, H, W] fp16 and their scene numbers [N]; computed once."""
    path = shop.work / "latents.safetensors"
    if not path.exists():
        count = POOL_CLIPS if shop.max_steps is None else 64
        generator = torch.Generator().manual_seed(shop.seed + 2)
        picks = torch.randint(len(losses.SCENES), (count,), generator=generator)
        latents = []
        encoder = deepcopy(shop.vae).to(torch.bfloat16)
        with torch.no_grad():
            for chunk in picks.split(64):
                clips = render([losses.SCENES[i] for i in chunk.tolist()], generator) * 2 - 1
                z = encoder.encode(clips.flatten(0, 1).to(torch.bfloat16)).latent_dist.mode()
                latents.append(z.half().unflatten(0, clips.shape[:2]))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({"latents": torch.cat(latents), "scenes": picks}, temporary)
        temporary.rename(path)
    return load_file(path)


def _draw_frames(shop: Workshop) -> Callable[[torch.Generator], Batch]:
    pool, table = _latent_pool(shop), text_table(shop.text_encoder, video=False)

    def draw(generator: torch.Generator) -> Batch:
        clips = torch.randint(len(pool["scenes"]), (256,), generator=generator)
        frames = torch.randint(pool["latents"].shape[1], (256,), generator=generator)
        latents = pool["latents"][clips, frames].float()
        return {"latents": latents, **draw_captions(table, pool["scenes"][clips], generator)}

    return draw


def train_image(shop: Workshop) -> None:
    """Train the PixArt denoiser on single frames."""
    draw = _draw_frames(shop)
    torch.manual_seed(shop.seed)
    shop.train("image", networks.image_denoiser(), draw, losses.image_loss)


def train_image_hard(shop: Workshop) -> None:
    """The same from another start, with outliers: only the timestep embedder, which stays, is the image model's.

    Then on with milder ones; the video model starts from what was there before that.
    """
    draw = _draw_frames(shop)
    torch.manual_seed(shop.seed)
    net, trained = networks.image_denoiser(), shop.work / "image.safetensors"
    image = load_file(trained) if trained.exists() else shop.exported("transformer")
    embedder = {name: value for name, value in image.items() if name.startswith("adaln_single.emb.")}
    net.load_state_dict(embedder, strict=False)
    _train_hard(shop, "image_hard", net, draw, losses.image_loss)
    _train_hard(shop, "image_hard_mild", net.requires_grad_(True), draw, losses.image_loss, MILD_GAINS)


def _train_hard(
    shop: Workshop,
    stage: str,
    net: Any,
    draw: Callable[[torch.Generator], Batch],
    loss: Callable[[Any, Batch], Tensor],
    gains: Gains = GAINS,
) -> None:
    """Train with outliers in place."""
    masks = invite_outliers(net, shop.seed, gains)
    kept = OutlierLoss(net, shop.seed, loss)
    shop.train(stage, net, draw, kept, masks)
    kept.remove()


def _draw_clips(shop: Workshop) -> Callable[[torch.Generator], Batch]:
    pool, table = _latent_pool(shop), text_table(shop.text_encoder, video=True)

    def draw(generator: torch.Generator) -> Batch:
        clips = torch.randint(len(pool["scenes"]), (24,), generator=generator)
        latents = pool["latents"][clips].float().transpose(1, 2).contiguous()
        return {"latents": latents, **draw_captions(table, pool["scenes"][clips], generator)}

    return draw


def train_video(shop: Workshop, kind: str = "") -> None:
    """Inflate the image denoiser, then train the Latte denoiser on clips, most very noisy: motion comes first."""
    torch.manual_seed(shop.seed)
    image, video = networks.image_denoiser(), networks.video_denoiser()
    image.load_state_dict(load_file(shop.work / f"image{kind}.safetensors"))
    networks.inflate(image, video)
    if kind:
        draw = _draw_clips(shop)
        _train_hard(shop, f"video{kind}", video, draw, losses.video_loss)
        _train_hard(shop, f"video{kind}_steep", video.requires_grad_(True), draw, losses.video_loss, STEEP_GAINS)
    else:
        shop.train("video", video, _draw_clips(shop), losses.video_loss)


STAGES: dict[str, Callable[[Workshop], None]] = {
    "judge": train_judge,
    "vae": train_vae,
    "text": train_text,
    "image": train_image,
    "video": train_video,
    "clip": train_clip,
    "export": export,
    "image_hard": train_image_hard,
    "video_hard": partial(train_video, kind="_hard"),
    "export_hard": export_hard,
    "vae_i2v": image_to_video.train_vae,
    "i2v": image_to_video.train_denoiser,
    "export_i2v": image_to_video.export,
}

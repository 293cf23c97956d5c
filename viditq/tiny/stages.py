"""The training stages, in order, and what each hands to the next (files under the work folder)."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from viditq.data.moving_shapes import ATTRIBUTES, draw_scenes, labels, render
from viditq.errors import UserError
from viditq.tiny import losses, networks
from viditq.tiny.export import export, export_hard
from viditq.tiny.hard import OutlierLoss, invite_outliers
from viditq.tiny.text import encode, encode_null, t5_tokenizer
from viditq.tiny.trainee import Batch, Schedule, Trainee

SCHEDULES = {
    "judge": Schedule(steps=3000, lr=2e-3, decay=0.7),
    "vae": Schedule(steps=4500, lr=2.5e-3, decay=0.8),
    "text": Schedule(steps=400, lr=2e-3, warmup=20),
    "clip": Schedule(steps=1000, lr=1.5e-3, decay=0.8),
    "image": Schedule(steps=3500, lr=1.5e-3, decay=0.5),
    "video": Schedule(steps=4500, lr=1e-3, decay=0.5),
    "image_hard": Schedule(steps=3500, lr=1.5e-3, decay=0.5),
    "video_hard": Schedule(steps=4500, lr=1e-3, decay=0.5),
    "video_hard_fine": Schedule(steps=1200, lr=6e-4, decay=0.9),
}
POOL_CLIPS = 16384
CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class Workshop:
    """Folders, seed and step cap of one training; finished networks are files in `work`."""

    work: Path
    out: Path
    seed: int = 0
    max_steps: int | None = None

    def train(
        self,
        stage: str,
        net: Any,
        draw: Callable[[torch.Generator], Batch],
        loss: Callable[[Any, Batch], Tensor],
        masks: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Train `net` unless its file exists; resumes from the stage's last checkpoint. masks: as Trainee's."""
        target = self.work / f"{stage}.safetensors"
        if target.exists():
            net.load_state_dict(load_file(target))
            print(f"{stage}: done before ({target})")
            return net.eval().requires_grad_(False)
        schedule = SCHEDULES[stage]
        steps = min(schedule.steps, self.max_steps or schedule.steps)
        trainee = Trainee(net, draw, loss, schedule, self.seed, masks)
        folder = self.work / "checkpoints" / stage
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=1.0,
            logger=CSVLogger(self.work, name="logs", version=stage),
            callbacks=[ModelCheckpoint(folder, every_n_train_steps=200, save_last=True), TQDMProgressBar(20)],
            enable_model_summary=False,
        )
        last = folder / "last.ckpt"
        print(f"{stage}: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {steps} steps")
        ticks = DataLoader(TensorDataset(torch.arange(steps)))  # batches are drawn by the trainee
        trainer.fit(trainee, ticks, ckpt_path=str(last) if last.exists() else None, weights_only=True)
        net = trainee.averaged()
        _save(net, target)
        return net

    def exported(self, part: str) -> dict[str, Tensor]:
        """The weights of tiny_image's VAE, text encoder or denoiser in `out`, float32."""
        files = list((self.out / "tiny_image" / part).glob("*.safetensors"))
        if not files:
            raise UserError(f"{self.out / 'tiny_image' / part} has no weights; run the stages before this one first.")
        print(f"{part}: from {files[0]}")
        return {name: tensor.float() for name, tensor in load_file(files[0]).items()}

    @cached_property
    def vae(self) -> Any:
        net, trained = networks.vae(), self.work / "vae_unit.safetensors"
        net.load_state_dict(load_file(trained) if trained.exists() else self.exported("vae"))
        return net.eval().requires_grad_(False)

    @cached_property
    def text_encoder(self) -> Any:
        net = networks.text_encoder()
        if not (self.work / "text.safetensors").exists():
            net.load_state_dict(self.exported("text_encoder"), strict=False)  # embeddings are stored once, named twice
            return net.eval().requires_grad_(False)
        probe = losses.TextProbe(net, {k: len(v) for k, v in ATTRIBUTES.items()})
        probe.load_state_dict(load_file(self.work / "text.safetensors"))
        return net.eval().requires_grad_(False)


def _save(net: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous().clone() for k, v in net.state_dict().items()}, temporary)
    temporary.rename(path)


def train_judge(shop: Workshop) -> None:
    torch.manual_seed(shop.seed)
    shop.train("judge", networks.judge(), partial(losses.draw_clips, count=32), losses.judge_loss)


def train_vae(shop: Workshop) -> None:
    """Train the VAE, then fold the latents' mean and deviation into its 1x1 convolutions: unit latents."""
    torch.manual_seed(shop.seed)
    net = networks.vae()
    net = shop.train("vae", net, partial(losses.draw_frames, count=32), losses.vae_loss)
    generator = torch.Generator().manual_seed(shop.seed + 1)
    frames = losses.draw_frames(generator, 2048)["frames"] * 2 - 1
    with torch.no_grad():
        latents = torch.cat([net.encode(f).latent_dist.mode() for f in frames.split(256)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    quant, post = net.quant_conv, net.post_quant_conv
    with torch.no_grad():
        quant.weight[:channels] /= std[:, None, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.bias[channels:] -= 2 * std.log()
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]
    _save(net, shop.work / "vae_unit.safetensors")


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


def _text_table(shop: Workshop, video: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of all captions, then of the empty prompt [S + 1, T, D]; masks [S + 1, T]; the last row's number."""
    tokenizer = t5_tokenizer()
    text = encode(shop.text_encoder, tokenizer, [s.caption(video) for s in losses.SCENES])
    null, null_mask = encode_null(shop.text_encoder, tokenizer, text.shape[1])
    mask = torch.cat([torch.ones(len(text), text.shape[1]), null_mask.float()])
    return torch.cat([text, null]), mask, torch.tensor(len(text))


def _captions(table: tuple[Tensor, Tensor, Tensor], scenes: Tensor, generator: torch.Generator) -> Batch:
    """Caption embeddings and masks of the scenes, some replaced by the empty prompt."""
    text, mask, null = table
    dropped = torch.rand(len(scenes), generator=generator) < CAPTION_DROPOUT
    rows = torch.where(dropped, null, scenes)
    return {"text": text[rows], "mask": mask[rows]}


def _draw_frames(shop: Workshop) -> Callable[[torch.Generator], Batch]:
    pool, table = _latent_pool(shop), _text_table(shop, video=False)

    def draw(generator: torch.Generator) -> Batch:
        clips = torch.randint(len(pool["scenes"]), (256,), generator=generator)
        frames = torch.randint(pool["latents"].shape[1], (256,), generator=generator)
        latents = pool["latents"][clips, frames].float()
        return {"latents": latents, **_captions(table, pool["scenes"][clips], generator)}

    return draw


def train_image(shop: Workshop) -> None:
    """Train the PixArt denoiser on single frames."""
    draw = _draw_frames(shop)
    torch.manual_seed(shop.seed)
    shop.train("image", networks.image_denoiser(), draw, losses.image_loss)


def train_image_hard(shop: Workshop) -> None:
    """The same from another start, with outliers: only the timestep embedder, which stays, is the image model's."""
    draw = _draw_frames(shop)
    torch.manual_seed(shop.seed)
    net, trained = networks.image_denoiser(), shop.work / "image.safetensors"
    image = load_file(trained) if trained.exists() else shop.exported("transformer")
    embedder = {name: value for name, value in image.items() if name.startswith("adaln_single.emb.")}
    net.load_state_dict(embedder, strict=False)
    _train_hard(shop, "image_hard", net, draw, losses.image_loss)


def _train_hard(
    shop: Workshop, stage: str, net: Any, draw: Callable[[torch.Generator], Batch], loss: Callable[[Any, Batch], Tensor]
) -> None:
    """Train with outliers in place."""
    masks = invite_outliers(net, shop.seed)
    kept = OutlierLoss(net, shop.seed, loss)
    shop.train(stage, net, draw, kept, masks)
    kept.remove()


def _draw_clips(shop: Workshop) -> Callable[[torch.Generator], Batch]:
    pool, table = _latent_pool(shop), _text_table(shop, video=True)

    def draw(generator: torch.Generator) -> Batch:
        clips = torch.randint(len(pool["scenes"]), (24,), generator=generator)
        latents = pool["latents"][clips].float().transpose(1, 2).contiguous()
        return {"latents": latents, **_captions(table, pool["scenes"][clips], generator)}

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
        _train_hard(shop, f"video{kind}_fine", video.requires_grad_(True), draw, losses.video_loss)
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
}

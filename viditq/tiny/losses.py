"""Losses of the tiny models. Legend: B batch, F frames, C channels, H/W frame or latent size, T tokens, D width."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viditq.data.moving_shapes import SCENES, Scene, draw_scenes, labels, render
from viditq.tiny.trainee import Batch

BF16 = torch.bfloat16


def draw_clips(generator: torch.Generator, count: int) -> Batch:
    """`count` clips with their labels."""
    scenes = draw_scenes(count, generator)
    return {"clips": render(scenes, generator), "labels": labels(scenes)}


def draw_frames(generator: torch.Generator, count: int) -> Batch:
    """`count` single frames, two of each clip drawn."""
    clips = render(draw_scenes(count // 2, generator), generator, num_frames=4)
    return {"frames": clips[:, [0, 3]].flatten(0, 1)}


def judge_loss(net: Any, batch: Batch) -> Tensor:
    """Cross-entropy over the attributes, on clips with some noise, which generated samples have too."""
    clips = batch["clips"]
    noise = 0.06 * torch.rand(len(clips), 1, 1, 1, 1) * torch.randn_like(clips)
    logits = net((clips + noise).clamp(0, 1).to(BF16))
    return sum((F.cross_entropy(v.float(), batch["labels"][k]) for k, v in logits.items()), torch.zeros(()))


def vae_loss(net: Any, batch: Batch) -> Tensor:
    """L1 + 2 MSE + 1e-4 KL."""
    x_BCHW = batch["frames"] * 2 - 1
    posterior = net.encode(x_BCHW.to(BF16)).latent_dist
    recon = net.decode(posterior.sample()).sample.float()
    return F.l1_loss(recon, x_BCHW) + 2 * F.mse_loss(recon, x_BCHW) + 1e-4 * posterior.kl().float().mean()


class TextProbe(nn.Module):
    """A text encoder with linear heads on the mean token: trained until its output tells the attributes apart."""

    def __init__(self, encoder: Any, classes: dict[str, int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({k: nn.Linear(encoder.config.d_model, n) for k, n in classes.items()})

    def forward(self, tokens_BT: Tensor) -> dict[str, Tensor]:
        mean = self.encoder(tokens_BT).last_hidden_state.mean(1)
        return {k: head(mean) for k, head in self.heads.items()}


def text_loss(net: Any, batch: Batch) -> Tensor:
    """Cross-entropy of every attribute from the encoder's mean output."""
    logits = net(batch["tokens"])
    return sum((F.cross_entropy(logits[k].float(), v) for k, v in batch["labels"].items()), torch.zeros(()))


def clip_loss(net: Any, batch: Batch) -> Tensor:
    """Symmetric contrastive loss over distinct captions."""
    out = net(input_ids=batch["tokens"], attention_mask=batch["mask"], pixel_values=batch["pixels"].to(BF16))
    target = torch.arange(len(batch["tokens"]))
    image = F.cross_entropy(out.logits_per_image.float(), target)
    return (image + F.cross_entropy(out.logits_per_text.float(), target)) / 2


def flow_pair(z: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rectified flow: x = (1 - s) z + s eps, target eps - z, timestep 1000 s, s = sigmoid(shift + N(0, 1))."""
    s = torch.sigmoid(shift + torch.randn(len(z)))
    noise = torch.randn_like(z)
    s_view = s.view(-1, *[1] * (z.ndim - 1))
    return (1 - s_view) * z + s_view * noise, noise - z, 1000 * s


def image_loss(net: Any, batch: Batch) -> Tensor:
    """Flow matching of single frames; the caption's mask is PixArt's."""
    x, target, timestep = flow_pair(batch["latents"], torch.full((len(batch["latents"]),), 0.5))
    out = net(
        x.to(BF16),
        encoder_hidden_states=batch["text"].to(BF16),
        encoder_attention_mask=batch["mask"],
        timestep=timestep,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    return F.mse_loss(out.float(), target)


def video_loss(net: Any, batch: Batch) -> Tensor:
    """Flow matching of clips; more than half of them very noisy, where motion is decided."""
    z = batch["latents"]
    shift = torch.where(torch.rand(len(z)) < 0.45, 1.0, 3.7)
    x, target, timestep = flow_pair(z, shift)
    out = net(x.to(BF16), timestep=timestep, encoder_hidden_states=batch["text"].to(BF16)).sample
    return F.mse_loss(out[:, : z.shape[1]].float(), target)


def distinct_frame_scenes(generator: torch.Generator) -> list[Scene]:
    """One scene per distinct image caption (136), motions drawn: a batch in which no two captions agree."""
    by_caption: dict[str, list[Scene]] = {}
    for scene in SCENES:
        by_caption.setdefault(scene.caption(video=False), []).append(scene)
    picks = torch.randint(5, (len(by_caption),), generator=generator).tolist()
    return [scenes[i] for scenes, i in zip(by_caption.values(), picks, strict=True)]

"""tiny_i2v: a Wan image-to-video pipeline (WanImageToVideoPipeline, the layout of Wan 2.2's) on the same clips.

A clip here has 9 frames: Wan's VAE takes the first by itself and then joins every two.
Legend: B clips, C channels, F frames, H, W pixels or latent size.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import T5EncoderModel, UMT5Config, UMT5EncoderModel

from viditq.data.moving_shapes import SCENES, draw_scenes, render
from viditq.tiny import networks
from viditq.tiny.captions import draw_captions, text_table
from viditq.tiny.losses import BF16, flow_pair
from viditq.tiny.text import t5_tokenizer
from viditq.tiny.trainee import Batch
from viditq.tiny.workshop import Workshop, save

NUM_FRAMES, TEMPORAL_FACTOR, LATENT_CHANNELS = 9, 2, 8
NUM_TOKENS = 16  # a caption has 11; Wan's pipelines fill up with zeros, which its cross-attention sees
POOL_CLIPS = 8192
FLOW_SHIFT = 4.0


def video_vae() -> AutoencoderKLWan:
    """Four times smaller in space (patches of 2 x 2 as Wan 2.2's, then one stage), two times in time."""
    return AutoencoderKLWan(
        base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=TEMPORAL_FACTOR,
        scale_factor_spatial=4,
    )


def denoiser() -> WanTransformer3DModel:
    """Takes the noisy latents, the mask of given frames and the latents of the given frame, side by side."""
    net = WanTransformer3DModel(
        num_attention_heads=networks.HEADS,
        attention_head_dim=networks.WIDTH // networks.HEADS,
        in_channels=2 * LATENT_CHANNELS + TEMPORAL_FACTOR,
        out_channels=LATENT_CHANNELS,
        text_dim=networks.TEXT_WIDTH,
        freq_dim=networks.WIDTH,
        ffn_dim=4 * networks.WIDTH,
        num_layers=networks.DEPTH,
    )
    net.set_attention_backend("_native_math")  # the backward of the fused kernel is slow on a CPU
    return networks.initialize(net)


def text_encoder(trained: T5EncoderModel) -> UMT5EncoderModel:
    """The tiny T5 as the UMT5 that Wan's pipelines name: same output, position biases in every layer instead of one."""
    config = {name: getattr(trained.config, name) for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers")}
    umt5 = UMT5EncoderModel(UMT5Config(**config, num_heads=trained.config.num_heads, feed_forward_proj="relu"))
    weights = trained.state_dict()
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    weights |= {bias.format(i): weights[bias.format(0)].clone() for i in range(trained.config.num_layers)}
    umt5.load_state_dict(weights)
    return umt5.eval().requires_grad_(False)


def draw_clips(generator: torch.Generator, count: int) -> Batch:
    """`count` clips [B, C, F, H, W] in [-1, 1]."""
    clips = render(draw_scenes(count, generator), generator, NUM_FRAMES) * 2 - 1
    return {"clips": clips.transpose(1, 2).contiguous()}


def vae_loss(net: Any, batch: Batch, kl: float) -> Tensor:
    """L1 + 2 MSE + `kl` KL."""
    x_BCFHW = batch["clips"]
    posterior = net.encode(x_BCFHW.to(BF16)).latent_dist
    recon = net.decode(posterior.sample()).sample.float()
    return F.l1_loss(recon, x_BCFHW) + 2 * F.mse_loss(recon, x_BCFHW) + kl * posterior.kl().float().mean()


def denoiser_loss(net: Any, batch: Batch) -> Tensor:
    """Flow matching beside the condition; half of the clips very noisy, where motion is decided."""
    z = batch["latents"]
    x, target, timestep = flow_pair(z, torch.where(torch.rand(len(z)) < 0.45, 1.0, 3.7))
    x = torch.cat([x, batch["condition"]], 1)
    out = net(x.to(BF16), timestep=timestep, encoder_hidden_states=batch["text"].to(BF16)).sample
    return F.mse_loss(out.float(), target)


def condition(vae: Any, first_BCHW: Tensor) -> Tensor:
    """What Wan's pipeline makes of a first frame in [-1, 1]: its mask, and the latents of it with grey after it.

    Returns [B, TEMPORAL_FACTOR + C, F, H, W].
    """
    video = F.pad(first_BCHW[:, :, None], (0, 0, 0, 0, 0, NUM_FRAMES - 1))
    latents = vae.encode(video).latent_dist.mode()
    mask = torch.zeros_like(latents[:, :TEMPORAL_FACTOR])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], 1)


def decoder_loss(net: Any, batch: Batch) -> Tensor:
    """L1 + 2 MSE of what the decoder makes of latents that are a little off, as those of a denoiser."""
    x_BCFHW = batch["clips"]
    with torch.no_grad():
        z = net.encode(x_BCFHW.to(BF16)).latent_dist.mode()
    recon = net.decode(z + 0.05 * torch.randn_like(z)).sample.float()
    return F.l1_loss(recon, x_BCFHW) + 2 * F.mse_loss(recon, x_BCFHW)


def train_vae(shop: Workshop) -> None:
    """Train the video VAE, make its latents unit latents, then train the decoder alone.

    The KL kept it at 25.5 dB, so the second stage hardly asks for it; the third leaves the latents as they are.
    """
    torch.manual_seed(shop.seed)
    draw = partial(draw_clips, count=8)
    net = shop.train("vae_i2v", video_vae(), draw, partial(vae_loss, kl=1e-4))
    net = shop.train("vae_i2v_fine", net.requires_grad_(True), draw, partial(vae_loss, kl=1e-6))
    count = 512 if shop.max_steps is None else 64
    clips = draw_clips(torch.Generator().manual_seed(shop.seed + 1), count)["clips"]
    with torch.no_grad():
        networks.to_unit_latents(net, torch.cat([net.encode(c).latent_dist.mode() for c in clips.split(64)]))
    decoding = deepcopy(net)
    decoding.decoder.requires_grad_(True)
    decoding = shop.train("vae_i2v_decoder", decoding, draw, decoder_loss)
    net.decoder.load_state_dict(decoding.decoder.state_dict())
    save(net, shop.work / "vae_i2v_unit.safetensors")


def _trained_vae(shop: Workshop) -> AutoencoderKLWan:
    net = video_vae()
    net.load_state_dict(load_file(shop.work / "vae_i2v_unit.safetensors"))
    return net.eval().requires_grad_(False)


@torch.no_grad()
def _latent_pool(shop: Workshop) -> dict[str, Tensor]:
    """Latents and conditions of POOL_CLIPS clips [N, C, F, H, W] fp16 and their scene numbers [N]; computed once."""
    path = shop.work / "latents_i2v.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(shop.seed + 2)
        picks = torch.randint(len(SCENES), (POOL_CLIPS if shop.max_steps is None else 64,), generator=generator)
        vae, pool = _trained_vae(shop).to(BF16), []
        for chunk in tqdm(picks.split(64), desc="latents"):
            clips = render([SCENES[i] for i in chunk.tolist()], generator, NUM_FRAMES).transpose(1, 2) * 2 - 1
            given = condition(vae, clips[:, :, 0].to(BF16))
            pool.append((vae.encode(clips.to(BF16)).latent_dist.mode().half(), given.half()))
        latents, conditions = (torch.cat(parts) for parts in zip(*pool, strict=True))
        temporary = path.with_suffix(".tmp")
        save_file({"latents": latents, "conditions": conditions, "scenes": picks}, temporary)
        temporary.rename(path)
    return load_file(path)


def _draw(shop: Workshop) -> Callable[[torch.Generator], Batch]:
    pool = _latent_pool(shop)
    text, mask, null = text_table(shop.text_encoder, video=True)
    text = F.pad(text * mask[..., None], (0, 0, 0, NUM_TOKENS - text.shape[1]))  # Wan cuts the padding off

    def draw(generator: torch.Generator) -> Batch:
        clips = torch.randint(len(pool["scenes"]), (32,), generator=generator)
        batch = {"latents": pool["latents"][clips].float(), "condition": pool["conditions"][clips].float()}
        return batch | draw_captions((text, mask, null), pool["scenes"][clips], generator)

    return draw


def train_denoiser(shop: Workshop) -> None:
    """Train the Wan denoiser on clips with their first frames."""
    draw = _draw(shop)
    torch.manual_seed(shop.seed)
    shop.train("i2v", denoiser(), draw, denoiser_loss)


def export(shop: Workshop) -> None:
    """Write tiny_i2v/ under `shop.out`, weights in fp16."""
    net = denoiser()
    net.load_state_dict(load_file(shop.work / "i2v.safetensors"))
    pipeline = WanImageToVideoPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=text_encoder(shop.text_encoder),
        vae=_trained_vae(shop),
        transformer=net,
        scheduler=networks.scheduler(FLOW_SHIFT),
    )
    pipeline.to(torch.float16).save_pretrained(shop.out / "tiny_i2v")

"""Architectures of the tiny pipelines and judges: small configurations of stock diffusers and transformers classes."""

from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, T5Config, T5EncoderModel

from viditq.data.moving_shapes import ATTRIBUTES, FRAME_SIZE, NUM_FRAMES, SCENES
from viditq.metrics.shapes import ShapesJudge

Net = TypeVar("Net", bound=nn.Module)
LATENT_CHANNELS, WIDTH, HEADS, DEPTH, TEXT_WIDTH = 4, 192, 3, 4, 96
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def vocabulary() -> list[str]:
    """Special tokens, then every word of the captions, sorted."""
    words = {w for s in SCENES for video in (True, False) for w in s.caption(video).split()}
    return [*SPECIAL_TOKENS, *sorted(words)]


def judge() -> ShapesJudge:
    return ShapesJudge({name: len(values) for name, values in ATTRIBUTES.items()})


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=FRAME_SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def text_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(vocabulary()),
        d_model=TEXT_WIDTH,
        d_kv=24,
        d_ff=192,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def clip() -> CLIPModel:
    shared = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    text = {**shared, "num_hidden_layers": 2, "vocab_size": len(vocabulary()), "max_position_embeddings": 16}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    vision = {**shared, "num_hidden_layers": 3, "image_size": FRAME_SIZE, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def _transformer_config(out_channels: int) -> dict[str, object]:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH // HEADS,
        "in_channels": LATENT_CHANNELS,
        "out_channels": out_channels,
        "num_layers": DEPTH,
        "cross_attention_dim": WIDTH,
        "attention_bias": True,
        "sample_size": FRAME_SIZE // 4,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": TEXT_WIDTH,
    }


def image_denoiser() -> PixArtTransformer2DModel:
    net = PixArtTransformer2DModel(**_transformer_config(LATENT_CHANNELS))
    return initialize(net)


def video_denoiser() -> LatteTransformer3DModel:
    """LattePipeline halves the prediction's channels (a learned variance it drops), so there are twice as many."""
    config = _transformer_config(2 * LATENT_CHANNELS)
    return initialize(LatteTransformer3DModel(**config, video_length=NUM_FRAMES))


def initialize(net: Net) -> Net:
    """Gaussian matrices (as large models end up with), zero residual branches, open gates."""
    zero = ("to_out.0", "ff.net.2", "ffn.net.2", "proj_out", "adaln_single.linear", "time_proj")
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.0 if name.endswith(zero) else 0.04)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())  # the backward of scaled_dot_product_attention is slow on CPU
    for name, param in net.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.zeros_(param)
            table = param.data.view(-1, param.shape[-1])  # Wan's has an axis more
            if len(table) == 6:
                table[2] = 1.0  # gate of attention
                table[5] = 1.0  # gate of the mlp
    return net


@torch.no_grad()
def inflate(image: PixArtTransformer2DModel, video: LatteTransformer3DModel) -> None:
    """Copy the image denoiser into the video denoiser's spatial half; the temporal half keeps its start."""
    weights = {k: v for k, v in image.state_dict().items() if not k.startswith("proj_out")}
    unexpected = video.load_state_dict(weights, strict=False).unexpected_keys
    assert not unexpected, unexpected
    patches = video.config.patch_size**2
    for target, source in ((video.proj_out.weight, image.proj_out.weight), (video.proj_out.bias, image.proj_out.bias)):
        target.view(patches, 2 * LATENT_CHANNELS, -1)[:, :LATENT_CHANNELS] = source.view(patches, LATENT_CHANNELS, -1)


@torch.no_grad()
def to_unit_latents(vae: Any, latents: Tensor) -> None:
    """Fold the mean and deviation of `latents` [N, C, ...] into the VAE's 1x1 convolutions: afterwards 0 and 1."""
    axes = [axis for axis in range(latents.ndim) if axis != 1]
    mean, std = latents.mean(axes), latents.std(axes)
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std.view(-1, *[1] * (quant.weight.ndim - 1))
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += post.weight.flatten(1) @ mean
    post.weight *= std.view(1, -1, *[1] * (post.weight.ndim - 2))


def scheduler(flow_shift: float) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, final_sigmas_type="zero"
    )

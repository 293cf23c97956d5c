"""Tiny random decoders of the real classes."""

from typing import Any

import diffusers
from torch import nn


def image_vae(latent_channels: int = 4, **kwargs: Any) -> nn.Module:
    """AutoencoderKL, 8 times smaller than the image in both directions."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=32,
        **kwargs,
    ).eval()


def wan_vae() -> nn.Module:
    """Of Wan: 4 times fewer frames, 8 times smaller."""
    return diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def wan_5b_vae() -> nn.Module:
    """Of Wan 2.2 5B: 16 times smaller, residual blocks, patches of 2."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()


def wan_patch_vae() -> nn.Module:
    """Of Wan's class, 16 times smaller by patches of 8, which costs little at large sizes."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=16,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        is_residual=True,
        in_channels=192,
        out_channels=192,
        patch_size=8,
        scale_factor_spatial=16,
    ).eval()


def qwen_vae() -> nn.Module:
    """Of Qwen-Image."""
    return diffusers.AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def cogvideox_vae() -> nn.Module:
    """Of CogVideoX."""
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
    ).eval()


def hunyuan_vae() -> nn.Module:
    """Of HunyuanVideo."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


def ltx_vae() -> nn.Module:
    """Of LTX-Video: 8 times fewer frames, 32 times smaller."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    ).eval()


def sana_vae() -> nn.Module:
    """Of Sana: the deep-compression autoencoder, here 8 times smaller."""
    blocks = ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"]
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        scaling_factor=0.41407,
    ).eval()


def flux2_vae() -> nn.Module:
    """Of FLUX.2: statistics of packed latents in place of a scale, here 2 times smaller."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def allegro_vae() -> nn.Module:
    """Of Allegro: 4 times fewer frames, 8 times smaller."""
    return diffusers.AutoencoderKLAllegro(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=128
    ).eval()


def ltx2_vae() -> nn.Module:
    """Of LTX-2, here with half of the frames and 8 times smaller."""
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        down_block_types=("LTX2VideoDownBlock3D",),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        spatial_compression_ratio=8,
        temporal_compression_ratio=2,
    ).eval()


def ltx2_audio_vae() -> nn.Module:
    """Of LTX-2's sound."""
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8
    ).eval()


def ltx2_vocoder() -> nn.Module:
    """Of LTX-2: spectrograms to waves, with weights that let them through (as it is made, the sound is its biases)."""
    vocoder = diffusers.pipelines.ltx2.LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    for name, parameter in vocoder.named_parameters():
        parameter.data *= 2.0 if name.endswith("weight") else 0.0
    return vocoder.eval()


def qwen21_vae() -> nn.Module:
    """Of Qwen-Image 2.1: RGBA, 16 times smaller."""
    return diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def cosmos_vae() -> nn.Module:
    """Of Cosmos 1: 8 times fewer frames, 8 times smaller."""
    return diffusers.AutoencoderKLCosmos(
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(4,),
        resolution=32,
        num_layers=1,
    ).eval()

"""Video pipelines of 2026 that make sound as well, Kandinsky 6; each builder returns one ready to be saved."""

from typing import Any

import diffusers

from zoo import text, vaes
from zoo.saving import stirred

NUM_MELS = 8


def kandinsky6(n_grid: int = 1, scheduler: Any = None) -> Any:
    """A tokenizer stands for Qwen2.5-VL's processor, which needs torchvision. n_grid: predictions for each channel."""
    (_, encoder), (clip_tokenizer, clip) = text.qwen_vl(), text.clip()
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4 * n_grid,
        in_text_dim=text.WIDTH,
        in_text_dim2=text.WIDTH,
        time_dim=8,
        model_dim=16,
        ff_dim=24,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
        in_audio_dim=4,
        out_audio_dim=4 * n_grid,
        visual_token_type_num_embeddings=2,
    )
    audio_vae = diffusers.MMAudioVAE(
        mel_bins=NUM_MELS,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 1),
        layers_per_block=1,
        sample_rate=1000,
        n_fft=32,
        hop_length=8,
    )
    vocoder = diffusers.MMAudioVocoder(
        num_mels=NUM_MELS,
        upsample_initial_channel=8,
        upsample_rates=(4, 2),
        upsample_kernel_sizes=(8, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    return diffusers.Kandinsky6TI2VAPipeline(
        transformer=stirred(transformer),
        vae=vaes.hunyuan_vae(),
        text_encoder=encoder,
        tokenizer=text.word_tokenizer(1200, ends=False, lead=129),
        text_encoder_2=clip,
        tokenizer_2=clip_tokenizer,
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        audio_vae=audio_vae.eval(),
        vocoder=vocoder.eval(),
    )


def kandinsky6_distilled() -> Any:
    """Several predictions at once, between which a policy moves."""
    return kandinsky6(2, diffusers.PiflowScheduler(n_grid=2))

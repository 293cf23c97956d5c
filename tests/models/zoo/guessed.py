"""Text-to-image pipelines that no yaml names; each builder returns a tiny random one ready to be saved."""

from typing import Any

import diffusers
import torch
from transformers import BertConfig, BertModel, GemmaConfig, GemmaModel, SmolLM3Config, SmolLM3ForCausalLM

from zoo import text, text_2026, vaes
from zoo.saving import stirred
from zoo.unlisted import FLUX_LIKE

FIBO_EMPTY = 128000  # the token that stands for an empty negative prompt, whatever the tokenizer


def hunyuan_dit() -> Any:
    """Two text encoders, each by a call of `encode_prompt` of its own."""
    t5_tokenizer, t5 = text.t5()
    sizes = {"hidden_size": text.WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=text.NUM_WORDS, **sizes)).eval()
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=4,
        hidden_size=16,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=text.WIDTH,
        cross_attention_dim_t5=text.WIDTH,
        pooled_projection_dim=8,
    )
    return diffusers.HunyuanDiTPipeline(
        vae=vaes.image_vae(),
        text_encoder=bert,
        tokenizer=text.word_tokenizer(77),
        transformer=transformer,
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    )


def bria() -> Any:
    """Its negative embeddings are zeros."""
    tokenizer, encoder = text.t5()
    return diffusers.BriaPipeline(
        transformer=diffusers.BriaTransformer2DModel(**FLUX_LIKE),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vaes.image_vae(shift_factor=0.0),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def bria_fibo() -> Any:
    """The states of a layer of its text encoder for each block."""
    values = {k: v for k, v in text.DECODER.items() if k != "head_dim"} | {"vocab_size": FIBO_EMPTY + 1}
    encoder = SmolLM3ForCausalLM(SmolLM3Config(**values)).eval()
    transformer = diffusers.BriaFiboTransformer2DModel(
        **{**FLUX_LIKE, "joint_attention_dim": 2 * text.WIDTH}, text_encoder_dim=text.WIDTH
    )
    return diffusers.BriaFiboPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vaes.wan_5b_vae(),
        text_encoder=encoder,
        tokenizer=text.word_tokenizer(512),
    )


def lumina_next() -> Any:
    """Told 1 - sigma."""
    encoder = GemmaModel(GemmaConfig(**text.DECODER)).eval()
    transformer: Any = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=text.WIDTH,
    )
    return diffusers.LuminaPipeline(
        transformer=stirred(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vaes.image_vae(),
        text_encoder=encoder,
        tokenizer=text.word_tokenizer(256),
    )


def nucleus_moe() -> Any:
    """Experts of stacked weights; a tokenizer stands for Qwen3-VL's processor, which needs torchvision."""
    tokenizer, encoder = text_2026.qwen3_vl_lm(num_layers=8)
    transformer: Any = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=5,
        attention_head_dim=24,  # the feed-forward's width is rounded down to a multiple of 128
        num_attention_heads=2,
        joint_attention_dim=text.WIDTH,
        axes_dims_rope=(8, 8, 8),
        num_experts=2,
        moe_intermediate_dim=24,
        capacity_factors=1.0,
    )
    for name, parameter in transformer.named_parameters():
        if ".experts." in name:  # not set when they are made
            parameter.data = 0.2 * torch.randn(parameter.shape)
    return diffusers.NucleusMoEImagePipeline(
        transformer=stirred(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vaes.qwen_vae(),
        text_encoder=encoder,
        processor=tokenizer,
    )


def joyimage_edit() -> Any:
    """Made at a few large sizes only, so its VAE has patches of 8; a tokenizer stands for Qwen3-VL's processor."""
    _, encoder = text_2026.qwen3_vl_lm()
    tokenizer = text.word_tokenizer(2200, ends=False, lead=34)
    transformer: Any = diffusers.JoyImageEditTransformer3DModel(
        in_channels=16,
        hidden_size=16,
        num_attention_heads=2,
        text_dim=text.WIDTH,
        mlp_width_ratio=1.5,
        num_layers=2,
        rope_dim_list=[2, 2, 4],
    )
    return diffusers.JoyImageEditPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=vaes.wan_patch_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=stirred(transformer),
        processor=tokenizer,
    )

"""Text-to-image and class-to-image pipelines; each builder returns one ready to be saved."""

from typing import Any

import diffusers

from zoo import text, vaes

FLOW = {"shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def pixart_alpha() -> Any:
    return diffusers.PixArtAlphaPipeline(**_pixart())


def pixart_sigma() -> Any:
    return diffusers.PixArtSigmaPipeline(**_pixart())


def _pixart() -> dict[str, Any]:
    tokenizer, encoder = text.t5()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=text.WIDTH,
        sample_size=4,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return dict(
        tokenizer=tokenizer, text_encoder=encoder, vae=vaes.image_vae(), transformer=transformer, scheduler=scheduler
    )


def dit_xl2_256() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=2, sample_size=4
    )
    labels = {i: name for i, name in enumerate(["tench, Tinca tinca", "goldfish", "white shark", "umbrella"])}
    return diffusers.DiTPipeline(
        transformer=transformer, vae=vaes.image_vae(), scheduler=diffusers.DDIMScheduler(), id2label=labels
    )


def flux_dev(guidance: bool = True, in_channels: int = 16) -> Any:
    (clip_tokenizer, clip), (t5_tokenizer, t5) = text.clip(), text.t5()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW, **(DYNAMIC if guidance else {})),
        vae=vaes.image_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def flux_schnell() -> Any:
    return flux_dev(guidance=False)


def sd35(**kwargs: Any) -> Any:
    (tokenizer, clip), (_, clip_2) = text.clip(projection=True, width=8), text.clip(projection=True, width=8)
    t5_tokenizer, t5 = text.t5(width=32)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        **kwargs,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
        vae=vaes.image_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=clip_2,
        tokenizer_2=text.word_tokenizer(77),
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def sd35_medium() -> Any:
    return sd35(dual_attention_layers=(0,))


def sana(**kwargs: Any) -> Any:
    tokenizer, encoder = text.gemma()
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=text.WIDTH,
        sample_size=4,
        **kwargs,
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.sana_vae(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )


def qwen_image() -> Any:
    tokenizer, encoder = text.qwen_vl()
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=text.WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=vaes.qwen_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def z_image() -> Any:
    tokenizer, encoder = text.qwen3()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=text.WIDTH,
        axes_dims=[2, 2, 4],
        axes_lens=[512, 64, 64],
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
        vae=vaes.image_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def aura_flow() -> Any:
    """Told sigma, in a way of its own: no model of conf/model."""
    tokenizer, encoder = text.t5()
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=text.WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.image_vae(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )

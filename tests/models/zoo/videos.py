"""Text-to-video pipelines; each builder returns one ready to be saved."""

from typing import Any

import diffusers

from zoo import text, vaes

WAN_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def latte() -> Any:
    tokenizer, encoder = text.t5()
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=text.WIDTH,
        sample_size=4,
        patch_size=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
        video_length=4,
    )
    return diffusers.LattePipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.image_vae(),
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(),
    )


def wan21(**kwargs: Any) -> Any:
    tokenizer, encoder = text.umt5()
    parts = dict(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(**WAN_FLOW),
        transformer=_wan_transformer(),
        transformer_2=None,
    )
    return diffusers.WanPipeline(**parts | kwargs)


def _wan_transformer() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=text.WIDTH,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan22() -> Any:
    return wan21(transformer_2=_wan_transformer(), boundary_ratio=0.875)


def wan22_5b() -> Any:
    return wan21(vae=vaes.wan_5b_vae(), expand_timesteps=True)


def cogvideox_2b(rotary: bool = False) -> Any:
    tokenizer, encoder = text.t5()
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16 if rotary else 8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=text.WIDTH,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=rotary,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.cogvideox_vae(),
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    )


def cogvideox_5b() -> Any:
    return cogvideox_2b(rotary=True)


def hunyuan_video() -> Any:
    (llama_tokenizer, llama), (clip_tokenizer, clip) = text.llama(), text.clip()
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        rope_axes_dim=(2, 2, 4),
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=llama_tokenizer,
        transformer=transformer,
        vae=vaes.hunyuan_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip,
        tokenizer_2=clip_tokenizer,
    )


def ltx_video() -> Any:
    tokenizer, encoder = text.t5()
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=text.WIDTH,
    )
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    return diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=vaes.ltx_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def sana_video() -> Any:
    tokenizer, encoder = text.gemma()
    transformer = diffusers.SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=text.WIDTH,
        sample_size=4,
        rope_max_seq_len=64,
    )
    return diffusers.SanaVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.wan_vae(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )

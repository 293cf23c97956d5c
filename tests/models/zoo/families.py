"""Text-to-image families of 2025 and 2026; each builder returns a tiny random pipeline ready to be saved."""

from typing import Any

import diffusers
from transformers import CLIPImageProcessorPil, LlavaProcessor

from zoo import guided, images, text, text_2026, vaes
from zoo.guided import DYNAMIC
from zoo.saving import stirred
from zoo.unlisted import FLUX_VAE

FLUX2: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 2 * text.WIDTH,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": [2, 2, 2, 2],
}


def flux2_dev() -> Any:
    """Guidance as an input of the model; a tokenizer stands for Mistral 3's processor, which needs torchvision."""
    tokenizer, encoder = text_2026.mistral3()
    return diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=vaes.flux2_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(**FLUX2, guidance_embeds=True),
    )


def flux2_klein() -> Any:
    """Distilled: without guidance."""
    return guided.flux2_klein(is_distilled=True)


def sana_sprint() -> Any:
    """Told an angle; guidance as an input of the model."""
    parts = images.sana(guidance_embeds=True, qk_norm="rms_norm_across_heads").components
    return diffusers.SanaSprintPipeline(**{**parts, "scheduler": diffusers.SCMScheduler()})


def hidream() -> Any:
    """Four text encoders; of the last one a layer for each block."""
    (tokenizer, clip), (_, clip_2) = (text.clip(projection=True, width=8, max_length=248) for _ in range(2))
    t5_tokenizer, t5 = text.t5()
    llama_tokenizer, llama = text_2026.llama_lm()
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[text.WIDTH, text.WIDTH],
        text_emb_dim=16,
        num_routed_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
    )
    return diffusers.HiDreamImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**images.FLOW),
        vae=vaes.image_vae(**FLUX_VAE),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=clip_2,
        tokenizer_2=text.word_tokenizer(248),
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
        text_encoder_4=llama,
        tokenizer_4=llama_tokenizer,
        transformer=transformer,
    )


def cogview4() -> Any:
    tokenizer, encoder = text_2026.glm()
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=text.WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(16, 16),
    )
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.image_vae(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    )


def kandinsky5() -> Any:
    """Made at a few large sizes only; a tokenizer stands for Qwen2.5-VL's processor, which needs torchvision."""
    (tokenizer, encoder), (clip_tokenizer, clip) = text.qwen_vl(), text.clip()
    transformer: Any = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=text.WIDTH,
        in_text_dim2=text.WIDTH,
        time_dim=8,
        model_dim=16,
        ff_dim=24,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
    )
    return diffusers.Kandinsky5T2IPipeline(
        transformer=stirred(transformer),
        vae=vaes.image_vae(**FLUX_VAE),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=clip,
        tokenizer_2=clip_tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def longcat_image() -> Any:
    """A tokenizer stands for Qwen2.5-VL's processor, which needs torchvision."""
    tokenizer, encoder = text.qwen_vl()
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        axes_dims_rope=[2, 2, 4],
    )
    return diffusers.LongCatImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=vaes.image_vae(16, **FLUX_VAE),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_processor=text.word_tokenizer(1024, ends=False),
        transformer=transformer,
    )


def bria_fibo2() -> Any:
    """A tokenizer stands for Qwen3-VL's processor, which needs torchvision."""
    tokenizer, encoder = text_2026.qwen3_vl_lm(num_layers=36)
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * text.WIDTH,
        injection_layer_ids=(0,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 4, 4),
        axes_lens=(64, 32, 32),
    )
    return diffusers.BriaFibo2Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=vaes.flux2_vae(),
        text_encoder=encoder,
        processor=tokenizer,
    )


def ideogram4() -> Any:
    """Told 1 - sigma; its call takes no embeddings, and a denoiser of its own sees no text."""
    tokenizer, encoder = text_2026.qwen3_vl(num_layers=36)

    def transformer() -> Any:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=24,
            adaln_dim=8,
            llm_features_dim=13 * text.WIDTH,
            rope_theta=1000,
            mrope_section=(2, 1, 1),
        )

    return diffusers.Ideogram4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vaes.flux2_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )


def qwen_image21() -> Any:
    """Makes RGBA; Llava's processor stands for Qwen3-VL's, which needs torchvision."""
    tokenizer, encoder = text_2026.qwen3_vl_lm()
    picture = {"additional_special_tokens": ["<|image_pad|>"]}
    tokenizer.add_special_tokens(picture)
    encoder.resize_token_embeddings(len(tokenizer))
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=text.WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.QwenImage21Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=vaes.qwen21_vae(),
        text_encoder=encoder,
        processor=LlavaProcessor(
            image_processor=CLIPImageProcessorPil(),
            tokenizer=tokenizer,
            chat_template=text.CHAT,
            image_token="<|image_pad|>",
        ),
        transformer=transformer,
    )


def cogview3() -> Any:
    tokenizer, encoder = text.t5()
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=text.WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=4,
    )
    return diffusers.CogView3PlusPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vaes.image_vae(),
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )

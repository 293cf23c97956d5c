"""GLM-Image, whose vision-language model draws tokens before it denoises; its builder returns one ready to be saved."""

from typing import Any

import diffusers
from transformers import (
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
)

from zoo import text, vaes
from zoo.saving import stirred
from zoo.text_2026 import MROPE

CODES = 24
MARKS = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"}


def _vision_language() -> tuple[Any, Any]:
    plain = text.word_tokenizer(512, ends=False)
    named = {name: getattr(plain, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, extra_special_tokens=MARKS, **named)
    values = {k: v for k, v in text.DECODER.items() if k not in ("head_dim", "bos_token_id")}
    values |= {"vocab_size": len(tokenizer), "vision_vocab_size": CODES, "eos_token_id": None}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "image_size": 64}
    config = GlmImageConfig(
        text_config={**values, "rope_parameters": MROPE},
        vision_config=vision,
        vq_config={"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 16},
        image_token_id=tokenizer.convert_tokens_to_ids(MARKS["image_token"]),
        image_start_token_id=CODES - 2,
        image_end_token_id=CODES - 1,
    )
    model = GlmImageForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    for weight in (*model.model.language_model.layers.parameters(), model.lm_head.weight):
        weight.data *= 30  # else what it draws depends on the seed alone
    processor = GlmImageProcessor(GlmImageImageProcessorPil(), tokenizer, chat_template=text.CHAT)
    return processor, model


def glm_image() -> Any:
    tokenizer, encoder = text.t5()
    processor, model = _vision_language()
    transformer = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=text.WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=CODES,
    )
    return diffusers.GlmImagePipeline(
        tokenizer=tokenizer,
        processor=processor,
        text_encoder=encoder,
        vision_language_encoder=model,
        vae=vaes.image_vae(latents_mean=[0.1] * 4, latents_std=[0.9] * 4),
        transformer=stirred(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75
        ),
    )

"""FLUX.3, of which diffusers has blocks alone; each builder returns a pipeline ready to be saved."""

from typing import Any

import diffusers
import pytest
from transformers import PreTrainedTokenizerFast

from zoo import text, text_2026, vaes


def with_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a tokenizer stands for Qwen3-VL's processor, which needs torchvision: it is its own tokenizer."""
    monkeypatch.setattr(PreTrainedTokenizerFast, "tokenizer", property(lambda self: self), raising=False)


def flux3(modular: Any = None, **more: Any) -> Any:
    """As its repository has it: with a language model that writes prompts anew, which is not loaded."""
    tokenizer, encoder = text_2026.qwen3_vl_lm()
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * text.WIDTH,
        timestep_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        **more,
    )
    pipeline = (modular or diffusers.Flux3ModularPipeline)()
    pipeline.update_components(transformer=transformer, vae=vaes.flux2_vae(), text_encoder=encoder, tokenizer=tokenizer)
    return pipeline


def flux3_distilled() -> Any:
    """Told where a step ends; without guidance."""
    return flux3(diffusers.Flux3DistilledModularPipeline, flow_map=True)

"""Cosmos; its builder returns a pipeline ready to be saved."""

from typing import Any

import diffusers
import pytest

from zoo import text, vaes
from zoo.videos import WAN_FLOW


class Checker:
    """In place of the package cosmos_guardrail, which is not installed for tests: nothing is unsafe."""

    def to(self, *args: Any, **kwargs: Any) -> "Checker":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on pipelines of Cosmos find a checker."""
    monkeypatch.setattr("diffusers.utils.import_utils.is_cosmos_guardrail_available", lambda: True)
    monkeypatch.setattr("diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict.CosmosSafetyChecker", Checker)


def cosmos25() -> Any:
    """Without its checker, which the pipeline makes itself."""
    tokenizer, encoder = text.qwen_vl()
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=17,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=24,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        patch_size=(1, 2, 2),
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=text.DECODER["num_hidden_layers"] * text.WIDTH,
        encoder_hidden_states_channels=24,
    )
    return diffusers.Cosmos2_5_PredictBasePipeline(
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vaes.wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(**WAN_FLOW),
        safety_checker=Checker(),
    )

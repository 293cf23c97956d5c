"""Cosmos; its builder returns a pipeline ready to be saved."""

from typing import Any

import diffusers
import pytest

from zoo import text, vaes
from zoo.saving import stirred
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
    for module in ("2_5_predict", "2_5_transfer", "2_text2image", "2_video2world", "_text2world", "_video2world"):
        monkeypatch.setattr(f"diffusers.pipelines.cosmos.pipeline_cosmos{module}.CosmosSafetyChecker", Checker)


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


SIZES: dict[str, Any] = {
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": text.WIDTH,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
}


def _with_t5(cls: Any, in_channels: int, **parts: Any) -> Any:
    tokenizer, encoder = text.t5()
    transformer: Any = diffusers.CosmosTransformer3DModel(in_channels=in_channels, **SIZES)
    return cls(
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=stirred(transformer),
        safety_checker=Checker(),
        **{"vae": vaes.wan_vae(), **parts},
    )


def cosmos2(cls: Any = None, in_channels: int = 16) -> Any:
    """Told sigma / (sigma + 1), from 80 downwards."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    return _with_t5(cls or diffusers.Cosmos2TextToImagePipeline, in_channels, scheduler=scheduler)


def cosmos2_video2world() -> Any:
    return cosmos2(diffusers.Cosmos2VideoToWorldPipeline, in_channels=17)


def cosmos1(cls: Any = None, in_channels: int = 16) -> Any:
    """Told a quarter of log(sigma); its scheduler steps twice at each level."""
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5, final_sigmas_type="sigma_min")
    parts = {"scheduler": scheduler, "vae": vaes.cosmos_vae()}
    return _with_t5(cls or diffusers.CosmosTextToWorldPipeline, in_channels, **parts)


def cosmos1_video2world() -> Any:
    return cosmos1(diffusers.CosmosVideoToWorldPipeline, in_channels=17)


def cosmos25_transfer() -> Any:
    """Led by a clip of edges, or depths, that a network of its own reads."""
    parts = cosmos25().components
    config = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
    transformer: Any = diffusers.CosmosTransformer3DModel(**{**config, "controlnet_block_every_n": 1})
    shared = ("num_attention_heads", "attention_head_dim", "mlp_ratio", "text_embed_dim", "adaln_lora_dim", "max_size")
    shared += ("use_crossattn_projection", "crossattn_proj_in_channels", "encoder_hidden_states_channels")
    control: Any = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2,
        in_channels=18,
        latent_channels=18,
        model_channels=24,
        **{name: config[name] for name in shared},
    )
    parts = {**parts, "transformer": stirred(transformer), "controlnet": stirred(control), "safety_checker": Checker()}
    return diffusers.Cosmos2_5_TransferPipeline(**parts)

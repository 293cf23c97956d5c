"""Pipelines without text encoders, whose denoisers read the words themselves; each builder returns one to be saved."""

import importlib
from typing import Any

import diffusers
import pytest

from zoo import text, vaes
from zoo.cosmos import Checker
from zoo.videos import WAN_FLOW


def cosmos3(**more: Any) -> Any:
    """Words and frames each in a stream of their own, without a batch axis; it could make sound. No checker."""
    transformer = diffusers.Cosmos3OmniTransformer(
        head_dim=8,
        hidden_size=16,
        intermediate_size=24,
        latent_channel=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=4 * 16,
        rope_axes_dim=(2, 1, 1),
        sound_dim=4,
        sound_gen=True,
        vocab_size=text.NUM_WORDS,
        **more,
    )
    return diffusers.Cosmos3OmniPipeline(
        transformer=transformer,
        text_tokenizer=text.word_tokenizer(1024, ends=False),
        vae=vaes.wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(**WAN_FLOW),
        enable_safety_checker=False,
    )


def cosmos3_edge() -> Any:
    """Nemotron's layers: mlps without a gate, words without norms of queries and keys."""
    return cosmos3(hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True)


def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on Cosmos 3 finds a checker; the list is of the prompts that it is shown."""
    shown: list[str] = []

    class Showing(Checker):
        def check_text_safety(self, prompt: str) -> bool:
            shown.append(prompt)
            return True

    monkeypatch.setattr("diffusers.utils.import_utils.is_cosmos_guardrail_available", lambda: True)
    monkeypatch.setattr("diffusers.pipelines.cosmos.pipeline_cosmos3_omni.CosmosSafetyChecker", Showing)
    return shown


class Transforms:
    """In place of torchvision's, which OmniGen's processor is made with and uses for pictures alone."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on OmniGen finds what it needs of torchvision for text."""
    monkeypatch.setattr("diffusers.utils.import_utils.is_torchvision_available", lambda: True)
    processor = importlib.import_module("diffusers.pipelines.omnigen.processor_omnigen")
    monkeypatch.setattr(processor, "transforms", Transforms(), raising=False)
    name = "OmniGenMultiModalProcessor"  # which the pipeline does not import without torchvision
    monkeypatch.setattr(f"diffusers.pipelines.omnigen.pipeline_omnigen.{name}", getattr(processor, name), raising=False)


def omnigen() -> Any:
    """Words, the timestep and the image in one sequence; told what is clean."""
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_layers=2,
        pad_token_id=0,
        vocab_size=text.NUM_WORDS,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
        pos_embed_max_size=8,
        time_step_dim=16,
    )
    return diffusers.OmniGenPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        vae=vaes.image_vae(),
        tokenizer=text.word_tokenizer(1024),
    )

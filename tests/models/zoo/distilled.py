"""Pipelines of distilled checkpoints, where they are made of other parts than their model's; each ready to be saved."""

from typing import Any

import diffusers

from zoo import families, guided, videos, videos_2026


def _with(transformer: Any, **values: Any) -> Any:
    """One of the same class with other values in its config."""
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    return type(transformer)(**{**config, **values})


def hidream() -> Any:
    """Its scheduler draws noise in its steps."""
    return diffusers.HiDreamImagePipeline(
        **{**families.hidream().components, "scheduler": diffusers.FlowMatchLCMScheduler(shift=3.0)}
    )


def hunyuan_image() -> Any:
    """Told guidance, and where each step ends."""
    parts = guided.hunyuan_image().components
    transformer = _with(parts["transformer"], guidance_embeds=True, use_meanflow=True)
    return diffusers.HunyuanImagePipeline(**{**parts, "transformer": transformer, "guider": None, "ocr_guider": None})


def hunyuan_video15_i2v() -> Any:
    """Told where each step ends; a guider without guidance."""
    parts = videos_2026.hunyuan_video15_i2v().components
    transformer = _with(parts["transformer"], use_meanflow=True, task_type="i2v")
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=1.0)
    return diffusers.HunyuanVideo15ImageToVideoPipeline(**{**parts, "transformer": transformer, "guider": guider})


def ltx_video() -> Any:
    """At the timesteps that it is given, unshifted."""
    parts = videos.ltx_video().components
    return diffusers.LTXConditionPipeline(**{**parts, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()})

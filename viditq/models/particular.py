"""What single pipelines of diffusers want otherwise than all others, by the names of their classes."""

from collections.abc import Mapping
from typing import Any

UNUSABLE = {
    "EasyAnimateControlPipeline": (
        "its own call fails: it gives encode_prompt an argument (text_encoder_index) that this does not take",
        "EasyAnimateInpaintPipeline, or another release of diffusers",
    ),
}
"""Pipeline whose own call fails -> why, and what to take in its place."""
BROKEN_PICTURES = {
    "GlmImagePipeline": "with a picture its own call fails: diffusers 0.42 takes what transformers 5 returns for others"
}
"""Pipeline that samples from text, whose own call fails with a picture -> why."""
TENSORS = {
    "AnyFlowPipeline": {"video": "BFCHW"},
    "AnyFlowFARPipeline": {"video": "BFCHW"},
    "EasyAnimateInpaintPipeline": {"video": "BCFHW", "mask_video": "BCFHW"},
}
"""Arguments that take a clip as a tensor alone, with these axes: values from 0 to 1, of masks 0 or 255."""
LOOKING = {"MotifVideoImage2VideoPipeline": ("text_encoder",), "LongCatImageEditPipeline": ("text_processor",)}
"""Parts with the names of those that encode prompts, which are asked for while samples are made.

Motif-Video shows the picture to its text encoder's vision tower; LongCat-Image-Edit takes its image processor from
there when it is made.
"""
TEXTS = {"BriaFiboEditPipeline": '{"edit_instruction": "a"}'}
"""A prompt that the call does not refuse, for those that do not take any."""
STAGES = {"HeliosPyramidPipeline": ("pyramid_num_inference_steps_list", 3)}
"""Argument that names the steps of each stage, in place of a number of them, and how many stages there are."""


def steps_setting(pipeline: str, num_steps: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """The argument of a pipeline's call that says how many steps it takes; call: what it is given besides.

    Stages that `call` names, as many steps as these, stay; else all have as many, the first ones more.
    """
    if pipeline not in STAGES:
        return {"num_inference_steps": num_steps}
    name, count = STAGES[pipeline]
    if sum(call.get(name) or ()) == num_steps:
        return {name: list(call[name])}
    return {name: [num_steps // count + (i < num_steps % count) for i in range(count)]}

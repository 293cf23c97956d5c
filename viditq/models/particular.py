"""What single pipelines of diffusers want otherwise than all others, by the names of their classes."""

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

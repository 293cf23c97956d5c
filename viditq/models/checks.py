"""Checks of a model's description that need none of its weights, and no torch.

`pipeline` is a class of a pipeline, or what `outline.py` reads of one from its source.
"""

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from viditq.errors import UserError
from viditq.models.particular import BROKEN_PICTURES, STAGES, UNUSABLE
from viditq.models.sound_length import check_sound_length

DTYPES = ("float32", "float16", "bfloat16")
CHOICES = {"modality": ("image", "video"), "conditioning": ("text", "class")}
COUNTS = ("num_steps", "num_frames", "height", "width", "max_tokens", "fps", "calibration_batch_size")
MAPPINGS = ("encode", "call", "roles", "component_dtypes", "scheduler_settings")
OPTIONAL = ("num_frames", "height", "width", "max_tokens", "guidance_scale")
FRAMES = ("num_frames", "video_length", "frames", "segment_frame_length")
"""The names that pipelines use for how long a clip is."""
SCHEDULES = ("timesteps", "sigmas")
"""Arguments of calls that name the steps one by one."""
OURS = ("generator", "output_type", "return_dict", "prompt")
"""What every call is given here."""
TAKES_IMAGE = r"(cond_|control_|conditioning_|reference_|mask_|input_|pose_|face_)?(image|images|video)"
TAKES_MORE = r"last_image|(mask|background|inpaint)_(image|video)|mask|controls"  # beside one of these
CLIPS = r"video|controls"
"""In the names of arguments that take a list of frames, or of one."""
# Class names of pipelines that have such an argument with a default, and fail without it all the same
FROM_IMAGE = (
    r"Img2Img|Image2Image|ImageToVideo|Image2Video|(?<!T)I2V|VideoToVideo|VideoToWorld|Inpaint|Edit|Pix2Pix|Control|Adapter"
    r"|Fill|Upscale|SuperResolution|Layered|Refine|Depth2Img"
)
# Pipeline that encodes words in a way of its own -> why it is refused, and what to take in its place
WITHOUT_ENCODING = {
    "JoyImageEditPlusPipeline": ("words and pictures are encoded together", "JoyImageEditPipeline, of one picture"),
    "MiniMaxH3ModularPipeline": (
        "its denoiser is told the noise levels of frames and of sound in one list",
        "model=ltx2, or model=kandinsky6",
    ),
    "WanAnimate2ModularPipeline": ("it makes a clip segment by segment, each from the last", "model=wan2.2_animate"),
    "Kandinsky6SRPipeline": ("it enlarges what another model made", "model=kandinsky6"),
}
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
GUESSED = ("pipeline", "modality", "encode_outputs", "denoisers", "timestep_scale")


def check_values(model: Any) -> None:
    """Raises UserError for the first field of a ModelAdapter whose value is not allowed."""
    for key in GUESSED:
        text_only = key == "encode_outputs" and model.conditioning != "text"
        if getattr(model, key) is None and not model.guess and not text_only:
            raise UserError(f"model.{key} has no value. Give one: model.{key}=...")
    for key, dtype in {"dtype": model.dtype, **{f"component_dtypes.{k}": v for k, v in _dtypes(model)}}.items():
        if dtype not in DTYPES:
            raise UserError(f"model.{key}={dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    for key, allowed in CHOICES.items():
        value = getattr(model, key)
        if value not in allowed and not (value is None and model.guess):
            raise UserError(f"model.{key}={value!r} is unknown; choose {' or '.join(allowed)}.")
    for key in MAPPINGS:
        if not isinstance(getattr(model, key), Mapping):
            raise UserError(f"model.{key}={getattr(model, key)!r} must be a mapping, such as {{}}.")
    for key, patterns in {"keep_float": model.keep_float, **{f"roles.{k}": v for k, v in model.roles.items()}}.items():
        if not isinstance(patterns, Sequence) or isinstance(patterns, str) or not all(map(_is_text, patterns)):
            raise UserError(f"model.{key}={patterns!r} must be a list of patterns of Linears, such as ['proj_out'].")
    if isinstance(model.float_roles, str) or not all(map(_is_text, model.float_roles)):
        raise UserError(f"model.float_roles={model.float_roles!r} must be a list of roles, such as [cross_attention].")
    for key in ("compile", "vae_tiling"):
        if not isinstance(getattr(model, key), bool):
            raise UserError(f"model.{key}={getattr(model, key)!r} must be true or false.")
    for key in COUNTS:
        _check_number(key, getattr(model, key), whole=True, lowest=1)
    _check_number("guidance_scale", model.guidance_scale, whole=False, lowest=0)
    if not isinstance(model.timestep_scale, dict):
        _check_number("timestep_scale", model.timestep_scale, whole=False, lowest=None)
    if isinstance(model.conditions, str) or not all(map(_is_text, model.conditions or ())):
        raise UserError(f"model.conditions={model.conditions!r} must be a list of arguments, such as [image].")
    if model.denoisers is not None and (isinstance(model.denoisers, str) or not model.denoisers):
        raise UserError(f"model.denoisers={model.denoisers!r} must be a list of parts, such as [transformer].")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def makes_clips(pipeline: Any) -> bool:
    """Whether a pipeline class samples videos."""
    return any(name in inspect.signature(pipeline.__call__).parameters for name in FRAMES)


def check_parts(pipeline: Any, index: Mapping[str, Any]) -> None:
    """Raises UserError if a pipeline is made of other parts than the folder has. index: its model_index.json."""
    parameters = inspect.signature(pipeline.__init__).parameters
    optional = {*pipeline._optional_components, *(k for k, p in parameters.items() if p.default is not p.empty)}
    needed = [k for k, p in parameters.items() if k not in ("self", *optional) and p.kind not in VARIADIC]
    if absent := [name for name in needed if name not in index]:
        raise UserError(
            f"model.pipeline={pipeline.__name__} is made of parts that the folder, made for {index.get('_class_name')},"
            f" lacks: {', '.join(absent)}. Give the folder's own class, or the folder of that pipeline."
        )


def check_call(pipeline: Any, given: set[str]) -> None:
    """Raises UserError for a pipeline that samples from more than text, a class or what model.conditions names.

    given: the arguments of its call that have a value.
    """
    if needed := needed_arguments(pipeline, given):
        named = f"[{', '.join(needed)}]"
        raise UserError(
            f"{pipeline.__name__} needs {', '.join(needed)}, which no prompt gives. Where these are pictures, name "
            f"them (+model.conditions={named}) and give data.images or data=image_prompts; otherwise choose a "
            "text-to-image, text-to-video or class-conditional pipeline."
        )


def needed_arguments(pipeline: Any, given: Collection[str]) -> list[str]:
    """The arguments of a pipeline's call that it does not sample without, but for those of `given`."""
    parameters = inspect.signature(pipeline.__call__).parameters
    needed = [
        name
        for name, p in parameters.items()
        if name not in ("self", *given) and p.kind not in VARIADIC and p.default is p.empty
    ]
    if re.search(FROM_IMAGE, pipeline.__name__):
        first, *others = [*(name for name in parameters if re.fullmatch(TAKES_IMAGE, name)), ""]
        wanted = [first, *(name for name in others if re.search("mask|control", name))]
        needed += [name for name in wanted if name not in ("", *given, *needed)]
    return needed


def conditions_of_call(pipeline: Any) -> list[str]:
    """The arguments of a pipeline's call that take pictures, as far as their names tell, where it works with them."""
    return [] if pipeline.__name__ in BROKEN_PICTURES else pictures_of_call(pipeline)


def pictures_of_call(pipeline: Any) -> list[str]:
    """The arguments of a pipeline's call that take pictures, as far as their names tell."""
    names = [*inspect.signature(pipeline.__call__).parameters]
    return [name for name in names if re.fullmatch(f"{TAKES_IMAGE}|{TAKES_MORE}", name)]


def given_to_call(model: Any) -> set[str]:
    """The arguments of the pipeline's call that a run gives it, besides those that every call has."""
    names = ["class_labels"] if model.conditioning == "class" else model.encode_outputs or ()
    encoded = {name for name in names if name is not None}
    encoded = encoded or {"prompt"}  # which a call that takes no embeddings is given again
    return encoded | {*model.call} | {*(model.conditions or ())}


def reads_words(pipeline: Any) -> bool:
    """Whether a pipeline (or its class) encodes no prompts: its denoiser reads words, among its tokens."""
    if hasattr(pipeline, "encode_prompt"):
        return False
    parts = inspect.signature((pipeline if inspect.isclass(pipeline) else type(pipeline)).__init__).parameters
    with_words = "prompt" in inspect.signature(pipeline.__call__).parameters
    return with_words and not any(name.startswith("text_encoder") for name in parts)


def no_encoding(pipeline: str) -> str:
    """Why a pipeline that encodes words otherwise than by `encode_prompt` is refused, and what to do instead."""
    why, instead = WITHOUT_ENCODING.get(pipeline, ("", "another model of docs/models.md"))
    why = why or "prompts cannot be encoded apart from its call, as every run does"
    return (
        f"{pipeline} has no encode_prompt: {why}. No yaml changes that; take {instead}. (A model of classes in place "
        "of text is described as conf/model/dit_xl2_256.yaml is.)"
    )


def check_arguments(model: Any, pipeline: Any) -> None:
    """Raises UserError for settings that the class `pipeline` would pass over (it may take **kwargs) or refuse."""
    if pipeline.__name__ in UNUSABLE:
        why, instead = UNUSABLE[pipeline.__name__]
        raise UserError(f"{pipeline.__name__} cannot be run: {why}. Take {instead}.")
    encodes = model.conditioning == "text" and not reads_words(pipeline)
    needed = ("from_pretrained", "__call__", *["encode_prompt"] * encodes)
    if lacking := [name for name in needed if not hasattr(pipeline, name)]:
        if lacking == ["encode_prompt"]:
            raise UserError(no_encoding(pipeline.__name__))
        raise UserError(f"model.pipeline={model.pipeline} is no pipeline to drive: it has no {lacking[0]}.")
    of_call = _named(pipeline.__call__)
    of_text = _named(pipeline.encode_prompt) if encodes else {}
    for node, function, known in (("encode", "encode_prompt", of_text), ("call", "__call__", of_call)):
        for key in getattr(model, node):
            if key not in known or key in OURS:
                why = "is given it by every run" if key in known else "has no such argument"
                names = ", ".join(name for name in known if name not in OURS) or "none"
                if node == "encode" and model.conditioning == "text" and not encodes:
                    raise UserError(f"model.encode.{key}: {pipeline.__name__} encodes nothing. Give model.call alone.")
                raise UserError(
                    f"model.{node}.{key}: {pipeline.__name__}.{function} {why}. Leave it out; those to set are {names}."
                )
    for name in model.conditions or ():
        if pipeline.__name__ in BROKEN_PICTURES:
            raise UserError(
                f"model.conditions has {name!r}; {pipeline.__name__}: {BROKEN_PICTURES[pipeline.__name__]}."
            )
        if name not in of_call or name in OURS:
            taken = ", ".join(conditions_of_call(pipeline)) or "none"
            raise UserError(f"model.conditions has {name!r}; {pipeline.__name__} takes these pictures: {taken}.")
    _check_given_once(model, of_call)
    _check_modality(model, pipeline)
    check_sound_length(model)


def _check_given_once(model: Any, of_call: Mapping[str, Any]) -> None:
    """What has a field of its own goes through that field alone."""
    steps = "num_inference_steps"
    if model.pipeline in STAGES:
        _check_stages(model)
        steps = STAGES[model.pipeline][0]
    fields = {steps: "num_steps", model.guidance_argument: "guidance_scale"}
    for argument, field in fields.items():
        if argument not in of_call and getattr(model, field) is not None:
            raise UserError(
                f"model.{field}={getattr(model, field)}: {model.pipeline} takes no {argument}. Set model.{field}=null"
                + (", or name the argument: model.guidance_argument=..." if field == "guidance_scale" else "")
            )
    fields |= {"height": "height", "width": "width"}
    fields |= dict.fromkeys(FRAMES, "num_frames") if model.modality == "video" else {}
    for argument, field in fields.items():
        mine, of_stages = getattr(model, field), field == "num_steps" and model.pipeline in STAGES
        if mine is not None and model.call.get(argument, mine) != mine and not of_stages:
            raise UserError(
                f"model.call.{argument}={model.call[argument]} and model.{field}={mine} are the same setting. Give "
                f"model.{field} alone."
            )
    for argument in SCHEDULES:
        given = model.call.get(argument)
        if isinstance(given, Sequence) and len(given) != model.num_steps:
            raise UserError(
                f"model.call.{argument} has {len(given)} steps and model.num_steps is {model.num_steps}. Give as many, "
                f"or model.call.{argument}=null."
            )


def _check_stages(model: Any) -> None:
    """Steps that are counted by stage add up to model.num_steps."""
    argument, stages = STAGES[model.pipeline]
    listed = model.call.get(argument)
    if listed is not None and (len(listed) != stages or sum(listed) != model.num_steps):
        raise UserError(
            f"model.call.{argument}={list(listed)} and model.num_steps={model.num_steps}: name {stages} numbers, which "
            "add up to the steps."
        )
    if model.num_steps < stages:
        raise UserError(f"model.num_steps={model.num_steps}: {model.pipeline} has {stages} stages of a step at least.")


def _check_modality(model: Any, pipeline: Any) -> None:
    if model.modality == "video" and not makes_clips(pipeline):
        raise UserError(f"model.modality=video: {pipeline.__name__} makes images. Set model.modality=image.")
    if model.modality == "image" and model.num_frames not in (None, 1):
        raise UserError(
            f"model.num_frames={model.num_frames}: an image has one. Leave it out, or choose a video model."
        )
    if model.modality == "image" and makes_clips(pipeline) and 1 not in [model.call.get(name) for name in FRAMES]:
        raise UserError(
            f"model.modality=image: {pipeline.__name__} makes videos. Set model.modality=video, or let it make single "
            "frames: +model.call.num_frames=1."
        )


def _named(function: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a pipeline's method that have a name."""
    parameters = inspect.signature(function).parameters.items()
    return {name: p for name, p in parameters if name != "self" and p.kind not in VARIADIC}


def _dtypes(model: Any) -> list[tuple[str, str]]:
    return list(model.component_dtypes.items())


def _check_number(key: str, value: Any, whole: bool, lowest: int | None) -> None:
    """lowest: the least allowed value; None = anything above 0."""
    if value is None and key in (*OPTIONAL, *GUESSED):
        return
    kind = int if whole else int | float
    good = isinstance(value, kind) and not isinstance(value, bool)
    if not good or not (value > 0 if lowest is None else value >= lowest):
        number = "a whole number" if whole else "a number"
        raise UserError(
            f"model.{key}={value!r} must be {number} {'above 0' if lowest is None else f'of at least {lowest}'}."
        )

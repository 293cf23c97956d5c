"""Parts of a pipeline against their files: what is missing, left over, renamed or of another shape is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, Qwen3Model, T5EncoderModel
from zoo import images, text, videos
from zoo.saving import save

from viditq.errors import UserError
from viditq.experiment import build
from viditq.job import Job
from viditq.models.adapter import ModelAdapter
from viditq.models.contents import check_contents, check_finite, check_part, parts_by_variant
from viditq.models.mismatch import Mismatch
from viditq.models.text import encode_prompt
from viditq.run_dir import RunDir
from viditq.runner import described

Tensors = dict[str, Tensor]
SAFE = {"text_encoder": "model.safetensors"}
DENOISER = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.1."""
    folder = tmp_path_factory.mktemp("models") / "wan"
    save(videos.wan21, folder)
    return folder


@pytest.fixture
def wan(original: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "wan"))


@pytest.fixture
def adapter_of(configure: Callable[..., Any]) -> Callable[..., ModelAdapter]:
    """(folder, *overrides) -> the adapter of a Wan 2.1 in that folder."""

    def adapter_of(folder: Path, *overrides: str, model: str = "wan2.1_1.3b") -> ModelAdapter:
        size = ("model.height=32", "model.width=32", "model.num_frames=5", "model.num_steps=2", "model.dtype=float32")
        cfg = configure(f"model={model}", f"model.path='{folder}'", *size, "name=x", *overrides)
        return instantiate(cfg.model, _convert_="all")

    return adapter_of


def change(folder: Path, part: str, edit: Callable[[Tensors], Tensors]) -> Path:
    """Rewrite a part's weights."""
    file = folder / part / SAFE.get(part, DENOISER)
    save_file({k: v.contiguous() for k, v in edit(load_file(file)).items()}, file, metadata={"format": "pt"})
    return file


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def infixed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if not re.search(pattern, name)}


def added(**tensors: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda mine: mine | {name.replace("__", "."): value for name, value in tensors.items()}


def quantized(dtype: torch.dtype, scale: str) -> Callable[[Tensors], Tensors]:
    """One weight in `dtype`, and its scale under another name."""

    def edit(tensors: Tensors) -> Tensors:
        name = "blocks.0.ffn.net.2.weight"
        return tensors | {name: tensors[name].to(dtype), name.replace("weight", scale): torch.ones(1)}

    return edit


# part, what became of its weights, what the message says
RENAMED_OR_WORSE: dict[str, tuple[str, Callable[[Tensors], Tensors], list[str]]] = {
    "text encoder of DataParallel": (
        "text_encoder",
        prefixed("module."),
        ["missing from the files", "encoder.block.0", "'module.' too much", "DataParallel", "save model.module"],
    ),
    "text encoder with a prefix": (
        "text_encoder",
        prefixed("model."),
        ["left over", "'model.' too much", "take it off"],
    ),
    "text encoder of torch.compile": ("text_encoder", prefixed("_orig_mod."), ["'_orig_mod.'", "torch.compile"]),
    "denoiser of DataParallel": ("transformer", prefixed("module."), ["WanTransformer3DModel", "'module.' too much"]),
    "denoiser of a trainer": ("transformer", prefixed("model.diffusion_model."), ["'model.diffusion_model.' too much"]),
    "denoiser of PEFT": (
        "transformer",
        infixed("to_q.", "to_q.base_layer."),
        ["blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_q.base_layer.weight", "PEFT", "merge_and_unload"],
    ),
    "decoder of torch.compile": ("vae", prefixed("_orig_mod."), ["AutoencoderKLWan", "torch.compile"]),
    "denoiser without a tensor": ("transformer", without(r"blocks\.1\.attn2\.to_v\.bias"), ["1 missing", "to_v.bias"]),
    "decoder without a tensor": ("vae", without(r"^decoder\.conv_in\.bias"), ["1 missing", "decoder.conv_in.bias"]),
    "text encoder without a tensor": ("text_encoder", without(r"final_layer_norm"), ["1 missing", "final_layer_norm"]),
    "denoiser with one more": ("transformer", added(extra__weight=torch.ones(2)), ["1 left over", "extra.weight"]),
    "text encoder with one more": (
        "text_encoder",
        added(encoder__extra=torch.ones(2)),
        ["1 left over", "encoder.extra"],
    ),
    "LoRA beside intact weights": (
        "transformer",
        added(blocks__0__attn1__to_q__lora_A__weight=torch.ones(2, 24)),
        ["1 left over", "LoRA", "fuse_lora"],
    ),
    "kohya's LoRA": ("text_encoder", added(lora_te_block_0_q__lora_up__weight=torch.ones(2, 2)), ["LoRA", "fuse_lora"]),
    "8 bits and scales": (
        "transformer",
        quantized(torch.float8_e4m3fn, "weight_scale"),
        ["ffn.net.2.weight_scale", "stored quantized", "float checkpoint"],
    ),
    "8 bits and scales, in ComfyUI's words": (
        "transformer",
        quantized(torch.float8_e4m3fn, "scale_weight"),
        ["stored quantized"],
    ),
    "bitsandbytes": ("transformer", quantized(torch.int8, "SCB"), ["whole numbers", "stored quantized"]),
    "a denoiser of fewer layers": ("transformer", without(r"^blocks\.1\."), ["missing", "more layers than the files"]),
    "of another width": (
        "transformer",
        lambda t: t | {"proj_out.weight": torch.ones(3, 5)},
        ["1 of another shape", "proj_out.weight (3 x 5 stored, 64 x 24 needed)"],
    ),
    "text encoder of another width": (
        "text_encoder",
        lambda t: t | {"encoder.final_layer_norm.weight": torch.ones(5)},
        ["1 of another shape", "final_layer_norm.weight (5 stored, 16 needed)"],
    ),
}


@pytest.mark.parametrize("case", RENAMED_OR_WORSE)
def test_weights_that_are_not_the_models(case: str, wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    part, edit, words = RENAMED_OR_WORSE[case]
    change(wan, part, edit)
    with pytest.raises(UserError) as error:
        check_contents(adapter_of(wan))
    message = str(error.value)
    assert str(wan / part) in message and all(word.lower() in message.lower() for word in words), message


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_fewer_layers_in_the_description_than_in_the_weights(
    part: str, wan: Path, adapter_of: Callable[..., ModelAdapter]
) -> None:
    config = wan / part / "config.json"
    layers = json.loads(config.read_text())["num_layers"]
    edit_json(config, num_layers=layers - 1 or 2)
    word = "fewer" if layers > 1 else "more"
    with pytest.raises(UserError, match=rf"config\.json describes {word} layers than the files hold.*belongs to these"):
        check_contents(adapter_of(wan))


def test_refused_before_anything_is_encoded(wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    """Also where only the text part is loaded, as the first stage of a hub's model does."""
    change(wan, "vae", prefixed("module."))
    with pytest.raises(UserError, match=r"vae is not what AutoencoderKLWan is made of"):
        adapter_of(wan).load_text_part()


def test_two_loads_are_equal_to_the_bit(wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    adapter = adapter_of(wan)
    loads = [adapter.load_complete() for _ in range(2)]
    for part in ("transformer", "text_encoder", "vae"):
        first, second = (getattr(pipeline, part).state_dict() for pipeline in loads)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    one, other = (encode_prompt(adapter, pipeline, "a red circle") for pipeline in loads)
    assert all(torch.equal(one[name], other[name]) for name in one)


# What stays right -----------------------------------------------------------------------------------------------------


def test_tensors_that_the_library_ignores(wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    change(wan, "transformer", added(blocks__0__attn2__norm_added_q__weight=torch.ones(24)))
    check_contents(adapter_of(wan))


def test_tied_embeddings_are_stored_under_either_name(wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    change(wan, "text_encoder", infixed("shared.weight", "encoder.embed_tokens.weight"))
    check_contents(adapter_of(wan))
    change(wan, "text_encoder", without("embed_tokens"))
    with pytest.raises(UserError, match=r"missing from the files, first encoder\.embed_tokens\.weight"):
        check_contents(adapter_of(wan))


@pytest.mark.parametrize(
    ("cls", "build", "edit"),
    [
        (CLIPTextModel, text.clip, infixed("", "")),
        (CLIPTextModel, text.clip, added(text_model__embeddings__position_ids=torch.ones(1, 77, dtype=torch.int64))),
        (CLIPTextModel, text.clip, lambda t: {n.removeprefix("text_model."): v for n, v in t.items()}),
        (Qwen3Model, text.qwen3, prefixed("model.")),
        (Qwen3Model, text.qwen3, lambda t: prefixed("model.")(t) | {"lm_head.weight": torch.ones(2)}),
        (T5EncoderModel, text.t5, added(decoder__block__0__weight=torch.ones(2))),
        (T5EncoderModel, text.t5, lambda t: t | {"lm_head.weight": torch.ones(2)}),
    ],
)
def test_names_that_transformers_itself_reads(
    cls: Any, build: Callable[[], Any], edit: Callable[[Tensors], Tensors], tmp_path: Path
) -> None:
    """Those of earlier versions, and of a model with a head where its trunk is asked for."""
    folder = tmp_path / "text_encoder"
    build()[1].save_pretrained(folder)
    change(tmp_path, "text_encoder", edit)
    check_part(cls, folder, None, lenient=False)


def test_old_names_of_attention_in_a_decoder(tmp_path: Path) -> None:
    """diffusers renames them on load."""
    save(images.pixart_alpha, tmp_path / "model")
    pipeline = images.pixart_alpha()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(tensors: Tensors) -> Tensors:
        for new, was in names.items():
            tensors = {
                re.sub(rf"(mid_block\.attentions\.0\.){re.escape(new)}\b", rf"\1{was}", k): v
                for k, v in tensors.items()
            }
        return tensors

    change(tmp_path / "model", "vae", old)
    check_part(type(pipeline.vae), tmp_path / "model" / "vae", None, lenient=False)


def test_a_table_that_is_computed_anew(tmp_path: Path) -> None:
    """As files of earlier versions hold it; the model has it as a buffer that is not stored."""
    save(images.pixart_alpha, tmp_path / "model")
    change(tmp_path / "model", "transformer", added(pos_embed__pos_embed=torch.ones(1, 4, 16)))
    check_part(diffusers.PixArtTransformer2DModel, tmp_path / "model" / "transformer", None, lenient=False)


# Files ----------------------------------------------------------------------------------------------------------------


def shard(file: Path) -> Path:
    """A safetensors file as two shards with an index, which is returned."""
    tensors = load_file(file)
    names = sorted(tensors)
    halves = {1: names[::2], 2: names[1::2]}
    weight_map = {}
    for number, half in halves.items():
        name = f"{file.stem}-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in half}, file.parent / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, name)
    file.unlink()
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_shards(part: str, wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    adapter = adapter_of(wan)
    whole = getattr(adapter.load_complete(), part).state_dict()
    index = shard(wan / part / SAFE.get(part, DENOISER))
    check_contents(adapter)
    read = getattr(adapter.load_complete(), part).state_dict()
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    second = next((wan / part).glob("*-00002-of-00002.safetensors"))
    tensors = load_file(second)
    lost = sorted(tensors)[0]
    save_file({n: v for n, v in tensors.items() if n != lost}, second, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 missing from the files, first " + re.escape(lost)):
        check_contents(adapter)  # the index goes on naming it
    second.unlink()
    with pytest.raises(UserError, match=f"{second.name} is missing, which {index.name} names"):
        check_contents(adapter)


@pytest.mark.parametrize(
    ("part", "name"), [("vae", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")]
)
def test_pickled_weights_where_there_are_no_others(
    part: str, name: str, wan: Path, adapter_of: Callable[..., ModelAdapter]
) -> None:
    file = wan / part / SAFE.get(part, DENOISER)
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, wan / part / name)
    check_contents(adapter_of(wan))
    torch.save(prefixed("module.")(tensors), wan / part / name)
    with pytest.raises(UserError, match=r"'module\.' too much"):
        check_contents(adapter_of(wan))
    (wan / part / name).unlink()
    with pytest.raises(UserError, match=rf"{part} holds no weights"):
        check_contents(adapter_of(wan))
    check_contents(adapter_of(wan), lenient=True)


def test_scales_in_a_file_of_their_own(wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    change(wan, "transformer", lambda t: {n: v.to(torch.float8_e4m3fn) for n, v in t.items()})
    check_contents(adapter_of(wan))  # plain numbers of 8 bits are what they are
    save_file({"blocks.0.ffn.net.2.weight_scale": torch.ones(1)}, wan / "transformer" / "scales.safetensors")
    with pytest.raises(UserError, match=r"stored in 8 bits, first .*scales apart in scales\.safetensors"):
        check_contents(adapter_of(wan))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_stored_quantized(part: str, wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    edit_json(wan / part / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UserError, match=rf"{part} was stored quantized .*bitsandbytes.*take the float checkpoint"):
        check_contents(adapter_of(wan))


def test_variants(wan: Path, original: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    files = [(wan / part / SAFE.get(part, DENOISER)) for part in ("transformer", "text_encoder")]
    for file in files:
        half = {name: value.half() for name, value in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"), metadata={"format": "pt"})
    plain, marked = adapter_of(wan), adapter_of(wan, "+model.variant=fp16")
    assert parts_by_variant(marked) == (["text_encoder", "transformer"], ["vae"])
    one, other = (a.load_complete().transformer.proj_out.weight for a in (plain, marked))
    assert not torch.equal(one, other) and torch.equal(one.half().float(), other)
    for file in files:
        file.unlink()
    check_contents(marked)
    with pytest.raises(UserError, match=r"variant fp16 alone: give \+model\.variant=fp16"):
        check_contents(plain)
    with pytest.raises(UserError, match=r"model\.variant='bf16': .* has no file of it.*Leave it out"):
        check_contents(adapter_of(original, "+model.variant=bf16"))


def test_a_run_says_and_keeps_apart_what_is_of_the_variant(
    wan: Path, configure: Callable[..., Any], tmp_path: Path
) -> None:
    half = {name: value.half() for name, value in load_file(wan / "transformer" / DENOISER).items()}
    save_file(half, wan / "transformer" / "diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    small = ["model=wan2.1_1.3b", "name=t", "logger=none", "data.num_prompts=2", f"cache_dir='{tmp_path}/cache'"]
    plain, marked = (build(configure(*small, f"model.path='{wan}'", *more)) for more in ([], ["+model.variant=fp16"]))
    assert "variant fp16: transformer; of no variant: text_encoder, vae" in described(marked)
    assert "variant" not in described(plain)
    keys = [Job(e, RunDir(tmp_path / "run", e.tracked)) for e in (plain, marked)]
    for kind in ("embeds", "reference", "stats"):
        without_mark, with_mark = (getattr(job, kind).key["model"] for job in keys)
        assert with_mark == {**without_mark, "variant": "fp16"}  # what caches of earlier versions hold stays valid


def test_a_file_that_diffusers_trips_over_when_it_looks_for_a_variant(
    wan: Path, adapter_of: Callable[..., ModelAdapter]
) -> None:
    (wan / "vae" / "LICENSE").write_text("")
    check_contents(adapter_of(wan))
    with pytest.raises(UserError, match="LICENSE, whose name has no dot"):
        check_contents(adapter_of(wan, "+model.variant=fp16"))


def test_variant_of_a_denoiser_elsewhere(wan: Path, original: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    file = wan / "transformer" / DENOISER
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    adapter = adapter_of(original, f"+model.denoiser_path='{wan}'", "+model.variant=fp16")
    assert adapter.load().transformer is not None


# Other parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer", "scheduler", "vae", "text_encoder"])
def test_folder_of_a_part_that_is_gone(name: str, wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    shutil.rmtree(wan / name)
    with pytest.raises(UserError, match=rf"{name} is missing, a part that model_index\.json names"):
        check_contents(adapter_of(wan))


@pytest.mark.parametrize(
    ("name", "gone", "words"),
    [
        ("tokenizer", "tokenizer.json", "holds no vocabulary: tokenizer.json"),
        ("scheduler", "scheduler_config.json", "holds no configuration"),
        ("vae", "config.json", "config.json is missing"),
    ],
)
def test_file_of_a_part_that_is_gone(
    name: str, gone: str, words: str, wan: Path, adapter_of: Callable[..., ModelAdapter]
) -> None:
    (wan / name / gone).unlink()
    with pytest.raises(UserError, match=words):
        check_contents(adapter_of(wan))


def test_a_configuration_that_is_a_list(wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    (wan / "vae" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"vae/config\.json is damaged: it holds list, not names and values\. Copy the"):
        check_contents(adapter_of(wan))


def test_a_pipeline_that_names_no_scheduler(wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    edit_json(wan / "model_index.json", scheduler=[None, None])
    with pytest.raises(UserError, match="names no scheduler"):
        check_contents(adapter_of(wan))


def test_a_class_that_the_library_lacks(wan: Path, adapter_of: Callable[..., ModelAdapter]) -> None:
    edit_json(wan / "model_index.json", vae=["diffusers", "AutoencoderOfTomorrow"])
    with pytest.raises(UserError, match="AutoencoderOfTomorrow as vae; the installed diffusers has no such class"):
        check_contents(adapter_of(wan))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(torch.float32, "A wider type does not help"), (torch.bfloat16, "does not help"), (torch.float16, "=bfloat16 or")],
)
def test_weights_that_are_not_numbers(dtype: torch.dtype, words: str) -> None:
    linear = torch.nn.Linear(2, 2, dtype=dtype)
    linear.weight.data[1, 0] = torch.inf
    with pytest.raises(UserError, match=f"vae.weight of m contains NaN or inf as {str(dtype)[6:]}.*{words}"):
        check_finite("vae", Path("m"), linear)


def test_causes_are_not_told_where_there_are_none() -> None:
    """A name that merely sounds like a scale, and layers of another shape."""
    table = Mismatch(left_over={"blocks.0.scale_shift_table"}, known={"proj.weight"})
    assert "not of the same model" in table.told() and "quantized" not in table.told()
    shaped = Mismatch(missing={"a.1.weight"}, shapes={"a.0.weight": ((1,), (2,))}, known={"a.0.weight", "a.1.weight"})
    assert "layers" not in shaped.told()

"""What is told from sources and headers of files is what the classes themselves say; in doubt nothing is told."""

import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from shrunk import ROOT, compose_config

from viditq.assets import SHIPPED
from viditq.checks import check_model
from viditq.errors import UserError
from viditq.models import outline
from viditq.models.adapter import ModelAdapter
from viditq.models.registry import OWN
from viditq.quant.execution.model_linears import linear_names

YAMLS = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))]
PIPELINES = sorted({str(values["pipeline"]) for values in YAMLS if values.get("pipeline")} - {*OWN})
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def shape_of(function: Any) -> list[tuple[str, Any, bool]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default is p.empty) for p in parameters]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_outline_of_a_class_has_its_signatures(name: str) -> None:
    cls, found = getattr(diffusers, name), outline.outline_of(name)
    if name == "DiTPipeline" or name.endswith("ModularPipeline"):  # of classes, without a text; made of blocks
        assert found is None
        return
    assert hasattr(found, "encode_prompt") == hasattr(cls, "encode_prompt")
    for method in (name for name in outline.METHODS if hasattr(cls, name)):
        assert shape_of(getattr(found, method)) == shape_of(getattr(cls, method))
    assert [*found._optional_components] == [*cls._optional_components] and found.__name__ == name


@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "DiffusionPipelin", "AutoencoderKL", "StableUnCLIPPipeline"]
)
def test_what_is_a_pipeline(name: str) -> None:
    listed = outline.listed_in(outline._root() / "__init__.py")
    told = not {*listed.get(name, ["models"])} <= {*outline.OTHER_KINDS}
    cls = getattr(diffusers, name, None)
    assert told == (cls is not None and issubclass(cls, diffusers.DiffusionPipeline))


def shipped(name: str, **values: Any) -> DictConfig:
    """The model's node of the configuration, with other values."""
    plain = OmegaConf.to_container(compose_config(f"model={name}").model, resolve=True)
    return OmegaConf.create(
        {**plain, **{k: {**plain[k], **v} if isinstance(v, dict) else v for k, v in values.items()}}
    )


def built(node: DictConfig) -> ModelAdapter:
    values = OmegaConf.to_container(node, resolve=True)
    return ModelAdapter(**{key: value for key, value in values.items() if key != "_target_"})


@pytest.mark.parametrize(
    "values",
    [
        {"pipeline": "PixArtAlphaPipelin"},
        {"pipeline": "PixArtTransformer2DModel"},
        {"pipeline": "WanPipeline"},
        {"pipeline": "StableDiffusion3Pipeline"},
        {"pipeline": "FluxImg2ImgPipeline"},
        {"pipeline": "WanImageToVideoPipeline"},
        {"call": {"foo": 1}},
        {"encode": {"foo": 1}},
        {"modality": "video"},
        {"num_frames": 4},
        {"guidance_argument": "true_cfg_scale"},
        {"keep_float": ["nope"]},
        {"keep_float": ["proj_out", "caption_projection.*", "*.attn3.*"]},
    ],
    ids=str,
)
def test_it_is_refused_in_the_words_of_the_model_itself(values: dict[str, Any]) -> None:
    node = shipped("tiny_image", **values)
    with pytest.raises(UserError) as early:
        check_model(node, [])
    with pytest.raises(UserError) as late:
        adapter = built(node)
        adapter.linear_roles(linear_names(adapter.build_denoiser()))
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize("name", ["tiny_image", "tiny_video"])
def test_every_linear_is_among_the_layers_that_the_files_tell(name: str) -> None:
    adapter = built(shipped(name))
    found = outline.layer_names(SHIPPED / name, ["transformer"])
    assert found is not None and {*found} >= {*linear_names(adapter.build_denoiser())}


def test_layers_of_several_denoisers_have_their_part_s_name(model_copy: Path) -> None:
    shutil.copytree(model_copy / "transformer", model_copy / "transformer_2")
    alone = outline.layer_names(model_copy, ["transformer_2"])
    both = outline.layer_names(model_copy, ["transformer", "transformer_2"])
    assert alone is not None and both == [
        f"{part}.{name}" for part in ("transformer", "transformer_2") for name in alone
    ]
    several = SimpleNamespace(
        guess=True, denoiser_path=None, denoisers=["transformer", "transformer_2"], name="m", keep_float=[]
    )
    outline.check_outline(several, model_copy, ["transformer_2.*.attn1.to_q"])
    with pytest.raises(UserError, match=r"'transformer_3\.\*' matches no Linear of the model"):
        outline.check_outline(several, model_copy, ["transformer_3.*"])


@pytest.mark.parametrize("old, new", [("to_q", "query"), ("proj_out", "module.proj_out"), ("weight", "weight_g")])
def test_nothing_is_told_where_names_may_be_others_in_the_model(model_copy: Path, old: str, new: str) -> None:
    tensors = load_file(model_copy / WEIGHTS)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, model_copy / WEIGHTS)
    assert outline.layer_names(model_copy, ["transformer"]) is None


def test_nothing_is_told_of_other_files(model_copy: Path) -> None:
    """Damaged ones, those that are no safetensors, and those of a diffusers that is laid out otherwise."""
    (model_copy / WEIGHTS).write_bytes((model_copy / WEIGHTS).read_bytes()[:1000])
    assert outline.layer_names(model_copy, ["transformer"]) is None
    (model_copy / WEIGHTS).rename(model_copy / "transformer" / "diffusion_pytorch_model.bin")
    assert outline.layer_names(model_copy, ["transformer"]) is None
    assert outline.listed_in(model_copy / "no_such_file.py") == {}
    (model_copy / "model_index.json").write_text("{")
    check_model(shipped("tiny_image", path=str(model_copy), pipeline="WanPipeline"), ["nope"])
    check_model(shipped("tiny_image", path=str(model_copy), denoisers=None, guess=True), ["nope"])

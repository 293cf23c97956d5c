"""LoRA beside quantized Linears: exact, several at once, removable; files of every layout."""

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import viditq
from viditq.assets import SHIPPED
from viditq.errors import UserError
from viditq.quant import QuantSpec, Recipe, quantize_denoiser
from viditq.quant.execution.linear import quant_linears

Q, FF = "transformer_blocks.0.attn1.to_q", "transformer_blocks.2.ff.net.2"
FLOAT = "proj_out"  # a Linear that stays in float


@pytest.fixture(scope="module")
def artifact(finished_run: Path) -> Path:
    return finished_run


@pytest.fixture
def pipeline(artifact: Path) -> Any:
    return viditq.load_quantized(artifact)


def pair(pipeline: Any, layer: str, rank: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random A and B for a layer of the denoiser."""
    chance = torch.Generator().manual_seed(seed)
    linear = pipeline.transformer.get_submodule(layer)
    return (
        torch.randn(rank, linear.in_features, generator=chance) * 0.1,
        torch.randn(linear.out_features, rank, generator=chance) * 0.1,
    )


def lora_file(path: Path, pipeline: Any, layers: tuple[str, ...] = (Q, FF, FLOAT), **how: Any) -> dict[str, Tensor]:
    """In diffusers' layout; returns layer -> B A."""
    tensors, products = {}, {}
    for layer in layers:
        down, up = pair(pipeline, layer, **how)
        tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        products[layer] = up @ down
    save_file(tensors, path)
    return products


def sample(pipeline: Any) -> Tensor:
    return torch.from_numpy(
        pipeline(
            "a small red circle", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)
        ).images
    )


def at_segment(pipeline: Any, layers: tuple[str, ...]) -> dict[str, nn.Module]:
    """Layers that can be called alone: a QuantLinear asks the context for the noise level."""
    found = {layer: pipeline.transformer.get_submodule(layer) for layer in layers}
    for linear in quant_linears(pipeline.transformer).values():
        linear.context.segment = 0
    return found


def gains(pipeline: Any, layers: tuple[str, ...], add: Any) -> dict[str, Tensor]:
    """What `add()` changes of each layer's answer to the unit inputs: the matrix that it adds, transposed."""
    found = at_segment(pipeline, layers)
    inputs = {name: torch.eye(linear.in_features) for name, linear in found.items()}
    before = {name: linear(inputs[name]) for name, linear in found.items()}
    add()
    return {name: (linear(inputs[name]) - before[name]).T for name, linear in found.items()}


def test_every_linear_gains_the_product_and_loses_it_again(pipeline: Any, tmp_path: Path) -> None:
    products = lora_file(tmp_path / "style.safetensors", pipeline)
    before = sample(pipeline)
    added = gains(pipeline, (Q, FF, FLOAT), lambda: viditq.add_lora(pipeline, tmp_path / "style.safetensors", 0.5))
    for name, product in products.items():
        torch.testing.assert_close(added[name], 0.5 * product, atol=1e-5, rtol=1e-4)
    assert viditq.lora_scales(pipeline) == {"style": 0.5}
    with_it = sample(pipeline)
    viditq.set_lora_scale(pipeline, "style", 0.0)
    unfused = float((sample(pipeline) - before).abs().mean())  # other last bits, and codes that they flip
    assert unfused < 0.01 < float((with_it - before).abs().mean())
    viditq.remove_lora(pipeline, "style")
    assert torch.equal(sample(pipeline), before)
    assert viditq.lora_scales(pipeline) == {}
    assert not [name for name, _ in pipeline.transformer.named_buffers() if "lora_style" in name]


def test_several_add_up_and_go_one_by_one(pipeline: Any, tmp_path: Path) -> None:
    one = lora_file(tmp_path / "one.safetensors", pipeline)
    two = lora_file(tmp_path / "two.safetensors", pipeline, (Q,), rank=3, seed=1)

    def both() -> None:
        viditq.add_lora(pipeline, tmp_path / "one.safetensors")
        viditq.add_lora(pipeline, tmp_path / "two.safetensors", -2.0, name="other")

    added = gains(pipeline, (Q, FF), both)
    torch.testing.assert_close(added[Q], one[Q] - 2 * two[Q], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(added[FF], one[FF], atol=1e-5, rtol=1e-4)
    twin = copy.deepcopy(pipeline.transformer)
    left = gains(pipeline, (Q,), lambda: viditq.remove_lora(pipeline, "one"))
    torch.testing.assert_close(left[Q], -one[Q], atol=1e-5, rtol=1e-4)
    assert viditq.lora_scales(pipeline) == {"other": -2.0}
    assert len(twin.get_submodule(Q)._forward_hooks) == 2, "a copy keeps what it had"
    viditq.remove_lora(pipeline)
    assert viditq.lora_scales(pipeline) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_into_float_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """The weights hold the product, times its scale; nothing is left beside them. Codes cannot hold it."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(SHIPPED / "tiny_image", dtype=dtype)
    products = lora_file(tmp_path / "one.safetensors", pipeline)
    before = {layer: pipeline.transformer.get_submodule(layer).weight.detach().float().clone() for layer in products}
    viditq.add_lora(pipeline, tmp_path / "one.safetensors", scale=0.5)
    viditq.merge_lora(pipeline, "one")
    assert viditq.lora_scales(pipeline) == {}
    for layer, product in products.items():
        weight = pipeline.transformer.get_submodule(layer).weight
        assert weight.dtype == dtype
        expected = before[layer] + 0.5 * product
        torch.testing.assert_close(weight.float(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)
    with pytest.raises(UserError, match="no LoRA 'one'"):
        viditq.merge_lora(pipeline, "one")


def test_codes_take_no_lora_in(pipeline: Any, tmp_path: Path) -> None:
    lora_file(tmp_path / "one.safetensors", pipeline)
    viditq.add_lora(pipeline, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="this pipeline is quantized"):
        viditq.merge_lora(pipeline)


def test_layouts_and_alphas(pipeline: Any, tmp_path: Path) -> None:
    """diffusers' header, PEFT's folder, rsLoRA, alphas beside the tensors, the older names."""
    down, up = pair(pipeline, Q)
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_q": 1}}))
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})}
    rs = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.use_rslora": True})}
    for file, prefix, ends, more, metadata, factor in (
        ("plain.safetensors", "transformer.", ("lora_A.weight", "lora_B.weight"), {}, None, 1),
        ("bare.safetensors", "", ("lora_A.default.weight", "lora_B.default.weight"), {}, None, 1),
        ("old.safetensors", "transformer.", ("lora.down.weight", "lora.up.weight"), {}, None, 1),
        ("alpha.safetensors", "diffusion_model.", ("lora_down.weight", "lora_up.weight"), {"alpha": 1.0}, None, 0.5),
        ("header.safetensors", "transformer.", ("lora_A.weight", "lora_B.weight"), {}, header, 3),
        ("rs.safetensors", "transformer.", ("lora_A.weight", "lora_B.weight"), {}, rs, 6 / 2**0.5),
        ("peft/adapter_model.safetensors", "base_model.model.", ("lora_A.weight", "lora_B.weight"), {}, None, 0.5),
    ):
        tensors = {f"{prefix}{Q}.{ends[0]}": down, f"{prefix}{Q}.{ends[1]}": up}
        tensors |= {f"{prefix}{Q}.{name}": torch.tensor(value) for name, value in more.items()}
        save_file(tensors, tmp_path / file, metadata)
        path = peft if file.startswith("peft") else tmp_path / file
        added = gains(pipeline, (Q,), lambda path=path: viditq.add_lora(pipeline, path, name="one"))
        torch.testing.assert_close(added[Q], factor * up @ down, atol=1e-5, rtol=1e-4, msg=file)
        viditq.remove_lora(pipeline, "one")


def wan() -> Any:
    """A small float pipeline with a denoiser and a scheduler alone."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
        ffn_dim=16, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer
    )


def test_diffusers_own_way_says_which_to_take(tmp_path: Path) -> None:
    pipeline = wan()
    query = "blocks.0.attn1.to_q"
    plan = Recipe(QuantSpec(8, granularity="channel"), None).resolve([query])
    quantize_denoiser(pipeline.transformer, plan, None)
    tensors = {
        f"transformer.{query}.lora_A.weight": torch.ones(2, 24),
        f"transformer.{query}.lora_B.weight": torch.ones(24, 2),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"viditq\.add_lora"):
        pipeline.transformer.load_lora_adapter({})  # what load_lora_weights calls
    viditq.add_lora(pipeline, tmp_path)
    assert viditq.lora_scales(pipeline) == {"lora": 1.0}


def test_names_of_the_original_release(tmp_path: Path) -> None:
    """Those that diffusers converts, on a float model."""
    pipeline = wan()
    transformer = pipeline.transformer
    down, up = torch.randn(2, 24), torch.randn(24, 2)
    theirs = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{theirs}.lora_A.weight": down, f"{theirs}.lora_B.weight": up}, tmp_path / "wan.safetensors")
    query = transformer.blocks[0].attn1.to_q
    x = torch.randn(3, 24)
    before = query(x)
    viditq.add_lora(pipeline, tmp_path / "wan.safetensors")
    torch.testing.assert_close(query(x), before + x @ (up @ down).T)


def test_a_file_for_the_second_denoiser(tmp_path: Path) -> None:
    pipeline = wan()
    pipeline.register_modules(transformer_2=wan().transformer)
    down, up = torch.randn(2, 24), torch.randn(24, 2)
    theirs = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{theirs}.lora_A.weight": down, f"{theirs}.lora_B.weight": up}, tmp_path / "low.safetensors")
    queries = [part.blocks[0].attn1.to_q for part in (pipeline.transformer, pipeline.transformer_2)]
    x = torch.randn(3, 24)
    first, second = (query(x) for query in queries)
    for wrong in ("vae", "transformer_3"):
        with pytest.raises(UserError, match=rf"component='{wrong}' .* it has transformer, transformer_2\."):
            viditq.add_lora(pipeline, tmp_path / "low.safetensors", component=wrong)
    viditq.add_lora(pipeline, tmp_path / "low.safetensors", component="transformer_2")
    assert torch.equal(queries[0](x), first)
    torch.testing.assert_close(queries[1](x), second + x @ (up @ down).T)
    viditq.remove_lora(pipeline)
    assert torch.equal(queries[1](x), second)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"transformer.nope.lora_A.weight": (2, 4)}, ["is no LoRA of this PixArtAlphaPipeline", "transformer.nope"]),
        ({f"transformer.{Q}.lora_A.weight": (2, 64)}, [f"transformer.{Q} lacks its up projection"]),
        ({f"transformer.{Q}.lora_A.weight": (2, 64), f"transformer.{Q}.lora_B.weight": (64, 3)}, ["belong together"]),
        ({f"transformer.{Q}.lora_A.weight": (2, 9), f"transformer.{Q}.lora_B.weight": (9, 2)}, ["for another model"]),
        ({f"transformer.{Q}.dora_scale": (64, 1)}, ["DoRA", "no sum of two small products"]),
        ({f"transformer.{Q}.hada_w1_a": (64, 1)}, ["LoHa"]),
        ({"transformer.pos_embed.proj.lora_A.weight": (2, 4), "transformer.pos_embed.proj.lora_B.weight": (4, 2)},
         ["a Conv2d: only Linears"]),
        ({}, ["holds no tensors"]),
    ],
)  # fmt: skip
def test_what_is_no_lora_of_this_model(
    pipeline: Any, tmp_path: Path, tensors: dict[str, tuple[int, ...]], words: list[str]
) -> None:
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(UserError) as error:
        viditq.add_lora(pipeline, tmp_path / "bad.safetensors")
    assert all(word in str(error.value) for word in words), error.value
    assert viditq.lora_scales(pipeline) == {}


def test_bad_arguments(pipeline: Any, tmp_path: Path) -> None:
    lora_file(tmp_path / "a.safetensors", pipeline)
    lora_file(tmp_path / "b.safetensors", pipeline)
    for path, how, word in (
        (tmp_path / "none", {}, "does not exist"),
        (tmp_path, {}, "weight_name="),
        (tmp_path / "a.safetensors", {"scale": float("nan")}, "scale=nan"),
        (tmp_path / "a.safetensors", {"name": "a.b"}, "without dots"),
    ):
        with pytest.raises(UserError, match=word):
            viditq.add_lora(pipeline, path, **how)
    for name in (5, ""):
        with pytest.raises(UserError, match="cannot name a LoRA"):
            viditq.add_lora(pipeline, tmp_path / "a.safetensors", name=name)
    with pytest.raises(UserError, match="this is a PixArtTransformer2DModel: give the whole pipeline"):
        viditq.add_lora(pipeline.transformer, tmp_path / "a.safetensors")
    viditq.add_lora(pipeline, tmp_path, weight_name="a.safetensors")
    for scale in (float("nan"), "1", None):
        with pytest.raises(UserError, match="is no number: give such as"):
            viditq.set_lora_scale(pipeline, "a", scale)
    assert viditq.lora_scales(pipeline) == {"a": 1.0}
    with pytest.raises(UserError, match="there already"):
        viditq.add_lora(pipeline, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"no LoRA 'nope'\. There are: a"):
        viditq.remove_lora(pipeline, "nope")


DOWN, UP = f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"
ALPHA = f"transformer.{Q}.alpha"


@pytest.mark.parametrize(
    ("change", "header", "word"),
    [
        ({ALPHA: torch.tensor(float("nan"))}, {}, "holds NaN or infinity"),
        ({ALPHA: torch.ones(3)}, {}, "the alpha of .* is no number"),
        ({DOWN: torch.ones(0, 64), UP: torch.ones(64, 0)}, {}, "do not belong together"),
        ({DOWN: torch.ones(2, 64, dtype=torch.int8)}, {}, "are int8, whose numbers stand for nothing known"),
        ({UP: torch.ones(64, 2, dtype=torch.complex64)}, {}, "are complex64"),
        ({DOWN.removeprefix("transformer."): torch.ones(2, 64)}, {}, "says two things of transformer"),
        ({}, "{nope", "is no JSON"),
        ({}, [1], r"bad\.safetensors is \[1\], where a mapping is needed"),
        ({}, {"transformer.lora_alpha": "x"}, "the alpha of .* is no number"),
        ({}, {"transformer.alpha_pattern": {"(": 3.0}}, "the alpha of .* is no number"),
        ({}, {"transformer.alpha_pattern": 3}, "the alpha of .* is no number"),
        ({}, {"transformer.alpha_pattern": {"to_q": float("inf")}}, "holds NaN or infinity"),
    ],
)
def test_a_damaged_file_is_refused(
    pipeline: Any, tmp_path: Path, change: dict[str, Tensor], header: Any, word: str
) -> None:
    metadata = {"lora_adapter_metadata": header if isinstance(header, str) else json.dumps(header)}
    save_file({DOWN: torch.ones(2, 64), UP: torch.ones(64, 2)} | change, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(UserError, match=word):
        viditq.add_lora(pipeline, tmp_path / "bad.safetensors")
    assert viditq.lora_scales(pipeline) == {}


def test_eight_bit_floats_and_an_alpha_of_nothing(pipeline: Any, tmp_path: Path) -> None:
    down, up = (torch.full(shape, 0.25) for shape in ((2, 192), (192, 2)))
    save_file({DOWN: down.to(torch.float8_e4m3fn), UP: up}, tmp_path / "a.safetensors")
    added = gains(pipeline, (Q,), lambda: viditq.add_lora(pipeline, tmp_path / "a.safetensors"))
    torch.testing.assert_close(added[Q], up @ down, atol=1e-5, rtol=1e-4)
    nothing = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 0})}
    save_file({DOWN: down, UP: up}, tmp_path / "b.safetensors", nothing)
    added = gains(pipeline, (Q,), lambda: viditq.add_lora(pipeline, tmp_path / "b.safetensors"))
    assert not added[Q].any()

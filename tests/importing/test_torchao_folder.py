"""Folders that diffusers saved with torchao: ours there and back, torchao's own where it is installed, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import PixArtTransformer2DModel
from random_pixart import CONFIG, outputs, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_comfyui import artifact_of, tiny_adapter
from test_torchao import EXACT, exported
from torch import Tensor

from viditq.errors import UserError
from viditq.export import torchao as exporter
from viditq.importing.artifact import ImportedModel
from viditq.importing.conversion import ImportedConversion
from viditq.importing.denoiser import ImportedDenoiser
from viditq.importing.torchao_folder import read_torchao
from viditq.models.adapter import ModelAdapter
from viditq.program import main
from viditq.quant import QuantSpec
from viditq.quant.artifact import StoredTensors, read_meta
from viditq.quant.convert import convert_in_place
from viditq.quant.methods.quantizer import fake_quantize_activation, quantize_activation
from viditq.quant.numerics.packing import unpack

LAYER = "transformer_blocks.0.attn1.to_q"
FILE = "diffusion_pytorch_model.safetensors"


def read(part: Path) -> ImportedDenoiser:
    with torch.device("meta"):
        return read_torchao(part, PixArtTransformer2DModel(**CONFIG))


def state_of(artifact: Path) -> dict[str, Tensor]:
    return StoredTensors(artifact, read_meta(artifact)).run_state()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_there_and_back(
    tmp_path: Path, name: str, dtype: torch.dtype, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "SHARD_BYTES", shard_bytes)
    _, part = exported(tmp_path, EXACT[name], dtype)
    found, state = read(part), state_of(tmp_path / "artifact")
    assert (len([*part.glob("*.safetensors")]) > 1) == (shard_bytes < 10**9)
    mine = {f"{n}.variants.0.{f}": t for n, layer in found.layers.items() for f, t in layer.tensors(n).items()}
    mine |= found.floats
    assert mine.keys() == state.keys()
    for key, tensor in state.items():
        if key.endswith("chain.0.scale"):  # the file has its reciprocal, in the model's type
            torch.testing.assert_close(mine[key], tensor, rtol=2e-7 if dtype == torch.float32 else 4e-3, atol=0)
        elif name == "symmetric_w4" and key.endswith("qweight"):  # the same codes, a byte each
            assert torch.equal(mine[key].int() - 128, unpack(tensor, 4, mine[key].shape[1]).int() - 8)
        else:
            assert tensor.dtype == mine[key].dtype and torch.equal(tensor, mine[key]), key


def test_the_command_takes_a_whole_pipeline(tmp_path: Path, capsys: Any) -> None:
    artifact = artifact_of(tiny_adapter(), EXACT["mixed"], tmp_path / "quantized")
    assert main(["export", str(artifact), "--to", "torchao", "--out", f"{tmp_path}/out"]) == 0
    assert main(["import", f"{tmp_path}/out", "--model", "tiny_image", "--out", f"{tmp_path}/back"]) == 0
    assert "of torchao: W8 channel, A8 token" in capsys.readouterr().out
    one, other = state_of(artifact), state_of(tmp_path / "back")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert main(["export", f"{tmp_path}/back", "--to", "torchao", "--out", f"{tmp_path}/again"]) == 0
    files = [load_file(tmp_path / name / "transformer" / FILE) for name in ("out", "again")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_smoothing_comes_back_and_goes_out_again(tmp_path: Path) -> None:
    _, part = exported(tmp_path, EXACT["smoothed"])
    found = read(part)
    scheme = found.layers[LAYER].scheme
    assert [transform.name for transform in scheme.transforms] == ["given_scale"] and not scheme.needs_stats
    assert exporter.refusal(scheme, LAYER) is None


def rewritten(part: Path, field: str, value: Any, tensors: Callable[[dict[str, Tensor]], None] | None = None) -> Path:
    """The part with another value in LAYER's description (a path such as act_quant_kwargs._data.mapping_type)."""
    with safe_open(part / FILE, "pt") as opened:
        metadata = opened.metadata()
    state, told = load_file(part / FILE), json.loads(metadata[f"{LAYER}.weight"])
    *path, last = field.split(".")
    node = told if field == "_type" else told["_data"]
    for key in path:
        node = node[key]
    node[last] = value
    if tensors is not None:
        tensors(state)
    save_file(state, part / FILE, metadata={**metadata, f"{LAYER}.weight": json.dumps(told)})
    return part


MAPPING = {"_type": "MappingType", "_data": "SYMMETRIC_NO_CLIPPING_ERR"}
REFUSED: dict[str, tuple[str, str, Any, str]] = {
    "mapping": (
        "symmetric",
        "act_quant_kwargs._data.mapping_type",
        MAPPING,
        "mapping_type='SYMMETRIC_NO_CLIPPING_ERR'",
    ),
    "per tensor": (
        "symmetric",
        "act_quant_kwargs._data.granularity",
        {"_type": "PerTensor", "_data": {}},
        "'PerTensor'",
    ),
    "undescribed": ("symmetric", "act_quant_kwargs", "per row", "is not described as torchao 0.18 does it"),
    "narrowed": ("symmetric", "act_quant_kwargs._data.reduce_range", True, "reduce_range=True"),
    "block": ("symmetric", "block_size", [2, 32], r"block_size=\[2, 32\]"),
    "float8": ("symmetric", "_type", "Float8Tensor", "is torchao's Float8Tensor; imported are Int8Tensor"),
    "int4 layout": ("w8a8", "_type", "Int4TilePackedTo4dTensor", "torchao's Int4TilePackedTo4dTensor"),
    "one bit": ("w8a8", "target_dtype", {"_type": "torch.dtype", "_data": "int1"}, "target_dtype='int1'"),
    "activation": ("w8a8", "activation_quantization", "int8_sym_per_token", "'int8_sym_per_token' .* where int8_asym"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_torchao_computes_on_another_grid_is_refused(kind: str, tmp_path: Path) -> None:
    recipe, field, value, message = REFUSED[kind]
    _, part = exported(tmp_path, EXACT[recipe])
    with pytest.raises(UserError, match=f"{LAYER} .*{message}"):
        read(rewritten(part, field, value))


def test_zero_points_that_its_product_leaves_out_are_refused(tmp_path: Path) -> None:
    _, part = exported(tmp_path, EXACT["symmetric"])
    name = f"{LAYER}._weight_zero_point"
    with pytest.raises(UserError, match="zero_point='not 0'"):
        read(rewritten(part, "reduce_range", False, lambda state: state.update({name: state[name] + 1})))


def test_codes_beyond_their_bits_are_refused(tmp_path: Path) -> None:
    _, part = exported(tmp_path, EXACT["w4a8"])
    name = f"{LAYER}._weight_qdata"
    found = read(rewritten(part, "block_size", [1, 32], lambda state: state[name].fill_(100)))
    with pytest.raises(UserError, match=f"codes of int4 in {LAYER} reach 100 to 100"):
        found.layers[LAYER].tensors(LAYER)


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    _, part = exported(tmp_path, EXACT["w8a8"])
    config = json.loads((part / "config.json").read_text())
    for quantization, message in [
        ({"quant_method": "bitsandbytes"}, "is quantized by bitsandbytes"),
        (None, "is not quantized"),
    ]:
        (part / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        with pytest.raises(UserError, match=message):
            read(part)
    (part / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not quantized"):
        read(part)
    (part / "config.json").write_text(json.dumps(config))
    (part / FILE).rename(part / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="a pickle, which is not opened"):
        read(part)


def test_a_missing_tensor_and_another_model_are_refused(tmp_path: Path) -> None:
    _, part = exported(tmp_path, EXACT["w8a8"])
    name = f"{LAYER}._weight_scale"
    with pytest.raises(UserError, match=f"lacks {LAYER}._weight.scale"):
        read(rewritten(part, "block_size", [1, 32], lambda state: state.__delitem__(name)))
    adapter: ModelAdapter = tiny_adapter()
    with pytest.raises(UserError, match="in the file; this model's is"):
        ImportedModel(adapter, [exported(tmp_path / "two", EXACT["w8a8"])[1]])


@pytest.mark.parametrize("name", ["default", "w8a8_asymmetric", "weights", "int4_groups", "w4a8"])
def test_what_torchao_quantized_itself_computes_the_same(name: str, tmp_path: Path) -> None:
    """Its own quantizers, its own file, and what diffusers makes of that."""
    pytest.importorskip("torchao", minversion="0.18")
    from diffusers import TorchAoConfig
    from torchao import quantization as tao
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    configs = {
        "w8a8_asymmetric": lambda: tao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC),
        "default": tao.Int8DynamicActivationInt8WeightConfig,
        "weights": tao.Int8WeightOnlyConfig,
        "int4_groups": lambda: tao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
        "w4a8": lambda: tao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32)
        ),
    }
    random_model().save_pretrained(tmp_path / "float")
    config = TorchAoConfig(configs[name](), modules_to_not_convert=["adaln_single", "caption_projection", "proj_out"])
    theirs = PixArtTransformer2DModel.from_pretrained(
        tmp_path / "float", quantization_config=config, dtype=torch.float32
    ).eval()
    theirs.save_pretrained(tmp_path / "quantized")
    found = read(tmp_path / "quantized")
    assert len(found.layers) == 10
    with init_empty_weights(include_buffers=False):
        mine = PixArtTransformer2DModel(**CONFIG)
    convert_in_place(ImportedConversion(mine, found.layers, found.put_into(mine, torch.float32)))
    expected = outputs(theirs).double()
    flips = 1e-3 if name == "default" else 5e-5  # of codes of activations: there each largest value is at an edge
    assert (outputs(mine.eval()).double() - expected).norm() <= flips * expected.norm()


def test_codes_of_its_symmetric_activations_are_ours() -> None:
    tao = pytest.importorskip("torchao.quantization", minversion="0.18")
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quant_primitives import MappingType

    x = torch.randn(500, 96, generator=torch.Generator().manual_seed(0))
    theirs = tao.Int8Tensor.from_hp(x, PerRow(), mapping_type=MappingType.SYMMETRIC)
    spec = QuantSpec(8, True, "token", dynamic=True, full_range=True)
    mine = quantize_activation(x, spec, None)
    assert torch.equal(mine.codes.int() - 128, theirs.qdata.int()) and torch.equal(mine.scale, theirs.scale)
    assert torch.equal(fake_quantize_activation(x, spec, None), theirs.qdata * theirs.scale)

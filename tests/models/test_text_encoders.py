"""Text encoders of every kind, quantized from their files: what is stored, what it computes, what is refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from zoo import text

from viditq.errors import UserError
from viditq.loading import load_encoders
from viditq.models.text_encoders import build_encoder, encoder_names, encoders_on_disk, map_encoder
from viditq.quant.artifact import StoredTensors, load_denoiser, read_meta, verify
from viditq.quant.convert import Conversion, quantize_denoiser
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.execution.linear import backend_counts, quant_linears
from viditq.quant.execution.model_linears import linear_names
from viditq.quant.streaming import quantize_to
from viditq.quant.text_encoder import text_encoder_plan

KINDS = ("t5", "umt5", "clip", "llama", "gemma", "qwen3", "qwen_vl")
W4 = QuantSpec(4, granularity="group", group_size=8)
NAME = "text_encoder"


def adapter_of(folder: Path, cls: type, dtype: str) -> Any:
    """As much of a ModelAdapter as is asked for."""
    return SimpleNamespace(
        name="zoo",
        dtype=dtype,
        component_dtypes={},
        variant=None,
        folder=folder,
        conditioning="text",
        index=lambda: {NAME: ["transformers", cls.__name__]},
        part_folder=lambda name, weights: folder / name,
    )


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Any]:
    """(kind, dtype of the file, dtype it runs in) -> the adapter of a pipeline that has this encoder."""

    def make(kind: str, file: str, run: str) -> Any:
        torch.manual_seed(0)
        _, encoder = getattr(text, kind)()
        encoder.to(getattr(torch, file)).save_pretrained(tmp_path / "model" / NAME)
        return adapter_of(tmp_path / "model", type(encoder), run)

    return make


def of_float(adapter: Any) -> Any:
    """The float encoder as a pipeline loads it."""
    cls = getattr(transformers, adapter.index()[NAME][1])
    return cls.from_pretrained(adapter.folder / NAME, dtype=getattr(torch, adapter.dtype)).eval()


def streamed(adapter: Any, folder: Path, spec: QuantSpec = W4) -> Any:
    """Its quantized encoder, by way of an artifact in `folder`."""
    encoder, runs = map_encoder(adapter, NAME)
    plan = text_encoder_plan(encoder, spec, NAME)
    quantize_to(folder / NAME, Conversion(encoder, plan, None, "weight_only", dtypes=runs), runs, {})
    return load_encoders(folder, adapter, [NAME])[NAME]


def outputs(encoder: Any) -> list[torch.Tensor]:
    """Hidden states of two prompts."""
    ids = torch.tensor([[5, 6, 7, 8, 2], [9, 6, 2, 0, 0]])
    with torch.no_grad():
        found = encoder(ids, attention_mask=(ids > 0).long(), output_hidden_states=True)
    return list(found.hidden_states)


@pytest.mark.parametrize(("file", "run"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "float16")])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_float_encoder_with_rounded_weights(
    kind: str, file: str, run: str, stored: Callable[..., Any], tmp_path: Path
) -> None:
    """Equal to the bit to the loaded float encoder, quantized in memory and emulated."""
    adapter = stored(kind, file, run)
    mine, other = streamed(adapter, tmp_path / "quantized"), of_float(adapter)
    exact = outputs(other)
    quantize_denoiser(other, text_encoder_plan(other, W4, NAME), None)
    assert backend_counts(mine) == {"weight_only": len(quant_linears(other))}
    for got, expected, before in zip(outputs(mine), outputs(other), exact, strict=True):
        assert got.dtype == before.dtype and torch.equal(got, expected)
    assert not torch.equal(outputs(mine)[-1], exact[-1])
    assert mine.dtype == other.dtype
    verify(tmp_path / "quantized" / NAME)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_quantized_layer_nothing_changes(kind: str, stored: Callable[..., Any], tmp_path: Path) -> None:
    adapter = stored(kind, "bfloat16", "float16")
    encoder, runs = map_encoder(adapter, NAME)
    conversion = Conversion(encoder, QuantPlan((0, 1), {}, {}), None, dtypes=runs)
    quantize_to(tmp_path / "artifact", conversion, runs, {})
    loaded, *_ = load_denoiser(tmp_path / "artifact", lambda: build_encoder(adapter, NAME))
    assert all(map(torch.equal, outputs(loaded), outputs(of_float(adapter))))


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_a_shared_embedding_is_stored_once_and_shared_again(
    kind: str, stored: Callable[..., Any], tmp_path: Path
) -> None:
    mine = streamed(stored(kind, "bfloat16", "float32"), tmp_path)
    found = StoredTensors(tmp_path / NAME, meta := read_meta(tmp_path / NAME))
    assert meta["equal"] == {"encoder.embed_tokens.weight": "shared.weight"}
    assert found.state()["shared.weight"].dtype == torch.bfloat16
    assert mine.shared.weight is mine.encoder.embed_tokens.weight
    assert mine.shared.weight.dtype == torch.float32


def test_weights_are_mapped_not_read(stored: Callable[..., Any]) -> None:
    from viditq.mapped import _maps

    encoder, runs = map_encoder(stored("qwen_vl", "bfloat16", "float32"), NAME)
    ranges = [(start, start + len(mapping)) for start, mapping in _maps.items()]
    for name, parameter in encoder.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges), name
        assert parameter.dtype == torch.bfloat16 and runs[name] == torch.float32


def test_what_the_group_size_does_not_divide_has_a_scale_per_channel(stored: Callable[..., Any]) -> None:
    """Widths of 16 and 24."""
    encoder = build_encoder(stored("t5", "float32", "float32"), NAME)
    plan = text_encoder_plan(encoder, QuantSpec(4, granularity="group", group_size=16), NAME)
    channel = [layer for layer, schemes in plan.layers.items() if schemes == ("channel",)]
    assert channel == ["encoder.block.0.layer.1.DenseReluDense.wo"]
    assert {*plan.layers} == {*linear_names(encoder)}


def test_a_linear_that_shares_its_weight_with_the_embedding_stays_in_float() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "fc": nn.Linear(4, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    assert [*text_encoder_plan(model, QuantSpec(8, granularity="channel"), NAME).layers] == ["fc"]


def test_an_encoder_without_linears_is_refused() -> None:
    with pytest.raises(UserError, match=r"text_encoder \(Embedding\) has no Linear.*quant/text_encoder=none"):
        text_encoder_plan(nn.Embedding(3, 4), W4, NAME)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "has no text encoder"),
        ({"text_encoder": [None, None], "tokenizer": ["transformers", "T5Tokenizer"]}, "has no text encoder"),
        ({"text_encoder": ["diffusers", "AutoencoderKL"]}, "is a AutoencoderKL, which is no model of transformers"),
    ],
)
def test_a_pipeline_without_a_text_encoder_is_refused(index: Mapping[str, Any], words: str) -> None:
    adapter: Any = SimpleNamespace(name="dit", conditioning="class", folder=Path("dit"), index=lambda: index)
    with pytest.raises(UserError, match=rf"quant/text_encoder: .*{words}.*quant/text_encoder=none"):
        encoder_names(adapter)


def test_a_damaged_file_is_refused(stored: Callable[..., Any]) -> None:
    adapter = stored("t5", "float32", "float32")
    (path,) = (adapter.folder / NAME).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="cannot be read"):
        map_encoder(adapter, NAME)


def test_a_language_models_tied_head_stays_in_float(tmp_path: Path) -> None:
    """As of Qwen2.5-VL 3B; the structure from config.json says the same as the files."""
    torch.manual_seed(0)
    _, encoder = text.qwen_vl()
    encoder.config.tie_word_embeddings = encoder.config.text_config.tie_word_embeddings = True
    encoder.tie_weights()
    encoder.save_pretrained(tmp_path / "model" / NAME)
    adapter = adapter_of(tmp_path / "model", type(encoder), "float32")
    built, (mapped, _) = build_encoder(adapter, NAME), map_encoder(adapter, NAME)
    plans = [text_encoder_plan(one, W4, NAME) for one in (built, mapped)]
    assert plans[0] == plans[1] and "lm_head" not in plans[0].layers and len(plans[0].layers) > 20
    mine, other = streamed(adapter, tmp_path / "quantized"), of_float(adapter)
    quantize_denoiser(other, plans[0], None)
    assert mine.lm_head.weight is mine.get_input_embeddings().weight
    assert all(map(torch.equal, outputs(mine), outputs(other)))


# From disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "run"),
    [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_on_disk_an_encoder_computes_the_same_to_the_bit(
    kind: str, file: str, run: str, stored: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it asks its layers' weights which type they are of, as T5 does."""
    monkeypatch.setattr("viditq.on_disk.SMALL_BYTES", 64)
    adapter = stored(kind, file, run)
    mapped = map_encoder(adapter, NAME)[0].state_dict().values()
    assert {t.dtype for t in mapped if t.is_floating_point()} == {
        getattr(torch, file)
    }  # T5 asks for float32 in float16
    expected, (found,) = of_float(adapter), encoders_on_disk(adapter).values()
    at_rest = {name: p.data_ptr() for name, p in found.named_parameters()}
    assert found.dtype == expected.dtype == getattr(torch, run) and found.device == expected.device
    assert all(torch.equal(mine, other) for mine, other in zip(outputs(found), outputs(expected), strict=True))
    assert at_rest == {name: p.data_ptr() for name, p in found.named_parameters()}
    layers = [m.weight for m in found.modules() if isinstance(m, nn.Linear) and m.weight.nbytes > 64]
    types = [m.weight.dtype for m in expected.modules() if isinstance(m, nn.Linear) and m.weight.nbytes > 64]
    assert layers and [w.dtype for w in layers] == types
    hidden = [bool(w.isnan().all()) for w in layers]
    assert any(hidden) == (file != run or (kind in ("t5", "umt5") and run == "float16"))


@pytest.mark.parametrize("kind", ("t5", "umt5", "clip", "qwen3"))
def test_on_disk_a_quantized_encoder_computes_the_same_to_the_bit(
    kind: str, stored: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viditq.on_disk.SMALL_BYTES", 64)
    adapter = stored(kind, "bfloat16", "float32")
    expected = streamed(adapter, tmp_path / "artifact")
    found = load_encoders(tmp_path / "artifact", adapter, [NAME], on_disk=True)[NAME]
    assert found.dtype == expected.dtype
    assert all(torch.equal(mine, other) for mine, other in zip(outputs(found), outputs(expected), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_on_disk_numbers_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    """1e6 is none in float16, which it runs in."""
    _, encoder = text.t5()
    with torch.no_grad():
        encoder.encoder.block[0].layer[1].DenseReluDense.wi.weight[0, 0] = bad
    encoder.save_pretrained(tmp_path / NAME)
    with pytest.raises(UserError, match=r"DenseReluDense\.wi\.weight of .* contains NaN or inf as float16"):
        encoders_on_disk(adapter_of(tmp_path, type(encoder), "float16"))

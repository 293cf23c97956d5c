"""quant=external/...: what another library quantizes goes through a whole run, and is judged like ours."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from diffusers import PixArtTransformer2DModel
from hydra.utils import instantiate
from rounded import RoundedConfig  # registers with diffusers
from shrunk import ROOT, compose_config

from viditq.errors import UserError
from viditq.experiment import build
from viditq.external.policy import ExternalQuantization
from viditq.external.refusals import check_external
from viditq.interop.quantizer import ViditqConfig
from viditq.memory import set_aside
from viditq.models.adapter import ModelAdapter
from viditq.quant.execution.model_linears import linear_names
from viditq.runner import run

SMALL = [
    *("model=tiny_image", "model.num_steps=2", "model.calibration_batch_size=1", "data.num_prompts=2"),
    *("data.num_calibration_prompts=2", "noise_floor.num_prompts=2", "metric=[psnr,ssim]", "batch_size=1"),
    *("logger=none", "name=x", "benchmark.max_seconds=null", "benchmark.rounds=5"),
]
ROUNDED = [
    *("quant=external/torchao_int8", "quant.policy.library=rounded", "quant.policy.requires=[]"),
    *("~quant.policy.config.quant_type", "quant.policy.config._target_=rounded.RoundedConfig"),
    *("+quant.policy.config.bits=8", "quant.policy.skips=skip"),
]


def judged(folder: Path, cache: Path, *overrides: str) -> Any:
    set_aside()
    return run(compose_config(*SMALL, f"cache_dir='{cache}'", *overrides), folder)


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "external.json").read_text()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("external_cache")


@pytest.fixture(scope="module")
def rounded_run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "rounded"
    judged(folder, cache, *ROUNDED)
    return folder


def test_a_run_is_judged_reported_and_timed(rounded_run: Path) -> None:
    metrics = json.loads((rounded_run / "metrics.json").read_text())
    found = told(rounded_run)
    assert len(found["quantized"]) == 40, "the six Linears that the model keeps in float stay so"
    assert found["left_in_float"] == found["also_quantized"] == []
    assert metrics["average_weight_bits"] == found["average_weight_bits"] == pytest.approx(9.07, abs=0.01)
    assert metrics["average_activation_bits"] == 16
    assert metrics["backend"] == {"requested": "rounded", "layers": {"rounded": 40}}
    assert found["size_of"] == metrics["size_of"] == "what save_pretrained writes"
    assert 3.5e6 < metrics["size_bytes"] < 4.5e6 < metrics["float_size_bytes"]
    assert metrics["verdict"]["psnr"] and metrics["metrics"]["psnr"] > 30
    speed = json.loads((rounded_run / "speed.json").read_text())
    held = {name: candidate["weights_bytes"] for name, candidate in speed["candidates"].items()}
    assert held["quantized"] < held["bfloat16"] < held["float"]
    page = (rounded_run / "report.html").read_text()
    assert "rounded" in page and not (rounded_run / "quantized").exists()


def test_stages_that_make_no_sense_are_skipped_by_name(
    rounded_run: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a second run finds everything done."""
    before = (rounded_run / "metrics.json").stat().st_mtime_ns
    judged(rounded_run, cache, *ROUNDED)
    said = " ".join(capsys.readouterr().out.split())
    for stage in ("calibrate", "search", "quantize", "diagnose"):
        assert f"{stage}: skipped: " in said
    assert "rounded quantizes while the denoiser is loaded" in said
    assert (rounded_run / "metrics.json").stat().st_mtime_ns == before


def test_what_the_library_chooses_is_counted_and_told(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It quantizes what the model keeps in float, leaves a layer out, cannot save, and its bits are counted."""
    own = "+quant.policy.config.skip=[transformer_blocks.1.ff.net.2]"
    choice = [
        own,
        "quant.policy.keep_float=false",
        "+quant.policy.config.savable=false",
        "quant.policy.weight_bits=null",
    ]
    judged(tmp_path, cache, *ROUNDED, *choice, "stages=[prompts,generate]")
    found, said = told(tmp_path), " ".join(capsys.readouterr().out.split())
    assert found["left_in_float"] == ["transformer_blocks.1.ff.net.2"] and len(found["also_quantized"]) == 6
    assert "1 that our recipes quantize are left in float, such as transformer_blocks.1.ff.net.2" in said
    assert "6 that the model keeps in float are quantized" in said
    assert (
        "its tensors in memory: save_pretrained cannot" in said
        and found["size_of"].startswith("its tensors")
        and not found["on_disk"]
    )
    share = found["average_weight_bits"]
    assert 8.1 < share < 8.8, "codes, a scale per row, and one layer in float"


def test_a_folder_that_somebody_else_quantized_is_judged(cache: Path, tmp_path: Path) -> None:
    """With viditq's own method, whose files diffusers reads, so that a loaded folder is judged end to end."""
    theirs, config = tmp_path / "theirs", ViditqConfig(build(compose_config(*SMALL, "quant=w8a8")).plan)
    source = tiny_adapter().part_folder("transformer", weights=True)
    PixArtTransformer2DModel.from_pretrained(source, quantization_config=config).save_pretrained(theirs)
    folder = ["quant=external/folder", f"quant.policy.path='{theirs}'", "quant.policy.activation_bits=8"]
    judged(tmp_path / "run", cache, *folder)
    found = told(tmp_path / "run")
    assert found["library"] == "viditq" and len(found["quantized"]) == 40 and found["size_of"] == "the files given"
    assert found["size_bytes"] == sum(p.stat().st_size for p in theirs.iterdir())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["psnr"] > 30


def tiny_adapter() -> ModelAdapter:
    adapter = instantiate(compose_config(*SMALL).model, _convert_="all")
    assert isinstance(adapter, ModelAdapter)
    return adapter


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant=external/torchao_int8", "bits=w4a8"], r"quant.weight=.*another library quantizes"),
        (["quant=external/sdnq_uint4", "quant/smoothing=rotate"], r"quant.smoothing=.*reads none of our formats"),
        (["quant=external/folder", "quant/rounding=gptq", "quant.policy.path=x"], "quant.rounding"),
        (["quant=external/quanto_int8", "quant.segments=[0.0,0.5,1.0]"], r"quant.segments=\[0.0, 0.5, 1.0\]"),
        (["quant=external/quanto_int8", "quant/text_encoder=w8"], "quant.text_encoder"),
        (["quant=external/torchao_int8", "backend=native"], "the library multiplies"),
        (["quant=external/torchao_int8", "estimate=true"], "estimate and fit tell of our own formats"),
        (["quant=external/torchao_int8", "fit=16GB"], "estimate and fit tell of our own formats"),
        (["quant=external/torchao_int8", "trainer.offload=disk"], "trainer.offload=disk"),
        (["quant=external/bitsandbytes_nf4"], r"does not run on a CPU.*sdnq_uint4"),
        (["quant=external/bitsandbytes_int8"], r"does not run on a CPU.*torchao_int8_dynamic"),
        (["quant=external/torchao_int4"], r"does not run on a CPU.*torchao_intx4"),
        (["quant=external/folder", "quant.policy.path=/nowhere"], "is no folder"),
        (["quant=external/gguf", "quant.policy.path=/nowhere.gguf"], "is no GGUF file"),
        ([*ROUNDED, "quant.policy.requires=['no_such_library>=2']"], r"no_such_library is not installed: pip install"),
        ([*ROUNDED, "quant.policy.requires=['torch<2']"], r"needs torch<2, and torch .* is installed"),
        ([*ROUNDED, "quant.policy.weight_bits=99"], "bits are numbers of at most 16"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_slow(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message) as caught:  # of constructors wrapped by Hydra
        judged(tmp_path / "x", tmp_path, *overrides)
    assert isinstance(caught.value, UserError) or isinstance(caught.value.__cause__, UserError)
    assert not (tmp_path / "x").exists() and not [*tmp_path.iterdir()]


def test_a_folder_in_float_and_a_library_that_does_nothing_are_refused(cache: Path, tmp_path: Path) -> None:
    source = tiny_adapter().part_folder("transformer", weights=True)
    with pytest.raises(Exception, match="nothing in it is quantized"):
        judged(tmp_path / "x", cache, "quant=external/folder", f"quant.policy.path='{source}'")
    names = linear_names(tiny_adapter().build_denoiser())
    nothing = [f"+quant.policy.config.skip=[{','.join(names)}]", "quant.policy.keep_float=false"]
    with pytest.raises(UserError, match="left every Linear of tiny_image in float"):
        judged(tmp_path / "y", cache, *ROUNDED, *nothing)


def test_what_a_library_raises_is_told_with_its_own_words(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("only on Tuesdays")

    monkeypatch.setattr(RoundedConfig, "__init__", refuse)
    with pytest.raises(UserError, match=r"(?s)rounded cannot give a quantized transformer.*only on Tuesdays"):
        judged(tmp_path / "x", cache, *ROUNDED)
    assert not (tmp_path / "x").exists(), "the library's own settings are tried first"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/quant/external").glob("*.yaml")))
def test_every_yaml_has_known_keys_and_is_in_the_documentation(name: str) -> None:
    cfg = compose_config(*SMALL, f"quant=external/{name}", "trainer.accelerator=gpu", "++quant.policy.path=x")
    check_external(cfg)
    assert {*cfg.quant.policy} - {"_target_", "_recursive_"} <= {field.name for field in fields(ExternalQuantization)}
    assert f"`{name}`" in (ROOT / "docs/judge.md").read_text()


REAL = {
    **dict.fromkeys(("torchao_int8_dynamic", "torchao_int8", "torchao_intx4"), "torchao"),
    **dict.fromkeys(("sdnq_int8", "sdnq_uint4", "sdnq_uint4_svd"), "sdnq"),
    **dict.fromkeys(("quanto_int8",), "optimum.quanto"),
}


def is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package
        return False


@pytest.mark.parametrize("name", REAL)
def test_real_libraries(name: str, cache: Path, tmp_path: Path) -> None:
    if not is_here(REAL[name]):
        pytest.skip(f'needs {REAL[name]}: pip install --constraint constraints.txt --editable ".[rivals]"')
    judged(tmp_path, cache, f"quant=external/{name}")
    found = told(tmp_path)
    assert len(found["quantized"]) == 40 and found["left_in_float"] == found["also_quantized"] == []

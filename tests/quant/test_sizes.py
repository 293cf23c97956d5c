"""Counted bytes against the files themselves."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import nn

from viditq.files import write_tensors
from viditq.models.adapter import ModelAdapter
from viditq.models.mapped_weights import map_denoiser
from viditq.quant.artifact import MODEL, size_bytes
from viditq.quant.calibration.observers import Observer, blank_state
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.convert import Conversion, quantize_denoiser
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends import Backend, FakeBackend
from viditq.quant.execution.linear import quant_linears
from viditq.quant.execution.model_linears import linear_names
from viditq.quant.sizes import (
    artifact_bytes,
    held_bytes,
    laid_out,
    module_bytes,
    safetensors_bytes,
    stats_bytes,
    stored_entries,
    tensor_bytes,
    weight_bytes,
)
from viditq.quant.streaming import quantize_to

SETTINGS = {
    "w8a8": ["quant=w8a8"],
    "w8a8 smoothed": ["quant=w8a8", "quant/smoothing=static"],
    "w4a8": ["quant=w4a8"],
    "w4a8 smoothed by segment": ["quant=w4a8", "quant/smoothing=timestep_aware"],
    "w4a8 naive": ["quant=w4a8_naive"],
    "w4a8 naive by segment": ["quant=w4a8_naive", "quant.segments=[0.0,0.5,1.0]"],
    "groups": ["quant=w4a8", "quant/format@quant.weight=int4_group64"],
    "activations alone": ["quant=w8a8", "quant.weight=null"],
}


def made_up_stats(denoiser: nn.Module, names: list[str]) -> CalibrationStats:
    """Statistics as if every bucket had seen something."""
    layers = {}
    for name in names:
        observer = Observer(blank_state((), 4, denoiser.get_submodule(name).in_features, 3, "cpu"))
        observer.minimum.fill_(-1.0)
        observer.maximum.copy_(torch.rand_like(observer.maximum) + 0.5)
        observer.amax_sum.copy_(observer.maximum)
        observer.count.fill_(1)
        for levels in (observer.lowest_level, observer.highest_level):
            levels.copy_((torch.arange(4) + 0.5) / 4)
        layers[name] = observer
    return CalibrationStats(layers)


@pytest.fixture(scope="module", params=["tiny_image", "tiny_video"])
def model(request: pytest.FixtureRequest, configure: Callable[..., Any]) -> Any:
    """Adapter, its denoiser and their names of Linears."""
    adapter: ModelAdapter = instantiate(configure(f"model={request.param}").model, _convert_="all")
    return adapter, adapter.denoiser_of(adapter.load())


def plan_of(
    configure: Callable[..., Any], adapter: ModelAdapter, denoiser: nn.Module, overrides: list[str]
) -> QuantPlan:
    setting = instantiate(configure(*overrides).quant, _convert_="all")
    plan: QuantPlan = setting.plan(linear_names(denoiser), adapter.keep_float)
    return plan


# Slow: settings of which the others have each field.
QUICK = ("w8a8 smoothed", "w4a8 smoothed by segment", "groups", "activations alone")


@pytest.mark.parametrize("setting", [pytest.param(s, marks=[pytest.mark.slow] * (s not in QUICK)) for s in SETTINGS])
def test_an_artifact_is_as_large_as_counted(
    setting: str, model: Any, configure: Callable[..., Any], tmp_path: Path
) -> None:
    adapter, denoiser = model
    plan = plan_of(configure, adapter, denoiser, SETTINGS[setting])
    counted = laid_out(adapter.build_denoiser(), plan)
    mapped, runs = map_denoiser(adapter)
    stored = {name: tensor.dtype for name, tensor in mapped.state_dict().items()}
    meta = {"model": adapter.to_dict()}

    quantized, stats = copy.deepcopy(denoiser), made_up_stats(denoiser, list(plan.layers))
    quantize_denoiser(quantized, plan, stats)
    quantize_to(tmp_path / "artifact", Conversion(mapped, plan, stats, dtypes=runs), runs, meta)

    assert artifact_bytes(counted, plan, stored, meta) == pytest.approx(size_bytes(tmp_path / "artifact"), rel=0.01)
    file = tmp_path / "artifact" / MODEL
    assert safetensors_bytes(stored_entries(counted, stored)) == pytest.approx(
        file.stat().st_size, rel=0.015
    )  # the header has room for tensors that turn out equal to those of another segment
    assert weight_bytes(counted) == weight_bytes(quantized)
    assert weight_bytes(counted).stored == tensor_bytes(quantized.state_dict().values())
    variants = [v for q in quant_linears(quantized).values() for v in q.variants]
    assert weight_bytes(counted).dense == tensor_bytes(v.dense_weight for v in variants if v.qweight is not None)


def test_a_file_of_tensors_is_counted_to_the_byte(tmp_path: Path) -> None:
    tensors = {
        "b": torch.zeros(3, 5),
        "a": torch.zeros(7, dtype=torch.uint8),
        "c.d": torch.zeros((), dtype=torch.int64),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    assert load_file(tmp_path / "x.safetensors").keys() == tensors.keys()
    entries = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert safetensors_bytes(entries) == (tmp_path / "x.safetensors").stat().st_size


def test_statistics_are_counted_to_the_byte(tmp_path: Path) -> None:
    widths = {"first": 12, "second.third": 40}
    stats = CalibrationStats({n: Observer(blank_state((), 5, width, 3, "cpu")) for n, width in widths.items()})
    stats.save(tmp_path / "stats.safetensors")
    assert stats_bytes(widths, 5, 3) == (tmp_path / "stats.safetensors").stat().st_size
    half = {n: Observer(blank_state((), 5, width, 3, "cpu", torch.bfloat16)) for n, width in widths.items()}
    CalibrationStats(half).save(tmp_path / "half.safetensors")
    assert stats_bytes(widths, 5, 3, dtype=torch.bfloat16) == (tmp_path / "half.safetensors").stat().st_size
    leaders = {"first": "first", "second.third": "first"}
    CalibrationStats({name: stats.layers[leader] for name, leader in leaders.items()}).save(
        tmp_path / "shared.safetensors"
    )
    assert stats_bytes(widths, 5, 3, leaders) == (tmp_path / "shared.safetensors").stat().st_size


def test_a_module_counts_parameters_and_buffers() -> None:
    module = nn.BatchNorm1d(6)  # weight, bias, running mean and variance in float32, one int64
    assert module_bytes(module) == 4 * 6 * 4 + 8


@pytest.mark.parametrize(("bits", "codes"), [(8, 5 * 12), (4, 5 * 6), (6, 5 * 9), (3, 5 * 5)])
def test_a_backend_holds_codes_and_emulation_the_weight_too(bits: int, codes: int) -> None:
    scheme = LayerScheme(QuantSpec(bits, granularity="channel"), None)
    codes += 5 * 5  # scales, zero points
    assert Backend.weight_bytes(FakeBackend(), scheme, 5, 12, torch.bfloat16) == codes
    assert FakeBackend().weight_bytes(scheme, 5, 12, torch.bfloat16) == codes + 5 * 12 * 2
    assert FakeBackend().weight_bytes(LayerScheme(None, None), 5, 12, torch.float32) == 5 * 12 * 4


def test_all_that_a_denoiser_holds_is_counted_once() -> None:
    """Also tensors that a backend keeps in an attribute, alone or in a tuple; shared memory counts once."""
    module = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4, bias=False))
    own = 4 * (32 + 4 + 32)
    assert held_bytes(module) == own
    module[1].weight = module[0].weight
    assert held_bytes(module) == 4 * (32 + 4)
    module[0].held = (torch.zeros(100, dtype=torch.uint8), 3)
    module[1].scale = torch.zeros(10)[:5]
    assert held_bytes(module) == 4 * (32 + 4) + 100 + 40

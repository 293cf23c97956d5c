"""An artifact that is written layer by layer from mapped files is the one that the whole model gives."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from viditq.errors import UserError
from viditq.mapped import mapped_tensors
from viditq.quant import AdaRound, Gptq, QuantSpec, Recipe, RotateSpec, Rule, SmoothSpec, linear_names
from viditq.quant.artifact import StoredTensors, load_denoiser, read_meta, verify
from viditq.quant.artifact_writer import ArtifactWriter, save_denoiser
from viditq.quant.convert import Conversion, quantize_denoiser
from viditq.quant.execution.linear import quant_linears
from viditq.quant.streaming import Streaming, quantize_to

W4, A8 = QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
STATIC = QuantSpec(8, granularity="tensor")
RECIPES = {
    "nearest": Recipe(W4, A8),
    "whole tensor": Recipe(QuantSpec(8, granularity="tensor"), A8),
    "groups": Recipe(QuantSpec(3, False, "group", 8), None, rules=[Rule("time", keep_float=True)]),
    "scaled": Recipe(W4, A8, SmoothSpec([0.3, 0.5], True), segments=(0, 0.5, 1)),
    "rotated": Recipe(W4, STATIC, [SmoothSpec(0.3), RotateSpec()], segments=(0, 0.5, 1)),
    "percentile": Recipe(W4, A8, ranges="percentile"),
    "activations alone": Recipe(None, A8),
    "gptq": Recipe(W4, A8, SmoothSpec(0.5), Gptq(), ranges="lp"),
    "adaround": Recipe(W4, A8, RotateSpec(), AdaRound(20), ranges="grid_fit"),
    "low rank": Recipe(W4, A8, SmoothSpec(0.5), "gptq", low_rank=2, rules=[Rule("time", keep_float=True)]),
}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture
def checkpoint(make_denoiser: Callable[..., nn.Module], tmp_path: Path) -> Callable[[torch.dtype], Any]:
    """A float32 denoiser with a file's values, the same mapped from the file, and the types it runs in."""

    def make(stored: torch.dtype) -> Any:
        torch.manual_seed(0)
        path = tmp_path / "checkpoint.safetensors"
        save_file({name: t.to(stored) for name, t in make_denoiser().state_dict().items()}, path)
        whole, lying = make_denoiser(), make_denoiser()
        whole.load_state_dict({name: t.float() for name, t in load_file(path).items()})
        lying.load_state_dict(mapped_tensors(path), assign=True)
        runs = {} if stored == torch.float32 else dict.fromkeys(whole.state_dict(), torch.float32)
        return whole, lying.requires_grad_(False), runs

    return make


def run_state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an artifact in the types that they run in."""
    stored = StoredTensors(folder, read_meta(folder))
    return {name: t.to(stored.runs.get(name, t.dtype)) for name, t in stored.state().items()}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", RECIPES)
def test_it_is_equal_to_the_bit(
    name: str, stored: str, checkpoint: Any, calibrated: Any, make_denoiser: Any, tmp_path: Path
) -> None:
    whole, lying, runs = checkpoint(STORED[stored])
    stats, plan = calibrated(whole, [1, 2], [980, 640, 300, 10]), RECIPES[name].resolve(linear_names(whole))
    quantize_to(tmp_path / "streamed", Conversion(lying, plan, stats, dtypes=runs), runs, {}, shard_bytes=500)
    quantize_denoiser(whole, plan, stats)
    save_denoiser(tmp_path / "whole", whole, plan, {})

    found, expected = run_state(tmp_path / "streamed"), run_state(tmp_path / "whole")
    assert found.keys() == expected.keys()
    differing = [n for n, t in found.items() if t.dtype != expected[n].dtype or not torch.equal(t, expected[n])]
    assert not differing
    assert len([*(tmp_path / "streamed").glob("*.safetensors")]) > 2
    assert verify(tmp_path / "streamed") > 0
    loaded = load_denoiser(tmp_path / "streamed", make_denoiser)[0]
    assert torch.equal(outputs(loaded), outputs(whole))


def test_what_stays_float_is_stored_as_in_the_checkpoint(checkpoint: Any, tmp_path: Path) -> None:
    whole, lying, runs = checkpoint(torch.bfloat16)
    plan = Recipe(W4, A8, rules=[Rule("time", keep_float=True)]).resolve(linear_names(whole))
    quantize_to(tmp_path / "a", Conversion(lying, plan, None, dtypes=runs), runs, {})
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert stored["time.weight"].dtype == stored["blocks.0.fc1.bias"].dtype == torch.bfloat16
    assert read_meta(tmp_path / "a")["widened"]["time.weight"] == "float32"


def outputs(denoiser: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return torch.stack([denoiser(x, torch.full((2,), t)) for t in (10, 400, 600, 990)])


class Killed(BaseException):
    """As a signal ends a process: nothing catches it."""


def test_a_killed_one_goes_on_at_the_open_shard(checkpoint: Any, tmp_path: Path) -> None:
    whole, lying, _ = checkpoint(torch.float32)
    plan = Recipe(W4, A8).resolve(linear_names(whole))

    def writer() -> tuple[Streaming, ArtifactWriter]:
        streaming = Streaming(Conversion(lying, plan, None), {}, shard_bytes=500)
        return streaming, ArtifactWriter(tmp_path / "a", tmp_path / "a.partial", len(streaming.shards))

    def killed(contents: Any) -> Any:
        yield next(contents)
        raise Killed

    streaming, first = writer()
    missing = first.begin("key")
    assert len(missing) == len(streaming.shards) > 3
    first.write(0, streaming.header_bytes(0), streaming.contents(0))
    with pytest.raises(Killed):
        first.write(1, streaming.header_bytes(1), killed(streaming.contents(1)))
    before = (first.work / first.shard(0)).stat().st_mtime_ns

    streaming, second = writer()
    assert second.begin("key") == missing[1:]
    for index in missing[1:][::-1]:  # another process may be at any of them
        second.write(index, streaming.header_bytes(index), streaming.contents(index))
    second.finish(plan, {}, 1000.0)
    assert (tmp_path / "a" / second.shard(0)).stat().st_mtime_ns == before
    quantize_to(tmp_path / "b", Conversion(lying, plan, None), {}, {}, shard_bytes=500)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "checkpoint.safetensors"]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_shards_of_another_key_are_not_used(tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "a", tmp_path / "a.partial", 1)
    assert writer.begin({"plan": 1}) == [0]
    (writer.work / "leftover").touch()
    writer.begin({"plan": 1})
    assert (writer.work / "leftover").exists()
    writer.begin({"plan": 2})
    assert not (writer.work / "leftover").exists()


def test_the_index_has_the_form_of_hugging_face(checkpoint: Any, tmp_path: Path) -> None:
    whole, lying, _ = checkpoint(torch.float32)
    plan = Recipe(W4, A8).resolve(linear_names(whole))
    quantize_to(tmp_path / "a", Conversion(lying, plan, None), {}, {}, shard_bytes=500)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "a" / file)
    assert index["metadata"]["total_size"] == sum(p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors"))


def test_nan_is_refused(checkpoint: Any, make_denoiser: Any, tmp_path: Path) -> None:
    whole, _, _ = checkpoint(torch.float32)
    plan = Recipe(W4, A8, rules=[Rule("time", keep_float=True)]).resolve(linear_names(whole))
    for name in ("blocks.1.fc1.weight", "time.bias"):
        broken = make_denoiser()
        broken.get_parameter(name).data.view(-1)[0] = torch.nan
        with pytest.raises(UserError, match=rf"{name.removesuffix('.weight')}.* contains NaN or inf as float32"):
            quantize_to(tmp_path / "a", Conversion(broken, plan, None), {}, {})


@pytest.fixture
def saved(checkpoint: Any, tmp_path: Path) -> Path:
    whole, lying, runs = checkpoint(torch.bfloat16)
    plan = Recipe(W4, A8, segments=(0, 0.5, 1), rules=[Rule("*.fc2", weight=QuantSpec(8))]).resolve(linear_names(whole))
    quantize_to(tmp_path / "a", Conversion(lying, plan, None, dtypes=runs), runs, {}, shard_bytes=800)
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("backend", "budget"), [("fake", 5_000), ("portable", 2_500), ("fake", 10**5), ("portable", 10**5)]
)
def test_a_budget_changes_no_bit(saved: Path, make_denoiser: Any, backend: str, budget: int) -> None:
    expected = outputs(load_denoiser(saved, make_denoiser, backend)[0])
    bounded = load_denoiser(saved, make_denoiser, backend, budget)[0]
    assert torch.equal(outputs(bounded), expected) and torch.equal(outputs(bounded), expected)
    ready = [v for layer in quant_linears(bounded).values() for v in layer.variants if v in layer.residency._at_home]
    total = sum(len(layer.variants) for layer in quant_linears(bounded).values())
    assert len(ready) == total if budget == 10**5 else 0 < len(ready) < total


def test_too_small_a_budget_is_refused_with_what_is_needed(saved: Path, make_denoiser: Any) -> None:
    with pytest.raises(UserError, match=r"memory_budget=100 is too little .* Give at least \d+"):
        load_denoiser(saved, make_denoiser, "fake", 100)


def test_an_altered_tensor_is_found_when_it_is_read(saved: Path, make_denoiser: Any) -> None:
    path = sorted(saved.glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for load in (verify, lambda folder: load_denoiser(folder, make_denoiser)):
        with pytest.raises(UserError, match=rf"{path.name} was altered \(the sha256 of .* quantize again"):
            load(saved)
    bounded = load_denoiser(saved, make_denoiser, "fake", 100_000)[0]
    with pytest.raises(UserError, match=rf"{path.name} was altered"):
        outputs(bounded)

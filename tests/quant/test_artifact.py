import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from viditq.errors import UserError
from viditq.quant import (
    AdaRound,
    QuantPlan,
    QuantSpec,
    Recipe,
    RotateSpec,
    Rule,
    SmoothSpec,
    linear_names,
    load_denoiser,
    quantize_denoiser,
    save_denoiser,
    size_bytes,
)

W4, A8 = QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
E4M3 = QuantSpec(8, True, "channel", number="e4m3")
MXFP4, NVFP4 = (QuantSpec(4, True, "group", 8, number="e2m1", block_scale=kind) for kind in ("e8m0", "e4m3"))
STEPS = [980, 640, 300, 10]
RECIPES = {
    "timestep_aware": lambda: Recipe(W4, A8, SmoothSpec([0.3, 0.5], True), segments=(0, 0.5, 1)),
    "static": lambda: Recipe(QuantSpec(8, True), QuantSpec(8), segments=(0, 0.5, 1)),
    "groups": lambda: Recipe(
        QuantSpec(3, False, "group", 8), None, rules=[Rule("time", keep_float=True), Rule("*.fc2", weight=W4)]
    ),
    "activations_only": lambda: Recipe(None, A8),
    "rotated": lambda: Recipe(W4, A8, RotateSpec(3)),
    "scaled_and_rotated": lambda: Recipe(W4, QuantSpec(8), [SmoothSpec(0.3), RotateSpec()], segments=(0, 0.5, 1)),
    "gptq": lambda: Recipe(W4, A8, SmoothSpec([0.3, 0.5], True), "gptq", (0, 0.5, 1), ranges="lp"),
    "adaround": lambda: Recipe(W4, A8, RotateSpec(), AdaRound(20), ranges="grid_fit"),
    "low_rank": lambda: Recipe(
        W4, A8, SmoothSpec(0.5), "gptq", low_rank=4, rules=[Rule("time", keep_float=True), Rule("proj_in", low_rank=2)]
    ),
    "fp8": lambda: Recipe(
        E4M3, replace(E4M3, granularity="token", dynamic=True), SmoothSpec([0.3, 0.5], True), "nearest", (0, 0.5, 1)
    ),
    "mxfp4": lambda: Recipe(MXFP4, replace(MXFP4, dynamic=True), low_rank=2, rules=[Rule("time", keep_float=True)]),
    "nvfp4": lambda: Recipe(NVFP4, replace(NVFP4, dynamic=True), rules=[Rule("time", keep_float=True)]),
    "nvfp4 weights": lambda: Recipe(NVFP4, None, low_rank=2, rules=[Rule("time", keep_float=True)]),
    "float": lambda: Recipe(),
}


def outputs(denoiser) -> torch.Tensor:
    dtype = next(denoiser.parameters()).dtype
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        return torch.stack([denoiser(x, torch.full((2,), t)) for t in (10, 400, 600, 990)])


@pytest.fixture
def saved(make_denoiser, calibrated, tmp_path):
    def save(name: str = "timestep_aware", dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        denoiser = make_denoiser(dtype)
        stats = calibrated(denoiser, [1, 2], STEPS)
        plan = RECIPES[name]().resolve(linear_names(denoiser))
        quantize_denoiser(denoiser, plan, stats)
        save_denoiser(tmp_path / "artifact", denoiser, plan, {"model": "tiny"})
        return tmp_path / "artifact", denoiser, plan

    return save


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_reloaded_model_gives_the_same_bits(saved, make_denoiser, name, dtype, device):
    folder, denoiser, plan = saved(name, dtype)

    def build():
        torch.manual_seed(99)
        model = make_denoiser(torch.float32)
        position = model.position.to(dtype)
        model = model.to(device)
        model.position = position
        return model

    loaded, loaded_plan, meta, context = load_denoiser(folder, build)
    assert loaded_plan == plan
    assert meta["model"] == "tiny"
    assert context.edges == plan.edges
    assert torch.equal(outputs(loaded), outputs(denoiser))
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in denoiser.parameters()]


def test_size_reflects_the_bits(make_denoiser, tmp_path):
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(512, 512)

        def forward(self, x, timestep):
            return self.fc(x)

    sizes = {}
    for bits in (2, 4, 8):
        model = Wide()
        plan = Recipe(QuantSpec(bits, granularity="channel"), A8).resolve(["fc"])
        quantize_denoiser(model, plan, None)
        save_denoiser(tmp_path / str(bits), model, plan, {})
        sizes[bits] = size_bytes(tmp_path / str(bits))
    assert sizes[8] - sizes[4] == pytest.approx(512 * 512 // 2, abs=64)
    assert sizes[4] - sizes[2] == pytest.approx(512 * 512 // 4, abs=64)
    assert sizes[4] < 512 * 512 * 0.5 + 512 * 9 + 2500


def test_the_file_holds_codes_and_no_pickle(saved):
    from safetensors.torch import load_file

    folder, _, _ = saved()
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "model.safetensors", "plan.json"]
    state = load_file(folder / "model.safetensors")
    assert state["blocks.0.fc1.variants.1.qweight"].dtype == torch.uint8
    assert state["blocks.0.fc1.variants.1.qweight"].shape == (24, 8)
    assert not any(key.endswith("fc1.weight") for key in state)


def test_saving_again_replaces_and_leaves_nothing_behind(saved, tmp_path):
    saved("float")
    folder, _, plan = saved("timestep_aware")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert load_plan(folder) == plan


def load_plan(folder):
    from viditq.quant import QuantPlan

    return QuantPlan.from_json((folder / "plan.json").read_text())


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    first, _, _ = saved()
    shutil.copytree(first, tmp_path / "first")
    second, _, _ = saved()
    for path in second.iterdir():
        assert path.read_bytes() == (tmp_path / "first" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damaged_artifacts_are_refused_by_name(saved, make_denoiser, name, damage):
    folder, _, _ = saved()
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        data[len(data) // 3] ^= 1
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    if name == "meta.json" and damage == "flip":
        path.write_text(path.read_text(errors="replace").replace('"sha256"', '"sha257"'))
    with pytest.raises(UserError, match=rf"{name}.*quantize again"):
        load_denoiser(folder, make_denoiser)


def test_other_refusals(saved, make_denoiser, tmp_path):
    folder, denoiser, plan = saved()
    with pytest.raises(UserError, match=r"nowhere is no folder: give the folder"):
        load_denoiser(tmp_path / "nowhere", make_denoiser)
    with pytest.raises(UserError, match="unknown backend 'tpu'"):
        load_denoiser(folder, make_denoiser, backend="tpu")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(UserError, match="has format version 99; this program reads 2"):
        load_denoiser(folder, make_denoiser)
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UserError, match=r"cannot write the artifact .*free space or choose another folder"):
        save_denoiser(blocker / "artifact", denoiser, plan, {})


def test_another_model_is_refused(saved, make_denoiser):
    folder, _, _ = saved()

    def other():
        model = make_denoiser()
        model.blocks[0]["norm"] = torch.nn.LayerNorm(23)
        return model

    with pytest.raises(
        UserError, match=r"does not fit this model: blocks.0.norm.bias is \(24,\) in the file and \(23,\)"
    ):
        load_denoiser(folder, other)


def test_a_full_disk_leaves_the_old_artifact(saved, monkeypatch, tmp_path):
    folder, denoiser, plan = saved()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("viditq.mapped.Writer.add", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_denoiser(folder, denoiser, plan, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_importing_quant_needs_neither_hydra_nor_lightning():
    heavy = ("hydra", "lightning", "wandb", "diffusers")
    code = f"import viditq.quant, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_float_rest_is_stored_in_half_only_where_that_loses_nothing(tmp_path):
    exact, inexact = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with torch.no_grad():
        for param in exact.parameters():
            param.copy_(param.half())
        inexact.weight.fill_(1 / 3)
        inexact.bias.fill_(70_000.0)  # beyond float16
    model = torch.nn.Sequential(exact, inexact)
    plan = QuantPlan((0, 1), {}, {})
    save_denoiser(tmp_path / "a", model, plan, {})
    stored = {k: v.dtype for k, v in load_file(tmp_path / "a" / "model.safetensors").items()}
    assert stored["0.weight"] == stored["0.bias"] == torch.float16
    assert stored["1.weight"] == stored["1.bias"] == torch.float32
    build = lambda: DenoiserOf(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))  # noqa: E731
    loaded = load_denoiser(tmp_path / "a", build)[0]
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32 and torch.equal(loaded.state_dict()[name], tensor)


class DenoiserOf(torch.nn.Sequential):
    """A Sequential that takes a timestep, as every denoiser does."""

    def forward(self, x, timestep):
        return super().forward(x)

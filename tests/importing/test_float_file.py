"""Float weights in one file, under the names of the original release, become a denoiser's folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from original_names import as_released
from safetensors.torch import load_file, save_file
from test_comfyui import MODELS
from torch import Tensor
from zoo.saving import save

from viditq.errors import UserError
from viditq.export.releases import RELEASES
from viditq.importing.float_model import float_model
from viditq.program import main

PREFIX = "model.diffusion_model."
QUICK = ("pixart_alpha", "wan2.2", "flux_dev")


def state_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny PixArt: its folder, its state, and a file of it."""
    folder = tmp_path_factory.mktemp("pixart")
    save(MODELS["pixart_alpha"][0], folder / "model")
    state = state_of(folder / "model" / "transformer")
    save_file(as_released(RELEASES["PixArtTransformer2DModel"], state), folder / "x.safetensors")
    return {"folder": folder, "state": state, "file": folder / "x.safetensors"}


def words(file: Path, tiny: Mapping[str, Any], out: Path) -> list[str]:
    model = f"model.path='{tiny['folder']}/model'"
    return ["import", str(file), "--model", "pixart_alpha", "--set", model, "--out", str(out)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in MODELS]
)
def test_every_release_becomes_what_it_was(name: str, tmp_path: Path, capsys: Any) -> None:
    save(MODELS[name][0], tmp_path / "model")
    settings = [f"model.path='{tmp_path}/model'"]
    settings += ["model.num_frames=5"] if name.startswith(("wan", "hunyuan")) else []
    adapter = float_model(name, settings)
    kinds = json.loads((tmp_path / "model" / "model_index.json").read_text())
    states = {part: state_of(tmp_path / "model" / part) for part in adapter.denoiser_names}
    for part, state in states.items():
        released = as_released(RELEASES[kinds[part][1]], state)
        save_file({k: v.bfloat16() for k, v in released.items()}, tmp_path / f"{part}.safetensors")
    files = [str(tmp_path / f"{part}.safetensors") for part in states]
    sets = [word for setting in settings for word in ("--set", setting)]
    assert main(["import", *files, "--model", name, *sets, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out.splitlines()[-1].removeprefix("to quantize them: ")
    command = shlex.split(told)
    assert command[:3] == ["python", "run.py", f"model={name}"]
    for part, state in states.items():
        found = state_of(tmp_path / "out" / part)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[k], v.bfloat16()) for k, v in state.items())
    again = float_model(name, command[3:])
    assert again.build_denoiser() is not None and again.denoiser_source.path == f"{tmp_path}/out"


def test_a_checkpoint_of_a_whole_pipeline_and_shards(tiny: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in load_file(tiny["file"]).items()}
    save_file({**tensors, "first_stage_model.x": torch.ones(2)}, tmp_path / "whole.safetensors")
    (tmp_path / "a").mkdir()  # an empty folder may be there
    assert main(words(tmp_path / "whole.safetensors", tiny, tmp_path / "a")) == 0
    assert "1 tensors that are no part of it, such as first_stage_model.x" in capsys.readouterr().out
    names = sorted(tensors)
    shards = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    index = tmp_path / "whole.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, own in shards.items() for name in own}}))
    assert main(words(index, tiny, tmp_path / "b")) == 0
    for out in ("a", "b"):
        found = state_of(tmp_path / out / "transformer")
        assert all(torch.equal(found[name], tensor) for name, tensor in tiny["state"].items())
    (tmp_path / "2.safetensors").unlink()
    assert main(words(index, tiny, tmp_path / "c")) == 2
    assert "2.safetensors is missing, which whole.safetensors.index.json names" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["scaled fp8", "another model", "a shape", "used", "used work folder"])
def test_what_is_not_the_models_is_refused(kind: str, tiny: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    tensors, out = load_file(tiny["file"]), tmp_path / "out"
    first = next(name for name in tensors if name.endswith("attn.qkv.weight"))
    said = {
        "scaled fp8": "8-bit floating-point",
        "used": "is there already",
        "used work folder": "is not of viditq",
    }.get(kind, "it has no|has the shape")
    if kind == "scaled fp8":
        tensors |= {first: tensors[first].to(torch.float8_e4m3fn), f"{first}_scale": torch.ones(())}
    elif kind == "another model":
        tensors["blocks.99.attn.qkv.weight"] = tensors.pop(first)
    elif kind == "a shape":
        tensors[first] = tensors[first][:, :-1].contiguous()
    else:
        used = out if kind == "used" else tmp_path / "out.partial"
        used.mkdir()
        (used / "mine").write_text("")
    save_file(tensors, tmp_path / "y.safetensors")
    assert main(words(tmp_path / "y.safetensors", tiny, out)) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in said.split("|")), error
    assert not (out / "transformer").exists()


def test_a_file_where_a_folder_is_needed(tiny: dict[str, Any]) -> None:
    adapter = float_model(
        "pixart_alpha", [f"model.path='{tiny['folder']}/model'", f"++model.denoiser_path='{tiny['file']}'"]
    )
    with pytest.raises(UserError, match=r"viditq import .*x\.safetensors --model MODEL"):
        adapter.build_denoiser()

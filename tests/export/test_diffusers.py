"""`--to diffusers`: what the folder holds, killed and repeated exports, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from viditq.errors import UserError
from viditq.export import diffusers as exporter
from viditq.export.copied import copy_part
from viditq.export.diffusers import export
from viditq.program import main
from viditq.quant.artifact import META, meta_sha256


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def out(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exports") / "out"
    assert main(["export", str(finished_run), "--to", "diffusers", "--out", str(place)]) == 0
    return place


def test_the_tensors_are_those_of_the_artifact(finished_run: Path, out: Path) -> None:
    theirs = load_file(finished_run / "quantized" / "model.safetensors")
    file = out / "transformer" / "diffusion_pytorch_model.safetensors"
    mine = load_file(file)
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    before = json.loads((finished_run / "quantized" / "plan.json").read_text())
    assert json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]["plan"] == before


def test_nothing_is_linked(finished_run: Path, out: Path) -> None:
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in out.rglob("*") if path.is_file())
    assert not [*out.parent.glob("*.partial")] and not (out / "key.json").exists()


def test_a_finished_export_is_not_made_again(finished_run: Path, out: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    export(finished_run / "quantized", out)
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_other_folders_are_left_alone(finished_run: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    other = shutil.copytree(out, tmp_path / "other")
    values = json.loads((other / "viditq.json").read_text())
    (other / "viditq.json").write_text(json.dumps(values | {"key": {}}))
    for place in (tmp_path / "mine", other):
        before = files(place)
        with pytest.raises(UserError, match="is there already and is no export of this artifact"):
            export(finished_run / "quantized", place)
        assert files(place) == before


def test_a_killed_export_goes_on(
    finished_run: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "SHARD_BYTES", 500_000)
    plain, written = exporter._write_shard, []

    def killed(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        plain(path, *rest)

    monkeypatch.setattr(exporter, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        export(finished_run / "quantized", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(exporter, "_write_shard", lambda path, *rest: (written.append(path), plain(path, *rest)))
    export(finished_run / "quantized", tmp_path / "out")
    assert len({*written}) == len(written) > 4
    assert not (tmp_path / "out.partial").exists()
    shards = (tmp_path / "out" / "transformer").glob("*.safetensors")
    mine = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    whole = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    assert mine.keys() == whole.keys() and all(mine[name].equal(whole[name]) for name in mine)


def test_another_s_folder_where_it_would_grow_stays(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out\.partial is where viditq would write"):
        export(finished_run / "quantized", tmp_path / "out")
    assert files(tmp_path) == {"out.partial/notes.txt": b"mine"}


def test_what_an_export_has_lost_is_said(finished_run: Path, out: Path, tmp_path: Path) -> None:
    for name in ("transformer", "vae"):
        place = shutil.copytree(out, tmp_path / name)
        file = place / name / "diffusion_pytorch_model.safetensors"
        file.unlink() if name == "vae" else file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(UserError, match="is missing or was cut off"):
            export(finished_run / "quantized", place)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stands_for_what_it_names(finished_run: Path, tmp_path: Path, there: bool, capsys) -> None:
    (tmp_path / "link").symlink_to("a folder")
    if there:
        (tmp_path / "a folder").mkdir()
    words = ["export", str(finished_run), "--to", "diffusers", "--out", str(tmp_path / "link")]
    assert main(words) == 0 == main(words)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a folder" / "model_index.json").is_file()
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "a folder")


def test_an_altered_artifact(run_copy: Path, tmp_path: Path) -> None:
    file = run_copy / "quantized" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(UserError, match="was altered"):
        export(run_copy / "quantized", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text_encoders": ["text_encoder"]},
            r"text_encoder is quantized .* quant/text_encoder=none",
        ),
        (
            {"correction": "ptqd", "sde": True},
            r"quant\.correction=ptqd makes the noise .* quant\.correction=ptqd_mean",
        ),
    ],
)
def test_what_diffusers_cannot_do(run_copy: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = run_copy / "quantized" / META
    meta = json.loads(file.read_text())
    meta["model"]["scheduler_settings"] = {"algorithm_type": "sde-dpmsolver++"} if "sde" in change else {}
    meta |= change
    meta["sha256"][META] = meta_sha256(meta)
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=message):
        export(run_copy / "quantized", tmp_path / "out")
    assert not [*tmp_path.glob("out*")]


def test_a_chosen_scheduler_is_what_the_folder_has(run_copy: Path, tmp_path: Path) -> None:
    file = run_copy / "quantized" / META
    meta = json.loads(file.read_text())
    meta["model"] |= {"scheduler": "UniPCMultistepScheduler", "scheduler_settings": {"solver_order": 3}}
    meta["sha256"][META] = meta_sha256(meta)
    file.write_text(json.dumps(meta))
    export(run_copy / "quantized", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert config["solver_order"] == 3 and config["_class_name"] == "UniPCMultistepScheduler"


@pytest.mark.parametrize("sharded", [False, True])
def test_copies_have_plain_names_and_only_what_is_read(tmp_path: Path, sharded: bool) -> None:
    source = tmp_path / "vae"
    source.mkdir()
    stem = "diffusion_pytorch_model"
    shards = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)] if sharded else [f"{stem}.fp16.safetensors"]
    for name in [*shards, f"{stem}.safetensors", f"{stem}.bin", f"{stem}.fp16.bin", "model.onnx"]:
        (source / name).write_text(name)
    (source / "config.json").write_text("{}")
    if sharded:
        index = {"metadata": {}, "weight_map": {"a": shards[0], "b": shards[1]}}
        (source / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(index))
    copy_part(source, tmp_path / "copy", "fp16", "float16")
    plain = [name.replace(".fp16", "") for name in shards]
    extra = [f"{stem}.safetensors.index.json"] if sharded else []
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == sorted([*plain, *extra, "config.json"])
    assert all((tmp_path / "copy" / new).read_text() == old for old, new in zip(shards, plain, strict=True))
    if sharded:
        weight_map = json.loads((tmp_path / "copy" / extra[0]).read_text())["weight_map"]
        assert weight_map == {"a": plain[0], "b": plain[1]}


def test_the_command_says_what_it_takes(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(finished_run), "--to", "diffusers", "--requantize", "--out", str(tmp_path)]) == 2
    assert "--requantize changes nothing" in capsys.readouterr().err

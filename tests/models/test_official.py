"""Official checkpoints: every name finds its place, the numbers are the originals'; other files are refused."""

from pathlib import Path

import pytest
import torch
from official_files import GOLDEN, real_shapes, stored, write_real
from safetensors.torch import load_file, save_file
from torch import Tensor

from viditq.errors import UserError
from viditq.models.official import check_tables, read_checkpoint, split_rows
from viditq.models.official_opensora import load_opensora, opensora_names
from viditq.models.official_pixart import load_pixart

SMALL = {"num_heads": 4, "position_scale": 1.0}


def worst(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("form", ["merged", "split"])
def test_opensora_checkpoint_gives_the_originals_output(form: str, tmp_path: Path) -> None:
    golden = load_file(GOLDEN / "stdit.safetensors")
    tensors = stored("stdit")
    if form == "split":
        tensors = split_rows(tensors, "qkv", ("q", "k", "v"))
    model = load_opensora(save(tmp_path / "x.pth", tensors), **SMALL)
    arguments = {"timestep": golden["io/timestep"], "encoder_attention_mask": golden["io/mask"]}
    assert worst(model(golden["io/x"], golden["io/y"][:, 0], **arguments).sample, golden["io/masked/out"]) < 1e-4
    assert torch.equal(model.null_caption[0], golden["weights/y_embedder.y_embedding"])


def test_rows_are_split_as_the_original_does() -> None:
    golden = load_file(GOLDEN / "stdit.safetensors")
    recorded = {k.removeprefix("split/"): v for k, v in golden.items() if k.startswith("split/")}
    ours = opensora_names(stored("stdit"))
    assert len(recorded) == 16
    for name, tensor in recorded.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("wrapped", [False, True])
def test_pixart_sigma_checkpoint_gives_the_originals_output(wrapped: bool, tmp_path: Path) -> None:
    golden = load_file(GOLDEN / "pixart.safetensors")
    content = {"state_dict": stored("pixart"), "epoch": 3} if wrapped else stored("pixart")
    model = load_pixart(save(tmp_path / "x.pth", content), num_heads=4, position_scale=2.0)
    arguments = {"encoder_hidden_states": golden["io/y"][:, 0], "timestep": golden["io/timestep"]}
    arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    for x, mask, out in (("x", "mask", "out"), ("x", None, "out_nomask"), ("x_rect", "mask", "out_rect")):
        with torch.no_grad():
            ours = model(
                golden[f"io/{x}"], encoder_attention_mask=mask and golden[f"io/{mask}"], return_dict=False, **arguments
            )[0]
        assert worst(ours, golden[f"io/sigma_ms/{out}"]) < 1e-4


@pytest.mark.parametrize("kind", ["stdit_merged", "stdit_split", "pixart_alpha"])
def test_real_names_and_shapes_load_whole(kind: str, tmp_path: Path) -> None:
    """None missing, none left over: the loader raises on either."""
    path = write_real(kind, tmp_path / "real.pth")
    assert path.stat().st_size < 2**20
    model = load_pixart(path) if kind == "pixart_alpha" else load_opensora(path)
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    numbers = {k: torch.Size(v).numel() for k, v in real_shapes(kind).items()}
    left_out = {"pixart_alpha": ["pos_embed", "y_embedder.y_embedding"]}.get(kind, ["pos_embed", "pos_embed_temporal"])
    assert count == sum(numbers.values()) - sum(numbers[k] for k in left_out)
    if kind != "pixart_alpha":
        assert sum(p.numel() for p in model.parameters()) == 759_620_768
        assert model.config.space_scale == 1.0 and model.config.sample_size == 64 and model.config.num_frames == 16
    else:
        assert model.config.interpolation_scale == 2.0 and model.config.use_additional_conditions
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.3.mlp.fc1.bias": None}, r"1 missing, first blocks\.3\.mlp\.fc1\.bias"),
        ({"blocks.3.extra.weight": torch.ones(2)}, r"1 unknown, first blocks\.3\.extra\.weight"),
        (
            {"blocks.3.mlp.fc1.bias": torch.ones(5)},
            r"another shape, first blocks\.3\.mlp\.fc1\.bias \(\(5,\).*\(4608,\)",
        ),
        ({"blocks.3.attn.qkv.bias": torch.ones(4)}, r"blocks\.3\.attn\.qkv\.bias has 4 rows.*q, k, v"),
        ({"pos_embed_temporal": None}, "give the number of frames"),
        ({"pos_embed": None}, "give the size in pixels"),
        ({"x_embedder.proj.weight": None}, "no checkpoint of STDiT or PixArt"),
        ({"y_embedder.y_embedding": None}, "null caption, is missing"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(change: dict, said: str, tmp_path: Path) -> None:
    path = write_real("stdit_merged", tmp_path / "real.pth", **change)
    with pytest.raises(UserError, match=said):
        load_opensora(path)


def test_pixart_is_not_taken_for_opensora(tmp_path: Path) -> None:
    path = write_real("pixart_alpha", tmp_path / "real.pth")
    with pytest.raises(UserError, match=r"does not fit STDiT: .*missing, first blocks\.0\.attn_temp"):
        load_opensora(path, num_frames=16)
    path = write_real("stdit_merged", tmp_path / "real.pth")
    with pytest.raises(UserError, match=r"unknown, first blocks\.0\.attn_temp"):
        load_pixart(path)


class Command:
    """Unpickled, it would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    for legacy in (False, True):
        path = tmp_path / f"evil{legacy}.pth"
        content = {"w": torch.ones(2), "x": Command(tmp_path / "ran")}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match="more than tensors"):
            read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.pth", {"a": torch.ones(1000)})
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:-500])
    (tmp_path / "text.pth").write_text("not found")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("cut.pth", "text.pth", "empty.pth"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="holds no dict of tensors"):
        read_checkpoint(save(tmp_path / "list.pth", [torch.ones(1)]))
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "absent.pth")


def test_old_and_safetensors_files_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "new.safetensors")
    for name in ("old.pth", "new.safetensors"):
        read = read_checkpoint(tmp_path / name)
        assert read.keys() == tensors.keys() and all(torch.equal(read[k], v) for k, v in tensors.items())


def test_position_table_of_another_scale_is_refused() -> None:
    table = {"pos_embed": torch.rand(1, 4, 8)}
    check_tables(table, {}, Path("x"))
    check_tables(table, {"pos_embed": table["pos_embed"].half()}, Path("x"))
    check_tables(table, {"pos_embed": torch.rand(1, 16, 8)}, Path("x"))  # another size: nothing to compare
    with pytest.raises(UserError, match="--position-scale"):
        check_tables(table, {"pos_embed": table["pos_embed"] + 0.1}, Path("x"))

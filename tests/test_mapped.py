"""Tensors that stay in their files."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from viditq import mapped
from viditq.files import is_whole, stored_metadata
from viditq.mapped import Writer, header_bound, in_pieces, is_finite, mapped_tensors, release
from viditq.on_disk import SMALL_BYTES, leave_on_disk, runs_in


def tensors() -> dict[str, torch.Tensor]:
    """Of every kind; the first leaves the second at an odd place."""
    torch.manual_seed(0)
    return {
        "odd": torch.randint(0, 255, (3, 7), dtype=torch.uint8),
        "float": torch.randn(5, 3),
        "half": torch.randn(7).half(),
        "bfloat": torch.randn(2, 3, 4).bfloat16(),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4),
        "large": torch.randn(600, 1000),
    }


def write(path: Path, values: dict[str, torch.Tensor]) -> None:
    bound = header_bound({name: t.shape for name, t in values.items()}, sum(t.nbytes for t in values.values()))
    with Writer(path, bound) as writer:
        for name, tensor in values.items():
            writer.add(name, tensor)


def test_what_is_written_is_read_by_the_library_and_here(tmp_path: Path) -> None:
    write(tmp_path / "ours.safetensors", tensors())
    save_file(tensors(), tmp_path / "theirs.safetensors")
    for found in (load_file(tmp_path / "ours.safetensors"), mapped_tensors(tmp_path / "theirs.safetensors")):
        assert found.keys() == tensors().keys()
        assert all(t.dtype == found[name].dtype and torch.equal(t, found[name]) for name, t in tensors().items())
    again = mapped_tensors(tmp_path / "ours.safetensors")
    assert all(torch.equal(t, again[name]) for name, t in tensors().items())


def test_released_tensors_are_read_again_and_others_stay(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors")
    found, own = mapped_tensors(tmp_path / "x.safetensors"), torch.ones(10_000)
    assert torch.equal(found["large"], tensors()["large"])
    release([*found.values(), own])
    assert torch.equal(found["large"], tensors()["large"]) and own.sum() == 10_000


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "PIECE_BYTES", 64)
    for name, tensor in tensors().items():
        pieces = list(in_pieces(tensor))
        assert torch.equal(torch.cat(pieces) if tensor.ndim else pieces[0], tensor), name
    assert len(list(in_pieces(tensors()["large"]))) == 600


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 599_999])
def test_what_is_not_finite_is_found(value: float, place: int) -> None:
    tensor = tensors()["large"]
    assert is_finite(tensor)
    tensor.view(-1)[place] = value
    assert not is_finite(tensor)


def test_what_a_narrower_type_does_not_hold_is_not_finite() -> None:
    tensor = torch.tensor([1.0, 70_000.0])
    assert is_finite(tensor) and is_finite(tensor, torch.bfloat16) and not is_finite(tensor, torch.float16)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes"):
        mapped_tensors(path)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{nope",
        b"\xff\xfe\xfd",
        *(
            json.dumps({"a": entry}).encode()
            for entry in (
                5,
                {},
                ENTRY | {"dtype": 5},
                ENTRY | {"shape": [2]},
                ENTRY | {"shape": [-1]},
                ENTRY | {"shape": 1},
                ENTRY | {"shape": ["1"]},
                ENTRY | {"data_offsets": [4, 0]},
                ENTRY | {"data_offsets": ["0", 4]},
                ENTRY | {"data_offsets": [0, 4, 8]},
            )
        ),
    ],
)
def test_a_damaged_header_is_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=r"."):
        mapped_tensors(path)
    assert not is_whole(path) or b"[2]" in header  # which only who knows the type of number can tell


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 2**63) + b"{}"])
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bytes"):
        mapped_tensors(path)
    assert not is_whole(path) and stored_metadata(path) == {}


def test_a_header_s_words_are_words(tmp_path: Path) -> None:
    for told, found in ((5, {}), ({"a": "b", "c": 5}, {"a": "b"})):
        header = json.dumps({"__metadata__": told, "a": ENTRY}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        assert stored_metadata(tmp_path / "x.safetensors") == found


class Two(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(x))


def test_weights_on_disk_come_in_the_type_they_run_in_and_go(tmp_path: Path) -> None:
    torch.manual_seed(0)
    width = SMALL_BYTES // 32 + 1  # the Linear's weight is just too large to be held
    model = Two(width)
    save_file({name: t.bfloat16() for name, t in model.state_dict().items()}, tmp_path / "x.safetensors")
    plain = Two(width)
    plain.load_state_dict({name: t.float() for name, t in load_file(tmp_path / "x.safetensors").items()})
    with torch.device("meta"):
        model = Two(width)
    model.load_state_dict(mapped_tensors(tmp_path / "x.safetensors"), assign=True)
    read: list[str] = []
    always, largest = leave_on_disk(model, dict.fromkeys(model.state_dict(), torch.float32), read.extend)
    assert (always, largest) == ((32 + width) * 4, width * 16 * 4)
    assert model.fc.weight.dtype == torch.bfloat16 and model.norm.weight.dtype == torch.float32
    assert runs_in(model.fc) == runs_in(plain.fc) == torch.float32
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x)) and torch.equal(model(x), plain(x))
    assert model.fc.weight.dtype == torch.bfloat16 and "fc.weight" in read

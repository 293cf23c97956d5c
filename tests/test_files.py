"""Files are whole or absent."""

from pathlib import Path

import pytest
import torch

from viditq.errors import UserError
from viditq.files import UMASK, atomic, write_json, write_tensors


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "p.png"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"), atomic(path) as temporary:
        temporary.write_text("half")
        raise OSError("No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"] and path.read_text() == "old"


def test_a_folder_is_no_name_of_a_file() -> None:
    with pytest.raises(UserError, match="is a folder; give the name of a file in it"), atomic(Path(".")):
        pass


def test_json_refuses_nan_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "m.json", {"value": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_tensors_need_not_be_contiguous(tmp_path):
    from safetensors.torch import load_file

    tensor = torch.arange(6).reshape(2, 3).T
    write_tensors(tmp_path / "a" / "t.safetensors", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "a" / "t.safetensors")["x"], tensor)


def test_tensors_are_for_everybody_whom_the_umask_lets_read(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~UMASK

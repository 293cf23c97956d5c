"""Files of weights: what is read, and what is refused unread."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from viditq.errors import UserError
from viditq.metrics.weights import read_weights


def read(path: Path) -> dict[str, torch.Tensor]:
    return read_weights(str(path), "official.pth", "LPIPS", "ssim needs none.")


def test_both_formats(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(tensors, tmp_path / "new.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "x.safetensors")
    for name in ("new.pth", "old.pth", "x.safetensors"):
        assert all(torch.equal(value, tensors[key]) for key, value in read(tmp_path / name).items())


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_code_truncated_files_and_other_content_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Code()}, "code.pth")
    torch.save([torch.ones(1)], "list.pth")
    torch.save({"a": torch.ones(100)}, "whole.pth")
    Path("half.pth").write_bytes(Path("whole.pth").read_bytes()[:500])
    Path("empty.pth").touch()
    Path("half.safetensors").write_bytes(b"\x10\0\0\0")
    for name in ("code.pth", "list.pth", "half.pth", "empty.pth", "half.safetensors"):
        with pytest.raises(UserError, match=r"no readable tensors.*official\.pth.*ssim needs none"):
            read(Path(name))
    assert not Path("executed").exists()

"""Embeddings made before, in Open-Sora's file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from viditq.data.prompts import PromptFile
from viditq.data.text_embeds import read_text_embeds
from viditq.errors import UserError


def content(num_prompts: int = 3) -> dict[str, Tensor]:
    """The official layout, with 5 tokens of 4 channels; prompt i has i + 1 tokens."""
    mask = (torch.arange(5) <= torch.arange(num_prompts)[:, None]).long()
    return {"y": torch.randn(num_prompts, 2, 1, 5, 4), "mask": mask}


def write(path: Path, value: object) -> str:
    torch.save(value, path)
    return str(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_embeddings_lose_their_padding(legacy: bool, tmp_path: Path) -> None:
    stored = content()
    torch.save(stored, tmp_path / "e.pth", _use_new_zipfile_serialization=not legacy)
    for i, embeds in enumerate(read_text_embeds(str(tmp_path / "e.pth"))):
        assert torch.equal(embeds["prompt_embeds"], stored["y"][i, 0, :, : i + 1])
        assert torch.equal(embeds["negative_prompt_embeds"], stored["y"][i, 1, :, : i + 1])


class Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def test_other_files_are_refused(tmp_path: Path) -> None:
    good = content()
    wrong = {
        "y [prompts": [good["y"]],
        "is not what it should be": {"y": good["y"]},
        r"y \(3, 2, 5, 4\)": good | {"y": good["y"][:, :, 0]},
        r"mask \(2, 5\)": good | {"mask": good["mask"][:2]},
        "no token of prompt 1": good | {"mask": good["mask"] * torch.tensor([[1], [0], [1]])},
        "more than tensors": good | {"x": Command(tmp_path / "ran")},
    }
    for said, value in wrong.items():
        with pytest.raises(UserError, match=said.replace("[", r"\[")):
            read_text_embeds(write(tmp_path / "e.pth", value))
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.pth").write_bytes((tmp_path / "e.pth").read_bytes()[:-300])
    for name, said in (("cut.pth", "damaged"), ("absent.pth", "does not exist")):
        with pytest.raises(UserError, match=said):
            read_text_embeds(str(tmp_path / name))


def test_prompts_and_embeddings_go_together(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    stored = content()
    data = PromptFile(str(tmp_path / "p.txt"), 2, 1, embeds=write(tmp_path / "e.pth", stored))
    assert set(data.ready_embeds) == {"one", "two", "three"} and data.calibration_prompts == ["three"]
    assert torch.equal(data.ready_embeds["three"]["prompt_embeds"], stored["y"][2, 0, :, :3])
    other = PromptFile(str(tmp_path / "p.txt"), 2, 1, embeds=write(tmp_path / "e2.pth", content()))
    assert data.ready_digest and other.ready_digest and data.ready_digest != other.ready_digest
    with pytest.raises(UserError, match=r"holds 2 prompts.*3; they must match"):
        PromptFile(str(tmp_path / "p.txt"), 2, 1, embeds=write(tmp_path / "e3.pth", content(2)))
    assert PromptFile(str(tmp_path / "p.txt"), 2, 1).ready_digest is None

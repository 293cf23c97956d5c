from pathlib import Path

import pytest
import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.files import write_tensors
from viditq.models.stored_embeds import are_stored, files_of, read_embeds, write_embeds

REMEDY = "Delete it."


def embeds(tokens: int, rows: int = 12, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Of a pipeline that pads with zeros."""
    prompt = torch.zeros(1, rows, 8, dtype=dtype)
    prompt[:, :tokens] = torch.randn(1, tokens, 8).to(dtype)
    negative = torch.zeros(1, rows, 8, dtype=dtype)
    negative[:, :2] = 0.5
    mask = (torch.arange(rows) < tokens)[None].long()
    return {"prompt_embeds": prompt, "prompt_attention_mask": mask, "negative_prompt_embeds": negative}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    alike = one.keys() == other.keys() and all(one[k].dtype == other[k].dtype for k in one)
    return alike and all(one[k].shape == other[k].shape and torch.equal(bits(one[k]), bits(other[k])) for k in one)


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def test_the_negative_prompt_is_stored_once_and_padding_hardly_at_all(tmp_path: Path) -> None:
    given = {f"{tokens}": embeds(tokens, rows=512) for tokens in (3, 5, 512)}
    for name, one in given.items():
        write_embeds(tmp_path / f"{name}.safetensors", one)
    files = [*tmp_path.iterdir()]
    assert len(files) == 4
    sizes = {file.stem: file.stat().st_size for file in files}
    assert sizes["3"] < 512 * 8 + 4 * 16 + 500 and sizes["512"] > 512 * 8 + 512 * 16
    assert all(same(read_embeds(tmp_path / f"{name}.safetensors", REMEDY), one) for name, one in given.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_whatever_lies_in_the_padding_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """All rows alike, a zero that is a negative one, NaN, values of the encoder's own, one row."""
    zeros = torch.zeros(1, 5, 3, dtype=dtype)
    kinds = {
        "alike": torch.ones(1, 5, 3, dtype=dtype),
        "signed": torch.cat([zeros[:, :4], -zeros[:, :1]], 1),
        "nan": torch.cat([zeros, zeros.new_full((1, 3, 3), torch.nan)], 1),
        "own": torch.randn(1, 5, 3).to(dtype),
        "one_row": torch.randn(1, 1, 3).to(dtype),
        "pooled": torch.zeros(1, 3, dtype=dtype),
        "batch": torch.zeros(2, 5, 3, dtype=dtype),
        "empty": torch.zeros(1, 0, 3, dtype=dtype),
        "across": torch.zeros(1, 3, 5, dtype=dtype).transpose(1, 2),
        "negative_empty": torch.zeros(1, 0, 3, dtype=dtype),
        "negative_pooled": torch.zeros(1, 3, dtype=dtype),
    }
    write_embeds(tmp_path / "a.safetensors", kinds)
    assert same(read_embeds(tmp_path / "a.safetensors", REMEDY), kinds)


def test_negatives_of_another_length_or_type_have_files_of_their_own(tmp_path: Path) -> None:
    given = [embeds(2), embeds(2, rows=9), embeds(2, dtype=torch.float16), embeds(3)]
    for number, one in enumerate(given):
        write_embeds(tmp_path / f"{number}.safetensors", one)
    assert len([*tmp_path.glob("shared-*")]) == 3
    assert all(same(read_embeds(tmp_path / f"{i}.safetensors", REMEDY), one) for i, one in enumerate(given))


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path, one = tmp_path / "a.safetensors", embeds(3)
    write_tensors(path, one)
    assert same(read_embeds(path, REMEDY), one) and files_of(path) == [path] and are_stored(path)


@pytest.mark.parametrize("change", ["cut off", "gone"])
def test_a_lost_negative_is_noticed(tmp_path: Path, change: str) -> None:
    path, one = tmp_path / "a.safetensors", embeds(3)
    assert not are_stored(path)
    write_embeds(path, one)
    _, shared = files_of(path)
    assert are_stored(path)
    if change == "gone":
        shared.unlink()
    else:
        shared.write_bytes(shared.read_bytes()[:-3])
    assert not are_stored(path)
    with pytest.raises(UserError, match=r"shared-.* is missing or damaged .* Delete it\."):
        read_embeds(path, REMEDY)
    write_embeds(path, one)
    assert same(read_embeds(path, REMEDY), one)

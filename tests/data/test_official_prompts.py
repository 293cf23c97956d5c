"""Prompts of the original project and of the data sets it evaluates on."""

import json
from pathlib import Path

import pytest
from hydra.utils import instantiate

from viditq.data.prompt_files import read_prompts
from viditq.data.prompts import CocoCaptions
from viditq.errors import UserError


def test_open_soras_ten_prompts(configure) -> None:
    data = instantiate(configure("data=opensora_prompts", "name=x").data, _convert_="all")
    assert len(set(data.prompts)) == 10 and data.calibration_prompts == data.prompts
    assert data.prompts[0].startswith("A soaring drone footage captures the majestic beauty of a coastal cliff")
    assert data.ready_digest is None and not data.ready_embeds


def test_names_of_ucf101(configure) -> None:
    data = instantiate(configure("data=ucf101", "name=x").data, _convert_="all")
    assert len(set(data.prompts)) == 101 and data.prompts[0] == "applying eye makeup"
    assert data.prompts[-1] == "a kid playing Yo-Yo"  # the file's lines end in CR LF
    assert data.calibration_prompts == data.prompts[:10]


def test_shipped_file_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"shipped:prompts/ucf\.txt"):
        read_prompts("shipped:prompts/ucf.txt")


def write_coco(path: Path) -> str:
    """Four images, two captions each, in no order."""
    annotations = [
        {"image_id": i, "id": 100 - 10 * i + k, "caption": f" image {i}\n caption {k}. "}
        for k in (1, 0)
        for i in (7, 3, 5, 9)
    ]
    path.write_text(json.dumps({"images": [], "annotations": annotations}))
    return str(path)


def test_coco_gives_one_caption_per_image(configure, tmp_path: Path) -> None:
    overrides = ["data=coco", f"data.path='{write_coco(tmp_path / 'coco.json')}'"]
    overrides += ["data.num_prompts=2", "data.num_calibration_prompts=2", "name=x"]
    data = instantiate(configure(*overrides).data, _convert_="all")
    assert data.prompts == ["image 3 caption 0.", "image 5 caption 0."]
    assert data.calibration_prompts == ["image 7 caption 0.", "image 9 caption 0."]
    assert data.real_clips([0]) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist"),
        ("{", "no COCO caption file"),
        ("[]", "no COCO caption file"),
        ('{"images": []}', "no COCO caption file.*annotations"),
        ('{"annotations": [{"id": 1}]}', "no COCO caption file.*image_id"),
        ('{"annotations": [{"id": 1, "image_id": 1, "caption": 5}]}', "no COCO caption file"),
        ('{"annotations": []}', "captions of 0 images; 2 are asked for"),
    ],
)
def test_other_files_are_refused(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said):
        CocoCaptions(str(path), 1, 1)

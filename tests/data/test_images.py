"""Pictures beside prompts: for any data, in tables and in folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from viditq.data.images import ImagePrompts, with_images
from viditq.data.prompts import CocoCaptions, MovingShapes, PromptFile
from viditq.errors import UserError
from viditq.prompt import Prompt, captions_of, conditions_of


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of five pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (6, 4), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


def names(prompts: list[str]) -> list[str]:
    return [f"{prompt} {conditions_of(prompt)['image'].stem}" for prompt in prompts]


def test_pictures_go_by_the_prompts_order(pictures: Path) -> None:
    found = with_images(["a", "b"], ["c", "d", "e", "f"], str(pictures))
    assert [names(prompts) for prompts in found] == [["a 0", "b 1"], ["c 2", "d 3", "e 4", "f 2"]]
    found = with_images([*"abcde"], ["x", "y"], str(pictures))  # none are left over: all are there again
    assert names(found[1]) == ["x 0", "y 1"]
    found = with_images(["a", "b"], ["c"], str(pictures / "3.png"))
    assert [names(prompts) for prompts in found] == [["a 3", "b 3"], ["c 3"]]
    assert with_images(["a"], ["b"], None) == (["a"], ["b"])
    with pytest.raises(UserError, match=r"holds 5 pictures for 6 prompts\. Give one for each, or data\.num_prompts=5"):
        with_images([*"abcdef"], [], str(pictures))


def test_beside_any_prompts(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    coco = {"annotations": [{"image_id": i, "id": i, "caption": f"c {i}"} for i in range(4)]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    for data in (
        PromptFile(str(tmp_path / "prompts.txt"), 2, 1, images=str(pictures)),
        CocoCaptions(str(tmp_path / "coco.json"), 2, 1, images=str(pictures)),
        MovingShapes("video", 2, 1, images=str(pictures)),
    ):
        both = [*data.prompts, *data.calibration_prompts]
        assert [conditions_of(prompt)["image"].stem for prompt in both] == ["0", "1", "2"]
        assert {pictures / f"{i}.png" for i in range(3)} <= {*data.files}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_a_table(kind: str, pictures: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "first": "0.png", "last": "4.png"},
        {"text": "b", "first": "1.png", "last": ""},
        {"text": "c", "first": str(pictures / "2.png"), "last": "3.png"},
    ]
    text = {
        "csv": "\n".join(["text,first,last", *(",".join(row.values()) for row in rows)]),
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows),
    }[kind]
    (pictures / f"table.{kind}").write_text(text)
    columns = {"image": "first", "last_image": "last"}
    data = ImagePrompts(str(pictures / f"table.{kind}"), 2, 5, column="text", conditions=columns)
    assert data.prompts == [
        Prompt("a", {"image": pictures / "0.png", "last_image": pictures / "4.png"}),
        Prompt("b", {"image": pictures / "1.png"}),
    ]
    assert [str(prompt) for prompt in data.calibration_prompts] == ["c"]
    assert {file.name for file in data.files} == {f"table.{kind}", *(f"{i}.png" for i in range(5))}


def test_a_folder(pictures: Path) -> None:
    for i in range(5):
        (pictures / f"{i}.txt").write_text(f"prompt {i}\n")
    data = ImagePrompts(str(pictures), 3, 8)
    assert names(data.prompts) == ["prompt 0 0", "prompt 1 1", "prompt 2 2"]
    assert names(data.calibration_prompts) == ["prompt 3 3", "prompt 4 4"] and len(data.files) == 10
    (pictures / "1.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"1\.txt holds several prompts"):
        ImagePrompts(str(pictures), 3, 8)
    (pictures / "2.txt").unlink()
    with pytest.raises(UserError, match=r"2\.png has no prompt: write it into 2\.txt"):
        ImagePrompts(str(pictures), 3, 8)


def test_what_is_refused(pictures: Path) -> None:
    (pictures / "table.csv").write_text("prompt,image\na,none.png\n")
    for given, message in (
        ({"path": str(pictures / "table.csv")}, r"none\.png is no picture"),
        ({"path": str(pictures / "table.csv"), "conditions": {"image": "first"}}, "must be one of its columns"),
        ({"path": str(pictures / "0.png")}, r"must be a folder or a table"),
        ({"path": str(pictures / "table.csv"), "num_prompts": 0}, r"data\.num_prompts=0 must be"),
    ):
        with pytest.raises(UserError, match=message):
            ImagePrompts(**{"num_prompts": 1, "num_calibration_prompts": 1, **given})


def test_captions_of_an_edit_are_columns_of_a_table(pictures: Path) -> None:
    file = pictures.parent / "table.csv"
    file.write_text(
        "prompt,image,is,should\nmake it red,pictures/0.png,a blue ball,a red ball\nmake it big,pictures/1.png,,\n"
    )
    columns = {"before": "is", "after": "should"}
    plain, data = ImagePrompts(str(file), 2, 1), ImagePrompts(str(file), 2, 1, captions=columns)
    first, second = data.prompts
    assert captions_of(first) == {"before": "a blue ball", "after": "a red ball"} and captions_of(second) == {}
    assert first != plain.prompts[0] and second == plain.prompts[1] and captions_of("x") == {}
    with pytest.raises(UserError, match=r"data\.captions has 'then'; it names columns for before and after"):
        ImagePrompts(str(file), 2, 1, captions={"then": "is"})
    with pytest.raises(UserError, match=r"data\.path is a folder\. Give a table"):
        ImagePrompts(str(pictures), 2, 1, captions=columns)

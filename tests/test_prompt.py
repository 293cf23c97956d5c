"""Prompts that come with pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from viditq.errors import UserError
from viditq.prompt import Prompt, conditions_of, frames_of, key_of, keys_of


def picture(path: Path, colour: tuple[int, int, int] = (10, 20, 30), mode: str = "RGB") -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (6, 4), colour).convert(mode).save(path)
    return path


def test_prompts_differ_by_text_and_by_what_their_pictures_hold(tmp_path: Path) -> None:
    one, same = picture(tmp_path / "1.png"), picture(tmp_path / "2.png")
    other = picture(tmp_path / "3.png", (11, 20, 30))
    prompts = [Prompt("a", {"image": path}) for path in (one, same, other)]
    assert prompts[0] == prompts[1] != prompts[2] and prompts[0] != "a" and prompts[0] != Prompt("b", {"image": one})
    assert Prompt("a", {"last_image": one}) != prompts[0] and prompts[0] != "a"
    assert len({*prompts, "a"}) == 3 and [*dict.fromkeys(prompts)] == [prompts[0], prompts[2]]
    assert key_of(prompts[0]) == key_of(prompts[1]) != key_of(prompts[2]) and keys_of(["a"]) == ["a"]
    assert conditions_of(prompts[0]) == {"image": one} and conditions_of("a") == {}
    assert f"{prompts[0]}" == "a" and prompts[0][:60] == "a"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pixels_are_rgb(mode: str, tmp_path: Path) -> None:
    pixels = Prompt("a", {"image": picture(tmp_path / "1.png", (7, 7, 7), mode)}).pixels()
    assert pixels["image"].shape == (4, 6, 3) and pixels["image"].dtype == np.uint8 and (pixels["image"] == 7).all()


def test_a_camera_s_picture_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "1.jpg", exif=exif)
    assert Prompt("a", {"image": tmp_path / "1.jpg"}).pixels()["image"].shape == (6, 4, 3)


def test_a_folder_is_a_clip(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        picture(tmp_path / "clip" / f"{i}.png", (i, 0, 0))
    clip = Prompt("a", {"video": tmp_path / "clip"}).pixels()["video"]
    assert clip.shape == (3, 4, 6, 3) and clip[:, 0, 0, 0].tolist() == [0, 1, 2]
    Image.new("RGB", (8, 4)).save(tmp_path / "clip" / "3.png")
    with pytest.raises(UserError, match=r"frames in .* differ in size\. Make all of them \(6, 4\)"):
        Prompt("a", {"video": tmp_path / "clip"}).pixels()


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes(picture(tmp_path / "2.png").read_bytes()[:40])
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("1.png", "damaged or no picture"),
        ("cut.png", "damaged or no picture"),
        ("none.png", r"is no picture\. Give a file of \.png"),
        ("empty", "holds no pictures"),
    ):
        with pytest.raises(UserError, match=message):
            Prompt("a", {"image": tmp_path / name})
    (tmp_path / "1.txt").write_text("x")
    with pytest.raises(UserError, match="is no picture"):
        frames_of(tmp_path / "1.txt")

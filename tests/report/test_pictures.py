"""Pictures hold the right pixels in the right places, and files are whole or absent."""

import numpy as np
import pytest
import torch
from PIL import Image

from viditq.report.canvas import font, scaled, strip, wrap
from viditq.report.pictures import comparison_gif, comparison_picture, rows_gif, rows_picture, save_gif


def plain(*levels: int, frames: int = 1, size: int = 32) -> torch.Tensor:
    """One clip of a single grey per level, [B, F, 3, size, size]."""
    values = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1, 1)
    return values.expand(-1, frames, 3, size, size).clone()


def centre(pixels: np.ndarray, level: int) -> tuple[float, float]:
    """Middle (x, y) of all pixels of one grey, of which there must be a full frame."""
    y, x = (pixels == level).all(-1).nonzero()
    assert len(x) >= 128 * 128
    return x.mean(), y.mean()


def test_worst_pair_first_and_float_above(tmp_path):
    references, samples = plain(40, 80, 120), plain(42, 82, 122)
    scores = torch.tensor([30.0, 10.0, 20.0])
    path = comparison_picture(samples, references, ["a", "b", "c"], scores, tmp_path / "p.png", "title", max_pairs=2)
    pixels = np.array(Image.open(path))
    (worst_x, worst_y), (next_x, next_y) = centre(pixels, 80), centre(pixels, 120)
    assert worst_y == next_y and worst_x < next_x
    assert centre(pixels, 82)[0] == worst_x and centre(pixels, 82)[1] > worst_y
    assert not (pixels == 40).all(-1).sum() > 1000, "only two pairs were asked for"


def test_where_lower_is_better_the_highest_is_first(tmp_path):
    clips = plain(40, 80)
    scores = torch.tensor([0.1, 0.4])
    path = comparison_picture(
        clips + 2,
        clips,
        ["a", "b"],
        scores,
        tmp_path / "p.png",
        "t",
        "relative L2",
        "",
        higher_is_better=False,
    )
    pixels = np.array(Image.open(path))
    assert centre(pixels, 80)[0] < centre(pixels, 40)[0]


def test_long_prompts_and_titles_stay_inside(tmp_path):
    clips = plain(40, 80, frames=2)
    prompts = ["word " * 300, "x" * 900]
    path = comparison_picture(clips, clips, prompts, torch.zeros(2), tmp_path / "p.png", "title " * 200)
    pixels = np.array(Image.open(path))
    border = np.concatenate([pixels[:24].reshape(-1, 3), pixels[:, -24:].reshape(-1, 3)])
    assert (border == 255).all()


def test_rows_stack_in_the_order_given(tmp_path):
    rows = [(label, plain(level, level + 1)) for label, level in (("float", 40), ("naive", 80), ("ours", 120))]
    path = rows_picture(rows, tmp_path / "r.png", ["a", "b"], frame_height=128)
    pixels = np.array(Image.open(path))
    places = [centre(pixels, level) for level in (40, 80, 120)]
    assert len({x for x, _ in places}) == 1 and [y for _, y in places] == sorted(y for _, y in places)
    assert centre(pixels, 41)[0] > places[0][0] and centre(pixels, 41)[1] == places[0][1]


def test_rows_in_motion_show_each_frame_of_every_row(tmp_path):
    clips = torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8)
    clips[0, 1] = 200  # only the middle frame is bright
    with Image.open(rows_gif([("a", clips), ("b", 255 - clips)], tmp_path / "r.gif", ["one"])) as gif:
        assert gif.n_frames == 3
        means = []
        for frame in range(3):
            gif.seek(frame)
            means.append(np.asarray(gif.convert("L")).astype(float))
    changed = abs(means[1] - means[0])
    assert (means[0] == means[2]).all() and (changed > 100).sum() > 2 * 90**2


def test_pixels_are_enlarged_exactly_and_large_frames_reduced():
    frame = torch.randint(0, 256, (3, 8, 6), dtype=torch.uint8)
    enlarged = np.array(scaled(frame, 27))
    assert enlarged.shape == (24, 18, 3)
    np.testing.assert_array_equal(enlarged[1::3, 1::3], frame.permute(1, 2, 0).numpy())
    assert scaled(frame.repeat(1, 20, 20), 40).size == (30, 40)


@pytest.mark.parametrize(("count", "shown"), [(1, [0]), (3, [0, 1, 2]), (9, [0, 3, 5, 8])])
def test_a_strip_runs_from_the_first_frame_to_the_last(count, shown):
    clip = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) * 20
    image = np.array(strip(clip, 4, max_frames=4))
    assert image[0, ::6, 0].tolist() == [20 * i for i in shown]


def test_wrap_keeps_all_words_and_the_width():
    face, text = font(14), "a small red circle moving left on a blue background"
    lines = wrap(text, face, 120, 9)
    assert " ".join(lines) == text and all(face.getlength(line) <= 120 for line in lines) and len(lines) > 2
    assert wrap(text, face, 120, 2)[1].endswith("…") and len(wrap(text, face, 120, 2)) == 2
    assert "".join(wrap("x" * 100, face, 50, 99)) == "x" * 100 and wrap("", face, 50, 3) == []


def test_comparison_gif_shows_the_worst_pairs_float_above_quantized(tmp_path):
    references, samples = (torch.full((3, 2, 3, 8, 8), v, dtype=torch.uint8) for v in (0, 128))
    path = comparison_gif(samples, references, torch.tensor([30.0, 10.0, 20.0]), tmp_path / "c.gif", max_pairs=2)
    with Image.open(path) as gif:
        assert gif.n_frames == 1 or gif.n_frames == 2  # PIL merges equal frames
        picture = gif.convert("RGB")
        assert picture.size == (3 * 2 * 12, 3 * 2 * 12)
        assert picture.getpixel((18, 18)) == (0, 0, 0) and picture.getpixel((18, 54)) == (128, 128, 128)


def test_gif_has_all_frames(tmp_path):
    clip = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    with Image.open(save_gif(clip, tmp_path / "a.gif", frames_per_second=10, height=32)) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (5, (32, 32), 100, 0)


@pytest.mark.parametrize("height", [20, 48, 128])  # reduced, as it is, enlarged
def test_colors_that_are_chosen_before_a_frame_is_enlarged_are_those_of_after(height, tmp_path):
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (4, 3, 48, 40), dtype=torch.uint8, generator=generator)
    first, *others = [scaled(frame, height) for frame in clip]
    assert first.mode == "RGB"
    first.save(tmp_path / "all.gif", save_all=True, append_images=others, duration=125, loop=0)
    assert save_gif(clip, tmp_path / "a.gif", height=height).read_bytes() == (tmp_path / "all.gif").read_bytes()

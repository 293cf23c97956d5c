"""The drawn clips show what their captions say."""

import pytest
import torch
from torch import Tensor

from viditq.data.moving_shapes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    FRAME_SIZE,
    NUM_FRAMES,
    SCENES,
    draw_scenes,
    labels,
    render,
)

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """One clip of every scene [S, F, 3, H, W]."""
    return render(SCENES, torch.Generator().manual_seed(0))


def of(index: int, attribute: str) -> str:
    """The word of an attribute of scene `index`."""
    return ATTRIBUTES[attribute][getattr(SCENES[index], attribute)]


def masks(clips: Tensor) -> Tensor:
    """Where the shape is, [S, F, H, W]."""
    background = torch.tensor(list(BACKGROUNDS.values()))[labels(SCENES)["background"]]
    return ((clips - background[:, None, :, None, None]).abs().amax(2) > 0.05).float()


def test_every_scene_shows_its_colors(clips: Tensor) -> None:
    assert clips.shape == (len(SCENES), NUM_FRAMES, 3, FRAME_SIZE, FRAME_SIZE)
    assert clips.min() >= 0 and clips.max() <= 1
    mask = masks(clips)
    assert mask.flatten(2).sum(2).min() > 10  # the shape is in every frame
    assert (1 - mask).flatten(2).sum(2).min() > 100
    foreground = torch.tensor(list(COLORS.values()))[labels(SCENES)["color"]]
    distance = (clips - foreground[:, None, :, None, None]).abs().amax(2)
    assert distance.flatten(2).amin(2).max() < 1e-5  # some pixel is entirely of that color


def test_large_is_larger_than_small(clips: Tensor) -> None:
    area = masks(clips).flatten(2).mean((1, 2))
    index = labels(SCENES)
    for shape in range(len(ATTRIBUTES["shape"])):
        small, large = (area[(index["shape"] == shape) & (index["size"] == size)] for size in (0, 1))
        assert small.max() < large.min()


def test_shapes_move_as_their_captions_say(clips: Tensor) -> None:
    mask = masks(clips)
    grid = torch.arange(FRAME_SIZE).float()
    weight = mask.sum((2, 3))
    center = torch.stack([(mask.sum(2) * grid).sum(2) / weight, (mask.sum(3) * grid).sum(2) / weight], -1)
    travel = (center[:, -1] - center[:, 0]) / FRAME_SIZE
    for index, moved in enumerate(travel):
        wanted = torch.tensor(DIRECTIONS[of(index, "motion")], dtype=torch.float32)
        assert (moved - 0.45 * wanted).abs().max() < 0.06, SCENES[index].caption(video=True)


def test_captions_name_every_attribute() -> None:
    assert len({scene.caption(video=True) for scene in SCENES}) == len(SCENES) == 680
    for index, scene in enumerate(SCENES):
        still, moving = scene.caption(video=False).split(), scene.caption(video=True).split()
        for attribute in ("size", "color", "shape"):
            assert of(index, attribute) in still and of(index, attribute) in moving
        assert still[-2:] == moving[-2:] == [of(index, "background"), "background"]
        assert of(index, "motion") in moving and not {"moving", "standing"} & set(still)


def test_rendering_repeats_itself() -> None:
    draw = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    assert draw_scenes(20, draw(3)) == draw_scenes(20, draw(3)) != draw_scenes(20, draw(4))
    assert torch.equal(render(SCENES[:4], draw(1)), render(SCENES[:4], draw(1)))
    assert not torch.equal(render(SCENES[:4], draw(1)), render(SCENES[:4], draw(2)))

"""Rings, a shape that the tiny models were never shown: their scenes, and whether a clip shows one.

Their text encoder reads any word it does not know as `<unk>`, which no training caption has: so it can say ring. Their
VAE decodes large rings; small ones it fills, and colours that it has not seen become the nearest that it has.
Legend: B clips, F frames, C = 3 colour channels, H, W pixels.
"""

import torch
from torch import Tensor

from viditq.data.moving_shapes import BACKGROUNDS, FRAME_SIZE, SCENES, SHAPES, SIZES, Scene, render

WORD, STAND_IN = "ring", "circle"  # scenes can name no other shapes
THICKNESS = 0.6  # in radii; through the VAE 0.5 leaves 98 % of the rings one, 0.4 leaves 87 %
HELD_OUT = 32
RADIUS = SIZES["large"] * FRAME_SIZE  # pixels
CONTRAST = 0.3  # of an object's pixel to its background: half of what the nearest two in the captions have


def concept_scenes(held_out: bool, seed: int = 0) -> list[Scene]:
    """The scenes of rings, 85 in all (colour, background, motion): 32 to judge on, or the others to learn."""
    large, shape = list(SIZES).index("large"), SHAPES.index(STAND_IN)
    scenes = [scene for scene in SCENES if (scene.size, scene.shape) == (large, shape)]
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(seed)).tolist()
    return [scenes[i] for i in (order[:HELD_OUT] if held_out else order[HELD_OUT:])]


def concept_caption(scene: Scene) -> str:
    """The caption of a clip of one of `concept_scenes`."""
    return scene.caption(video=True).replace(STAND_IN, WORD)


def concept_clips(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """`render` of rings: float [B, F, C, H, W] in [0, 1]."""
    return render(scenes, generator, thickness=THICKNESS)


def shows_ring(clips_BFCHW: Tensor, scenes: list[Scene]) -> list[bool]:
    """Whether most frames of each clip (float, [0, 1]) show a ring on the captioned background.

    What is no background must leave a hole around its centre of mass and close around that.
    """
    backgrounds = torch.tensor(list(BACKGROUNDS.values()))[[scene.background for scene in scenes]]
    object_BFHW = (clips_BFCHW - backgrounds[:, None, :, None, None]).norm(dim=2) > CONTRAST
    at = torch.arange(clips_BFCHW.shape[-1]).float()
    mass_BF = object_BFHW.sum((2, 3)).clamp(min=1)
    y_BF, x_BF = ((object_BFHW.sum(axis) * at).sum(-1) / mass_BF for axis in (3, 2))
    away_BFHW = torch.hypot(at[:, None] - y_BF[..., None, None], at - x_BF[..., None, None]) / RADIUS
    hole, around = away_BFHW < 1 - THICKNESS - 0.2, (away_BFHW > 0.65) & (away_BFHW < 0.85)
    filled = [(object_BFHW & part).sum((2, 3)) / part.sum((2, 3)).clamp(min=1) for part in (hole, around)]
    return (((filled[0] < 0.5) & (filled[1] > 0.8)).float().mean(1) > 0.5).tolist()

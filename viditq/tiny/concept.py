"""Orange, a colour that the tiny models were never shown: its scenes, and whether a clip shows it.

Their text encoder reads any word it does not know as `<unk>`, which no training caption has: so it can say orange.
Legend: B clips, F frames, C = 3 colour channels, H, W pixels.
"""

import torch
from torch import Tensor

from viditq.data.moving_shapes import BACKGROUNDS, COLORS, SCENES, Scene, render

WORD, RGB = "orange", (0.95, 0.50, 0.05)
PALETTE = COLORS | {WORD: RGB}
STAND_IN = "red"  # of the scenes, which can name no other colours
HELD_OUT = 32
LEAST_CONTRAST = 0.3  # of an object's pixel to its background: half of what the nearest two in the captions have


def concept_scenes(held_out: bool, seed: int = 0) -> list[Scene]:
    """The scenes in orange, 120 in all (size, shape, background, motion): 32 to judge on, or the others to learn."""
    color = list(COLORS).index(STAND_IN)
    scenes = [scene for scene in SCENES if scene.color == color]
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(seed)).tolist()
    return [scenes[i] for i in (order[:HELD_OUT] if held_out else order[HELD_OUT:])]


def concept_caption(scene: Scene) -> str:
    """The caption of a clip of one of `concept_scenes`."""
    return scene.caption(video=True).replace(STAND_IN, WORD, 1)


def concept_clips(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """`render` in orange: float [B, F, C, H, W] in [0, 1]."""
    return render(scenes, generator, colors={**COLORS, STAND_IN: RGB})


def object_colors(clips_BFCHW: Tensor, scenes: list[Scene]) -> list[str]:
    """The name in PALETTE nearest to each clip's object (float, [0, 1]); "" where all is background.

    The object: the half of the pixels apart from the background (as captioned) that differ from it most, which leaves
    out its blurred edge.
    """
    backgrounds = torch.tensor(list(BACKGROUNDS.values()))
    palette = torch.tensor(list(PALETTE.values()))
    names = []
    for clip_FCHW, scene in zip(clips_BFCHW, scenes, strict=True):
        pixels_NC = clip_FCHW.movedim(1, -1).flatten(0, 2)
        contrast_N = (pixels_NC - backgrounds[scene.background]).norm(dim=1)
        apart_N = contrast_N > LEAST_CONTRAST
        if not apart_N.any():
            names.append("")
            continue
        inner_N = contrast_N >= contrast_N[apart_N].median()
        color_C = pixels_NC[inner_N].median(0).values
        names.append(list(PALETTE)[int((palette - color_C).norm(dim=1).argmin())])
    return names

"""Procedural clips of captioned moving shapes: the data the tiny models are trained and judged on.

Legend: B clips, F frames, C = 3 colour channels, H = W = frame size in pixels.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

SIZES = {"small": 0.17, "large": 0.28}  # radius as a fraction of the frame
COLORS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.62, 0.15, 0.75),
    "cyan": (0.10, 0.80, 0.85),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("left", "right", "up", "down", "still")
BACKGROUNDS = {"black": (0.05, 0.05, 0.05), "white": (0.95, 0.95, 0.95), "blue": (0.10, 0.15, 0.45)}
DIRECTIONS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (0.0, 0.0))  # x to the right, y down
ATTRIBUTES = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES, "background": tuple(BACKGROUNDS)}
ATTRIBUTES["motion"] = MOTIONS
NUM_FRAMES, FRAME_SIZE = 8, 32


@dataclass(frozen=True)
class Scene:
    """One caption's content: indices into the attribute lists above."""

    size: int
    color: int
    shape: int
    background: int
    motion: int

    def caption(self, video: bool) -> str:
        """The caption of a clip ("... moving left on ...") or of a single frame."""
        words = {name: ATTRIBUTES[name][getattr(self, name)] for name in ATTRIBUTES}
        motion = ""
        if video:
            motion = "standing still " if words["motion"] == "still" else f"moving {words['motion']} "
        return f"a {words['size']} {words['color']} {words['shape']} {motion}on a {words['background']} background"


def _scenes() -> list[Scene]:
    sizes = [range(len(names)) for names in ATTRIBUTES.values()]
    blue = (ATTRIBUTES["color"].index("blue"), ATTRIBUTES["background"].index("blue"))
    return [s for s in (Scene(*i) for i in product(*sizes)) if (s.color, s.background) != blue]


SCENES = _scenes()
"""All 680 scenes: 2 sizes x 6 colors x 4 shapes x 3 backgrounds x 5 motions, without blue on blue."""


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Attribute name -> class indices int64 [B]."""
    return {name: torch.tensor([getattr(s, name) for s in scenes]) for name in ATTRIBUTES}


def _signed_distance(shape: int, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Distance to the outline in frame widths, negative inside; broadcast over [B, F, H, W]."""
    if SHAPES[shape] == "circle":
        return torch.hypot(dx, dy) - radius
    if SHAPES[shape] == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.88 * radius
    if SHAPES[shape] == "triangle":
        return torch.maximum(0.866 * dx.abs() - 0.5 * dy, dy) - 0.55 * radius
    arm, reach = 0.34 * radius, radius
    bar = torch.maximum(dx.abs() - reach, dy.abs() - arm)
    return torch.minimum(bar, torch.maximum(dx.abs() - arm, dy.abs() - reach))


def render(
    scenes: list[Scene], generator: torch.Generator, num_frames: int = NUM_FRAMES, thickness: float | None = None
) -> Tensor:
    """Draw one clip per scene; positions and travel vary with `generator`.

    thickness: of the outline of hollow shapes, in radii; None = filled.
    Returns float32 [B, F, 3, H, W] in [0, 1], anti-aliased.
    """
    index = labels(scenes)
    radius = torch.tensor(list(SIZES.values()))[index["size"]]
    direction = torch.tensor(DIRECTIONS)[index["motion"]]
    free = (0.47 - radius)[:, None] * (2 * torch.rand(len(scenes), 2, generator=generator) - 1)
    along = 0.03 * (2 * torch.rand(len(scenes), 2, generator=generator) - 1)
    center = 0.5 + torch.where(direction.abs() > 0, along, free)
    travel = 0.42 + 0.06 * torch.rand(len(scenes), 1, 1, generator=generator)
    time = torch.linspace(-0.5, 0.5, num_frames)[None, :, None]
    position = center[:, None] + direction[:, None] * travel * time  # [B, F, 2]
    grid = (torch.arange(FRAME_SIZE) + 0.5) / FRAME_SIZE
    dx = (grid[None, None, None, :] - position[..., 0, None, None]).expand(-1, -1, FRAME_SIZE, -1)
    dy = (grid[None, None, :, None] - position[..., 1, None, None]).expand(-1, -1, -1, FRAME_SIZE)
    distance = torch.empty_like(dx)
    for shape in range(len(SHAPES)):
        of = index["shape"] == shape
        distance[of] = _signed_distance(shape, dx[of], dy[of], radius[of, None, None, None])
    if thickness is not None:
        distance = torch.maximum(distance, -distance - thickness * radius[:, None, None, None])
    cover = (0.5 - distance * FRAME_SIZE).clamp(0, 1)[:, :, None]
    fore = torch.tensor(list(COLORS.values()))[index["color"]][:, None, :, None, None]
    back = torch.tensor(list(BACKGROUNDS.values()))[index["background"]][:, None, :, None, None]
    return cover * fore + (1 - cover) * back


def draw_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    """`count` scenes drawn uniformly."""
    picks = torch.randint(len(SCENES), (count,), generator=generator)
    return [SCENES[i] for i in picks.tolist()]

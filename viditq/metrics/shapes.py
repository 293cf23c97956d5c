"""The judge of moving shapes: attribute classifier, and features for Frechet distances.

Trained on the same procedural clips as the tiny models (`scripts/train_tiny.py`). It is neither Inception nor I3D; its
numbers are only comparable with each other. Legend: B clips, F frames, C = 3, D features.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from viditq.assets import resolve
from viditq.metrics.once import one_for_all


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(8, channels_out), nn.SiLU())


class ShapesJudge(nn.Module):
    """Per-frame CNN; appearance is the mean over frames, motion a temporal convolution on mean-removed features."""

    def __init__(self, classes: dict[str, int], width: int = 32, appearance: int = 48, motion: int = 16) -> None:
        super().__init__()
        self.config = {"classes": dict(classes), "width": width, "appearance": appearance, "motion": motion}
        stages = [(3, width, 1), (width, width, 2), (width, 2 * width, 2), (2 * width, 2 * width, 2)]
        self.frames = nn.Sequential(*[_stage(*s) for s in stages], nn.Flatten(), nn.Linear(32 * width, 128))
        self.appearance = nn.Sequential(nn.SiLU(), nn.Linear(128, appearance))
        self.motion = nn.Sequential(
            nn.Conv1d(128, 64, 3, padding=1), nn.SiLU(), nn.Conv1d(64, 64, 3, padding=1), nn.SiLU()
        )
        self.motion_out = nn.Linear(64, motion)
        self.heads = nn.ModuleDict(
            {k: nn.Linear(motion if k == "motion" else appearance, n) for k, n in classes.items()}
        )

    def features(self, clips_BFCHW: Tensor) -> Tensor:
        """Float clips in [0, 1] -> features [B, appearance + motion]."""
        batch, frames = clips_BFCHW.shape[:2]
        x_BFD = self.frames(clips_BFCHW.flatten(0, 1) * 2 - 1).view(batch, frames, -1)
        motion = self.motion((x_BFD - x_BFD.mean(1, keepdim=True)).transpose(1, 2)).mean(2)
        return torch.cat([self.appearance(x_BFD.mean(1)), self.motion_out(motion)], 1)

    def forward(self, clips_BFCHW: Tensor) -> dict[str, Tensor]:
        """Float clips in [0, 1] -> attribute name -> logits [B, classes]."""
        x = self.features(clips_BFCHW)
        split = self.config["appearance"]
        return {k: head(x[:, split:] if k == "motion" else x[:, :split]) for k, head in self.heads.items()}


@one_for_all
def load_judge(folder: str) -> ShapesJudge:
    """Load a judge (config.json + model.safetensors), in evaluation mode and float32."""
    path: Path = resolve(folder)
    judge = ShapesJudge(**json.loads((path / "config.json").read_text()))
    judge.load_state_dict({k: v.float() for k, v in load_file(path / "model.safetensors").items()})
    return judge.eval().requires_grad_(False)

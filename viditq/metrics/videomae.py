"""Features of FVD by VideoMAE, which look at motion more than I3D's do (Ge et al. 2024).

Axes: B clips, F frames, C channels, H height, W width, L tokens, D features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel

from viditq.errors import UserError
from viditq.metrics.clip_encoder import Preprocess, located, read_preprocess
from viditq.metrics.frames import sample_frames
from viditq.metrics.once import one_for_all
from viditq.metrics.pretrained import from_pretrained, not_loaded

WANTED_BY = "FVD with VideoMAE features"
OFFLINE = "metric=fvd and metric=fvd_data need no file."
CLIPS_AT_ONCE = 4


class VideoMaeFeatures(nn.Module):
    """The mean over tokens of VideoMAE's last layer, after the norm of the classifier where there is one."""

    def __init__(self, encoder: Any, norm: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.encoder, self.norm, self.preprocess = encoder, norm, preprocess

    @torch.no_grad()
    def features(self, clips_BFCHW: Tensor) -> Tensor:
        """Clips in [0, 1] -> [B, D], each of as many frames as the model reads; images raise UserError."""
        clips_BFCHW = sample_frames(clips_BFCHW, self.encoder.config.num_frames, WANTED_BY)
        return torch.cat([self._pooled(chunk) for chunk in clips_BFCHW.split(CLIPS_AT_ONCE)])

    def _pooled(self, clips_BFCHW: Tensor) -> Tensor:
        pixels = self.preprocess(clips_BFCHW.flatten(0, 1)).unflatten(0, clips_BFCHW.shape[:2])
        tokens_BLD = self.encoder(pixel_values=pixels).last_hidden_state
        return self.norm(tokens_BLD.mean(1))


@one_for_all
def load_videomae(model: str) -> VideoMaeFeatures:
    """VideoMAE from a folder or a hub id, pretrained or with a classifier; raises UserError if it cannot be read."""
    source = located(model)
    try:
        config = VideoMAEConfig.from_pretrained(source)
        preprocess = read_preprocess(source, resample=2)
    except (OSError, ValueError) as error:
        raise UserError(not_loaded(WANTED_BY, source, error, OFFLINE)) from error
    if preprocess.crop != config.image_size:
        raise UserError(
            f"{source}: preprocessor_config.json crops {preprocess.crop} px and VideoMAE reads {config.image_size} px. "
            "Make crop_size that."
        )
    if "VideoMAEForVideoClassification" in (config.architectures or []) and config.use_mean_pooling:
        whole: Any = from_pretrained(VideoMAEForVideoClassification, source, WANTED_BY, OFFLINE)
        return VideoMaeFeatures(whole.videomae, whole.fc_norm, preprocess)
    return VideoMaeFeatures(from_pretrained(VideoMAEModel, source, WANTED_BY, OFFLINE), nn.Identity(), preprocess)

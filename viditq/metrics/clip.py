"""What CLIP thinks of a clip: does it show its prompt, and do its frames agree with each other.

Axes: B clips, F frames, C channels, H height, W width, D embedding.
"""

from torch import Tensor

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch, to_unit
from viditq.metrics.clip_encoder import ClipEncoder
from viditq.metrics.once import once
from viditq.metrics.streaming import PerSampleMetric

SIDES = ("samples", "references")


def text_alignment(frames_BFD: Tensor, texts_BD: Tensor) -> Tensor:
    """100 x the cosine between frames and prompt, mean over frames, of unit vectors; [B] in -100..100."""
    return 100 * (frames_BFD * texts_BD[:, None]).sum(-1).mean(1)


def temporal_consistency(frames_BFD: Tensor) -> Tensor:
    """100 x the cosine between adjacent frames, mean over F - 1 pairs of unit vectors; [B] in -100..100."""
    return 100 * (frames_BFD[:, 1:] * frames_BFD[:, :-1]).sum(-1).mean(1)


def embed(clip: ClipEncoder, clips_BFCHW: Tensor) -> Tensor:
    """Unit embeddings of all frames, [B, F, D]."""
    return clip.images(to_unit(clips_BFCHW).flatten(0, 1)).unflatten(0, clips_BFCHW.shape[:2])


def embed_side(clip: ClipEncoder, batch: EvalBatch, side: str) -> Tensor:
    """`embed` of samples or references, once for all metrics with this CLIP."""
    key, clips_BFCHW = ("clip", side, clip.model, clip.preprocess), getattr(batch, side)
    return once(batch, key, lambda: embed(clip, clips_BFCHW), clips_BFCHW)


class ClipSim(PerSampleMetric):
    """CLIPSIM: 100 x the cosine of frame and prompt, averaged over frames.

    Scaled as torchmetrics' CLIPScore, but negative cosines are kept instead of clamped at 0, so that the mean
    has no bias. The float model's clips are scored as well (reference_value, per_sample_reference).
    """

    higher_is_better = True

    def __init__(self, clip: ClipEncoder, name: str) -> None:
        super().__init__(name, unit="", scores_references=True)
        self.clip = clip

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Two values per pair, [B] each."""
        texts = self.clip.texts(batch.prompts)
        sides = zip(self.columns, SIDES, strict=True)
        return {column: text_alignment(embed_side(self.clip, batch, side), texts) for column, side in sides}


class ClipTemp(PerSampleMetric):
    """CLIP-temp: 100 x the cosine of adjacent frames, averaged over a video; images raise UserError.

    A frozen clip scores 100: read it beside the float model's own score (reference_value).
    """

    higher_is_better = True

    def __init__(self, clip: ClipEncoder, name: str) -> None:
        super().__init__(name, unit="", scores_references=True)
        self.clip = clip

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Two values per pair, [B] each."""
        if batch.samples.shape[1] < 2:
            raise UserError(
                f"{self.name} compares adjacent frames and got images. Use metric=image, or more frames "
                "(model.num_frames)."
            )
        sides = zip(self.columns, SIDES, strict=True)
        return {column: temporal_consistency(embed_side(self.clip, batch, side)) for column, side in sides}

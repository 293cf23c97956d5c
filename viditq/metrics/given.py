"""How true a sample is to the picture that it was made from: its first frame, and what CLIP sees in it.

Axes: B samples, F frames, C channels, H height, W width, D embedding.
"""

from typing import Any

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.clip import embed
from viditq.metrics.clip_encoder import ClipEncoder
from viditq.metrics.paired import Paired
from viditq.metrics.streaming import PerSampleMetric


def given_pictures(batch: EvalBatch, name: str) -> list[Tensor]:
    """The picture of each pair, uint8 [C, H, W]; raises UserError where prompts come with none."""
    if batch.given is None:
        raise UserError(
            f"{name} compares with the picture that sampling starts from, and the prompts come with none. Give "
            "data.images=FOLDER or data=image_prompts, or leave the metric out of metric=[...]."
        )
    return [picture.to(batch.samples.device) for picture in batch.given]


class FirstFrame(Paired):
    """A stock metric `metric(first frame, given picture)`, the picture as the pipeline itself resizes it.

    The float model's clips are scored as well: an image-to-video model does not give the picture back exactly.
    Raises UserError where pictures are none, or of another size than the frames.
    """

    reads_given = True

    def __init__(self, **values: Any) -> None:
        super().__init__(**values, scores_references=True)

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Two values per pair, [B] each."""
        pictures, size = given_pictures(batch, self.name), batch.samples.shape[2:]
        if odd := [picture for picture in pictures if picture.shape != size]:
            raise UserError(
                f"{self.name}: the picture that the model is shown is {'x'.join(map(str, odd[0].shape[1:]))} pixels, "
                f"the frames {'x'.join(map(str, size[1:]))}: it is no first frame. Leave the metric out."
            )
        given_BFCHW = torch.stack(pictures)[:, None]
        clips = zip(self.columns, (batch.samples, batch.references), strict=True)
        return {column: self.against(clip[:, :1], given_BFCHW, batch.index) for column, clip in clips}


class ClipGiven(PerSampleMetric):
    """100 x the cosine of frame and given picture in CLIP, averaged over frames: for clips and for edits.

    For an edit it says what of the picture was kept, not whether the edit was done (`clipsim`, of the prompt, does).
    """

    higher_is_better = True
    reads_given = True

    def __init__(self, clip: ClipEncoder, name: str) -> None:
        super().__init__(name, unit="", scores_references=True)
        self.clip = clip

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Two values per pair, [B] each."""
        pictures = given_pictures(batch, self.name)
        own_BD = torch.cat([embed(self.clip, picture[None, None])[:, 0] for picture in pictures])
        clips = zip(self.columns, (batch.samples, batch.references), strict=True)
        return {column: 100 * (embed(self.clip, c) * own_BD[:, None]).sum(-1).mean(1) for column, c in clips}

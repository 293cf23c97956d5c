"""How true a sample is to the picture that it was made from: its first frame, and what CLIP sees in it.

Axes: B samples, F frames, C channels, H height, W width, D embedding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.clip import embed
from viditq.metrics.clip_encoder import ClipEncoder
from viditq.metrics.paired import Paired
from viditq.metrics.streaming import PerSampleMetric
from viditq.prompt import captions_of


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


LEAST_CHANGE = 1e-3  # of unit vectors, whose rounding (1e-6) would have a direction otherwise


class EditDirection(PerSampleMetric):
    """CLIP directional similarity (Gal et al. 2021): 100 x the cosine between what an edit changed and what it should.

    The change from the given picture to a frame in CLIP, against that from the text before to the text after, averaged
    over frames; 0 where nothing was changed. after: a prompt's own caption, or the prompt. before: of all prompts that
    have no caption of what their picture shows, such as "a photo".
    """

    higher_is_better = True
    reads_given = True

    def __init__(self, clip: ClipEncoder, name: str, before: str | None = None) -> None:
        super().__init__(name, unit="", scores_references=True)
        self.clip, self.before = clip, before

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Two values per pair, [B] each."""
        pictures = given_pictures(batch, self.name)
        own_BD = torch.cat([embed(self.clip, picture[None, None])[:, 0] for picture in pictures])
        wanted_BD = F.normalize(self._wanted(batch.prompts), dim=-1)
        clips = zip(self.columns, (batch.samples, batch.references), strict=True)
        changed = {column: self._change(c, own_BD) for column, c in clips}
        return {column: 100 * (found * wanted_BD[:, None]).sum(-1).mean(1) for column, found in changed.items()}

    def _change(self, clips_BFCHW: Tensor, own_BD: Tensor) -> Tensor:
        """The direction from the given picture to each frame, [B, F, D]; next to nothing where there is no change."""
        return F.normalize(embed(self.clip, clips_BFCHW) - own_BD[:, None], dim=-1, eps=LEAST_CHANGE)

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError where it is not known what a picture shows, or an edit changes nothing of it."""
        self._texts(prompts)

    def _wanted(self, prompts: list[str]) -> Tensor:
        """What the texts say should change, [B, D]."""
        before, after = zip(*self._texts(prompts), strict=True)
        return self.clip.texts([*after]) - self.clip.texts([*before])

    def _texts(self, prompts: list[str]) -> list[tuple[str, str]]:
        texts = [(self._before(prompt), captions_of(prompt).get("after", str(prompt))) for prompt in prompts]
        if same := [after for before, after in texts if before == after]:
            raise UserError(f"{self.name}: the text before and after the edit is the same, {same[0][:60]!r}.")
        return texts

    def _before(self, prompt: str) -> str:
        found = captions_of(prompt).get("before", self.before)
        if found is None:
            raise UserError(
                f"{self.name} wants to know what the given picture shows, and {prompt[:60]!r} does not say it. Name "
                "columns of the table that do (data.captions={before: COLUMN, after: COLUMN}), give one text for all "
                '(before="a photo" of this metric), or leave the metric out.'
            )
        return found

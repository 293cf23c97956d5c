"""Scores that people's judgement was put into, read from CLIP: preference, quality and beauty of frames.

Axes: B clips, F frames, C channels, H height, W width, D embedding.
"""

from itertools import pairwise

from torch import Tensor, nn

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.clip import SIDES, embed_side
from viditq.metrics.clip_encoder import ClipEncoder
from viditq.metrics.streaming import PerSampleMetric
from viditq.metrics.weights import fill, read_weights

AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_ORIGIN = f"{AESTHETIC_FILE} from the christophschuhmann/improved-aesthetic-predictor repository on GitHub"
AESTHETIC_OFFLINE = "metric=clip_iqa needs a CLIP model only."
PAIR_SCALE = 100  # the scale of all of OpenAI's CLIP models


class ClipFrameMetric(PerSampleMetric):
    """A score of every frame from its CLIP embedding, averaged over frames; the float model's clips are scored too."""

    higher_is_better = True

    def __init__(self, clip: ClipEncoder, name: str) -> None:
        super().__init__(name, unit="", scores_references=True)
        self.clip = clip

    def score(self, frames_BFD: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B, F] of unit embeddings."""
        raise NotImplementedError

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Two values per pair, [B] each."""
        sides = zip(self.columns, SIDES, strict=True)
        frames = {column: embed_side(self.clip, batch, side) for column, side in sides}
        return {column: self.score(x_BFD, batch.prompts).double().mean(1) for column, x_BFD in frames.items()}


class ClipPreference(ClipFrameMetric):
    """PickScore (Kirstain et al. 2023) and its like: a CLIP trained to prefer what people prefer.

    The cosine of frame and prompt times the model's own scale, as it was trained.
    """

    def score(self, frames_BFD: Tensor, prompts: list[str]) -> Tensor:
        """Logits."""
        return self.clip.model.logit_scale.exp() * (frames_BFD * self.clip.texts(prompts)[:, None]).sum(-1)


class ClipIqa(ClipFrameMetric):
    """CLIP-IQA (Wang et al. 2023): the probability, 0..1, of `good` against `bad` by CLIP, as torchmetrics has it."""

    def __init__(self, clip: ClipEncoder, name: str, good: str = "Good photo.", bad: str = "Bad photo.") -> None:
        super().__init__(clip, name)
        self.pair = [good, bad]

    def score(self, frames_BFD: Tensor, prompts: list[str]) -> Tensor:
        """Softmax over the two texts; the prompts are not looked at."""
        return (PAIR_SCALE * frames_BFD @ self.clip.texts(self.pair).T).softmax(-1)[..., 0]


def load_aesthetic(weights: str | None) -> nn.Module:
    """LAION's head on CLIP ViT-L/14, [..., 768] -> [..., 1], about 1..10: the layered one, or that of one layer.

    The latter is `sa_0_4_vit_l_14_linear.pth` of LAION-AI/aesthetic-predictor. Raises UserError for a file that is
    missing or another network's.
    """
    wanted_by = "the aesthetic score"
    tensors = read_weights(weights, AESTHETIC_FILE, wanted_by, AESTHETIC_OFFLINE, AESTHETIC_ORIGIN)
    if set(tensors) == {"weight", "bias"}:
        head: nn.Module = nn.Linear(tensors["weight"].shape[-1], 1)
    else:
        head = layered_head(768)
        tensors = {name.removeprefix("layers."): tensor for name, tensor in tensors.items()}
    fill(head, tensors, weights, wanted_by)
    return head.eval().requires_grad_(False)


def layered_head(width: int) -> nn.Sequential:
    """Linear layers with nothing between them but dropout (here: nothing), numbered as in the file."""
    sizes = [width, 1024, 128, 64, 16, 1]
    linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(
        linear[0], nn.Identity(), linear[1], nn.Identity(), linear[2], nn.Identity(), linear[3], linear[4]
    )


class AestheticScore(ClipFrameMetric):
    """How much people like the look of frames, about 1..10, by LAION's head on CLIP ViT-L/14."""

    def __init__(self, clip: ClipEncoder, head: nn.Module, name: str) -> None:
        super().__init__(clip, name)
        self.head = head
        wanted, found = next(p.shape[-1] for p in head.parameters()), clip.model.config.projection_dim
        if wanted != found:
            raise UserError(
                f"{name}: the head reads {wanted} values and this CLIP gives {found}. "
                "Use openai/clip-vit-large-patch14."
            )

    def score(self, frames_BFD: Tensor, prompts: list[str]) -> Tensor:
        """The head's output; the prompts are not looked at."""
        return self.head(frames_BFD)[..., 0]

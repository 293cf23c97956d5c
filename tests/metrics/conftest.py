"""Small clips, a small feature network and a small CLIP, all random from a fixed seed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from viditq.metrics.batch import EvalBatch
from viditq.metrics.clip import ClipSim, ClipTemp
from viditq.metrics.clip_encoder import load_clip
from viditq.metrics.flow import load_flow
from viditq.metrics.frechet import FrechetDistance
from viditq.metrics.lpips import Lpips, LpipsMetric
from viditq.metrics.motion import FlowScore, MotionMagnitude, TemporalFlicker, WarpingError
from viditq.metrics.paired import Paired, RelativeL2

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "green", "circle", "square", "left", "right"]
PROMPTS = [f"a {color} {shape}" for color in WORDS[5:8] for shape in WORDS[8:10]]


def smooth_clips(count: int, frames: int, size: int, generator: torch.Generator) -> Tensor:
    """Float clips in [0, 1] whose frames resemble each other, [count, frames, 3, size, size]."""
    coarse = torch.rand(count, 3, 3, 4, 4, generator=generator)
    clips = F.interpolate(coarse.transpose(1, 2), size=(frames, size, size), mode="trilinear", align_corners=True)
    return clips.transpose(1, 2)


def random_pairs(count: int, frames: int = 4, noise: float = 0.05, size: int = 20, seed: int = 0) -> EvalBatch:
    """Pairs that differ by Gaussian noise of `noise` (of 1), other clips as data; prompt numbers descend."""
    generator = torch.Generator().manual_seed(seed)
    references = smooth_clips(count, frames, size, generator)
    samples = references + noise * torch.randn(references.shape, generator=generator)
    data = smooth_clips(count, frames, size, generator)
    to_byte = lambda clips: (clips.clamp(0, 1) * 255).round().byte()  # noqa: E731
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    index = torch.arange(count).flip(0) + 100
    return EvalBatch(to_byte(samples), to_byte(references), prompts, index, to_byte(data))


def select(batch: EvalBatch, rows: list[int]) -> EvalBatch:
    """The pairs numbered `rows`."""
    prompts = [batch.prompts[i] for i in rows]
    return EvalBatch(batch.samples[rows], batch.references[rows], prompts, batch.index[rows], batch.data[rows])


class TinyFeatures(nn.Module):
    """12 random features of a clip: of its mean frame and of its mean change."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.still, self.change = nn.Linear(75, 8), nn.Linear(75, 4)

    def features(self, clips_BFCHW: Tensor) -> Tensor:
        assert clips_BFCHW.is_floating_point() and clips_BFCHW.max() <= 1
        pooled = F.adaptive_avg_pool2d(clips_BFCHW.flatten(0, 1), 5).flatten(1).unflatten(0, clips_BFCHW.shape[:2])
        return torch.cat([self.still(pooled.mean(1)), self.change(pooled.diff(dim=1).abs().sum(1))], 1).tanh()


def write_clip(folder: Path, image_size: int = 24) -> Path:
    """A folder with a random CLIPModel, a word tokenizer and its preprocessor config."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    words = [WORDS[i] for i in (0, 1, 3, 2)] + WORDS[4:]  # the end token is number 3: 2 means "old config" to CLIP
    config = CLIPConfig(
        text_config={**tower, **ends, "vocab_size": len(words), "max_position_embeddings": 8},
        vision_config={**tower, "image_size": image_size, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = CLIPModel(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 3)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    preprocess = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return folder


def random_lpips(backbone: str) -> Lpips:
    """LPIPS over a random network."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Lpips(backbone)


def every_metric(clip_folder: Path) -> dict[str, Metric]:
    """One of each, as conf/metric builds them."""
    clip, flow = load_clip(str(clip_folder)), load_flow("farneback")
    return {
        "psnr": Paired(PeakSignalNoiseRatio(data_range=1.0), "PSNR", "dB", ceiling=100.0),
        "ssim": Paired(StructuralSimilarityIndexMeasure(data_range=1.0), "SSIM"),
        "relative_l2": RelativeL2("relative L2"),
        "fvd": FrechetDistance(TinyFeatures(), "reference", "FVD"),
        "fvd_data": FrechetDistance(TinyFeatures(), "data", "FVD to data"),
        "clipsim": ClipSim(clip, "CLIPSIM"),
        "clip_temp": ClipTemp(clip, "CLIP-temp"),
        "flow_score": FlowScore(flow, "flow score"),
        "motion_magnitude": MotionMagnitude(flow, "motion magnitude"),
        "flicker": TemporalFlicker("temporal flicker"),
        "warping_error": WarpingError(flow, "warping error"),
        "lpips": LpipsMetric(random_lpips("vgg"), "LPIPS"),
    }


@pytest.fixture
def pairs() -> Callable[..., EvalBatch]:
    return random_pairs


@pytest.fixture
def rows_of() -> Callable[[EvalBatch, list[int]], EvalBatch]:
    return select


@pytest.fixture
def tiny_features() -> nn.Module:
    return TinyFeatures()


@pytest.fixture
def lpips_of() -> Callable[[str], Lpips]:
    return random_lpips


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def metrics(clip_folder: Path) -> dict[str, Metric]:
    return every_metric(clip_folder)

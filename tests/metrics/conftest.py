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
from torchmetrics.audio import SignalNoiseRatio
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, VideoMAEConfig, VideoMAEModel

from viditq.metrics.batch import EvalBatch, Sound
from viditq.metrics.clip import ClipSim, ClipTemp
from viditq.metrics.clip_encoder import Preprocess, load_clip
from viditq.metrics.clip_scores import AestheticScore, ClipIqa, ClipPreference, layered_head
from viditq.metrics.dover import DoverMetric
from viditq.metrics.flow import load_flow
from viditq.metrics.frechet import FrechetDistance
from viditq.metrics.i3d import I3dFeatures
from viditq.metrics.image_reward import BlipSize, ImageReward, ImageRewardMetric
from viditq.metrics.kid import KernelDistance
from viditq.metrics.lpips import Lpips, LpipsMetric
from viditq.metrics.motion import FlowScore, MotionMagnitude, TemporalFlicker, WarpingError
from viditq.metrics.paired import Paired, RelativeL2
from viditq.metrics.sound import LogMel, Waveform
from viditq.metrics.videomae import VideoMaeFeatures

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
    return EvalBatch(
        to_byte(samples), to_byte(references), prompts, index, to_byte(data), sound=hum(count, noise, seed)
    )


def hum(count: int, noise: float = 0.05, seed: int = 0, rate: int = 8000) -> Sound:
    """A quarter of a second of two channels: each pair's own noise, and more noise of `noise` of full scale."""
    generator = torch.Generator().manual_seed(seed)
    references, more = torch.randn(2, count, 2, rate // 4, generator=generator)
    references, samples = 0.1 * references, 0.1 * references + noise * more
    to_short = lambda sound: (sound * 32768).round().clamp(-32768, 32767).short()  # noqa: E731
    return Sound(to_short(samples), to_short(references), rate)


def select(batch: EvalBatch, rows: list[int]) -> EvalBatch:
    """The pairs numbered `rows`."""
    prompts = [batch.prompts[i] for i in rows]
    sound = Sound(batch.sound.samples[rows], batch.sound.references[rows], batch.sound.rate)
    clips = batch.samples[rows], batch.references[rows]
    return EvalBatch(*clips, prompts, batch.index[rows], batch.data[rows], sound=sound)


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


def random_videomae(frames: int = 4, image_size: int = 16) -> VideoMAEModel:
    """A small one."""
    config = VideoMAEConfig(
        image_size=image_size,
        patch_size=8,
        num_frames=frames,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_mean_pooling=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return VideoMAEModel(config).eval()


def write_videomae(folder: Path, image_size: int = 16) -> Path:
    """A folder with a random VideoMAEModel and its preprocessor config."""
    random_videomae(image_size=image_size).save_pretrained(folder)
    preprocess = {
        "image_processor_type": "VideoMAEImageProcessor",
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return folder


def random_image_reward(clip_folder: Path) -> ImageReward:
    """A small one, over the word tokenizer of the random CLIP."""
    size = BlipSize(16, 8, 16, 2, 2, 16, 2, 2, len(WORDS))
    with torch.random.fork_rng():
        torch.manual_seed(6)
        network = ImageReward(size, load_clip(str(clip_folder)).tokenizer)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def random_head(width: int = 16) -> nn.Module:
    """An aesthetic head."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return layered_head(width).eval()


class LevelsOverTime(nn.Module):
    """In place of I3D's TorchScript: the level of each colour in each eighth of the clip."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert rescale and resize and return_features and x.shape[1:3] == (3, 16) and x.max() > 1
        return F.adaptive_avg_pool3d(x / 255, (8, 1, 1)).flatten(1)


class BrightAndFine(nn.Module):
    """In place of DOVER: brightness, and contrast within frames, in the range of its scores."""

    def forward(self, clips_BFCHW: Tensor) -> dict[str, Tensor]:
        level, spread = clips_BFCHW.mean((1, 2, 3, 4)).double(), clips_BFCHW.std((3, 4)).mean((1, 2)).double()
        return {"aesthetic": level / 1000 - 0.2, "technical": spread / 1000}


class SmallFramesDover(DoverMetric):
    """The clips of these tests are smaller than DOVER's."""

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        repeat = lambda clips: clips.repeat_interleave(12, 3).repeat_interleave(12, 4)  # noqa: E731
        return super().scores(
            EvalBatch(repeat(batch.samples), repeat(batch.references), batch.prompts, batch.index, batch.data)
        )


def random_lpips(backbone: str) -> Lpips:
    """LPIPS over a random network."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Lpips(backbone)


def every_metric(clip_folder: Path) -> dict[str, Metric]:
    """One of each, as conf/metric builds them."""
    clip, flow = load_clip(str(clip_folder)), load_flow("farneback")
    videomae = VideoMaeFeatures(
        random_videomae(), nn.Identity(), Preprocess(16, 16, "bilinear", (0.5,) * 3, (0.2,) * 3)
    )
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
        "fvd_i3d": FrechetDistance(I3dFeatures(LevelsOverTime(), 16), "reference", "FVD (I3D)"),
        "fvd_videomae": FrechetDistance(videomae, "reference", "FVD (VideoMAE)"),
        "kid": KernelDistance(TinyFeatures(), "reference", "KID"),
        "kid_data": KernelDistance(TinyFeatures(), "data", "KID to data"),
        "pick_score": ClipPreference(clip, "PickScore"),
        "clip_iqa": ClipIqa(clip, "CLIP-IQA", "a red circle", "a blue square"),
        "aesthetic": AestheticScore(clip, random_head(), "aesthetic score"),
        "image_reward": ImageRewardMetric(random_image_reward(clip_folder), "ImageReward"),
        "log_mel": LogMel("log-mel distance"),
        "sound_snr": Waveform(SignalNoiseRatio(), "SNR of the sound", 100.0),
        "dover": SmallFramesDover(BrightAndFine(), "DOVER"),
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


@pytest.fixture(scope="session")
def videomae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_videomae(tmp_path_factory.mktemp("videomae"))


@pytest.fixture
def image_reward(clip_folder: Path) -> ImageReward:
    return random_image_reward(clip_folder)


@pytest.fixture
def head_of() -> Callable[[int], nn.Module]:
    return random_head


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not to be asked, as with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def metrics(clip_folder: Path) -> dict[str, Metric]:
    return every_metric(clip_folder)

"""ImageReward (Xu et al. 2023): what people prefer, by BLIP ViT-L reading a frame and its prompt together.

The official file, run by transformers' BLIP. Axes: N frames, B clips, F frames of each, C channels, H height, W width.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch, to_unit
from viditq.metrics.clip_encoder import Preprocess, located
from viditq.metrics.clip_scores import layered_head
from viditq.metrics.pretrained import not_loaded
from viditq.metrics.streaming import PerSampleMetric
from viditq.metrics.weights import fill, read_weights

FILE = "ImageReward.pt"
ORIGIN = f"{FILE} from THUDM/ImageReward (zai-org/ImageReward) on the Hugging Face hub"
OFFLINE = "metric=pick_score and metric=clip_score need a folder with a CLIP model only."
WANTED_BY = "ImageReward"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards it was trained with
MAX_TOKENS = 35  # prompts are cut there, as in training
FRAMES_AT_ONCE = 16
PIXELS = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
RENAMED = (  # what the file calls the parts of the image tower, and transformers
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)


@dataclass(frozen=True)
class BlipSize:
    """Sizes of the towers; the defaults are those of the file."""

    image: int = 224
    patch: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocabulary: int = 30524


class ImageReward(nn.Module):
    """The reward of frames for their prompts; weights are those that `build` fills in."""

    def __init__(self, size: BlipSize, tokenizer: Any) -> None:
        super().__init__()
        vision = BlipVisionConfig(
            hidden_size=size.vision_width,
            intermediate_size=4 * size.vision_width,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=size.vision_heads,
            image_size=size.image,
            patch_size=size.patch,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.text_width,
            encoder_hidden_size=size.vision_width,
            intermediate_size=4 * size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_heads,
        )
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.head = layered_head(size.text_width)
        self.tokenizer = tokenizer
        self.preprocess = Preprocess.from_config({"size": size.image, **PIXELS})
        self.eval().requires_grad_(False)

    def forward(self, frames_NCHW: Tensor, prompts: list[str]) -> Tensor:
        """Frames in [0, 1], a prompt for each -> rewards [N], about -2..2."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS)
        ids, mask = (torch.tensor(tokens[key], device=frames_NCHW.device) for key in ("input_ids", "attention_mask"))
        seen = self.vision(pixel_values=self.preprocess(frames_NCHW)).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0])[:, 0] - MEAN) / STD


def build(tensors: dict[str, Tensor], tokenizer: Any, size: BlipSize, file: str | None) -> ImageReward:
    """Fill the network from the names of the file; UserError if any of them is missing or has another shape."""
    network = ImageReward(size, tokenizer)
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.layers.": {}}
    for name, tensor in tensors.items():
        for prefix, part in parts.items():
            if name.startswith(prefix) and not name.endswith("position_ids"):
                part[_renamed(name.removeprefix(prefix))] = tensor
    for module, part in zip((network.vision, network.text, network.head), parts.values(), strict=True):
        fill(module, part, file, WANTED_BY)
    return network


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def load_image_reward(weights: str | None, tokenizer: str = "google-bert/bert-base-uncased") -> ImageReward:
    """ImageReward from its file; `tokenizer`: a folder or hub id of BERT's. UserError if either cannot be read."""
    tensors = read_weights(weights, FILE, WANTED_BY, OFFLINE, ORIGIN)
    source = located(tokenizer)
    try:
        words = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(not_loaded(f"The tokenizer of {WANTED_BY}", source, error, OFFLINE)) from error
    return build(tensors, words, BlipSize(), weights)


class ImageRewardMetric(PerSampleMetric):
    """ImageReward of a sample, mean over frames; the float model's clips are scored as well."""

    higher_is_better = True

    def __init__(self, network: ImageReward, name: str) -> None:
        super().__init__(name, unit="", scores_references=True)
        self.network = network

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Two values per pair, [B] each."""
        clips = zip(self.columns, (batch.samples, batch.references), strict=True)
        return {column: self._of(clip, batch.prompts) for column, clip in clips}

    def _of(self, clips_BFCHW: Tensor, prompts: list[str]) -> Tensor:
        frames = to_unit(clips_BFCHW).flatten(0, 1).split(FRAMES_AT_ONCE)
        each = [prompt for prompt in prompts for _ in range(clips_BFCHW.shape[1])]
        starts = range(0, len(each), FRAMES_AT_ONCE)
        rewards = [self.network(x, each[i : i + FRAMES_AT_ONCE]) for x, i in zip(frames, starts, strict=True)]
        return torch.cat(rewards).view(clips_BFCHW.shape[:2]).double().mean(1)

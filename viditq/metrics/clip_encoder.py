"""A CLIP model that turns frames and prompts into unit vectors, from a folder or the hub.

Frames are resized in torch as preprocessor_config.json says: the processors of transformers want PIL images
or torchvision.
Axes: N frames or prompts, C channels, H height, W width, D embedding.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from viditq.assets import resolve
from viditq.errors import UserError
from viditq.metrics.pretrained import from_pretrained, not_loaded

FRAMES_AT_ONCE = 64  # bounds memory, and is faster than more on a CPU
OFFLINE = (
    "Give shipped:NAME (shipped:clip knows moving shapes), a folder with CLIPModel, tokenizer and "
    "preprocessor_config.json, or a hub id."
)
_loaded: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()  # frozen, so that metrics may share it
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class Preprocess:
    """Pixels for the image tower: shortest edge to `edge` px, centre crop to `crop` px, (x - mean) / std."""

    edge: int
    crop: int
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any], resample: int = 3) -> "Preprocess":
        """Read a preprocessor_config.json; raises KeyError where it does not say enough.

        `resample`: PIL's number where the file has none.
        """
        edge, crop = _edge(config["size"]), _edge(config.get("crop_size", config["size"]))
        if crop > edge:
            raise UserError(f"preprocessor_config.json crops {crop} px of {edge} px. Make crop_size at most size.")
        mode = RESAMPLE[config.get("resample", resample)]
        return cls(edge, crop, mode, tuple(config["image_mean"]), tuple(config["image_std"]))

    def __call__(self, frames_NCHW: Tensor) -> Tensor:
        """Frames in [0, 1], any size, as the image tower wants them."""
        height, width = frames_NCHW.shape[-2:]
        scale = self.edge / min(height, width)
        size = [max(self.edge, int(height * scale)), max(self.edge, int(width * scale))]
        x = F.interpolate(frames_NCHW, size=size, mode=self.mode, antialias=True).clamp(0, 1)
        top, left = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        x = x[..., top : top + self.crop, left : left + self.crop]
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


def _edge(size: int | dict[str, int]) -> int:
    """The side in pixels from any form of CLIP configs: a number, shortest_edge, or height (= width)."""
    if isinstance(size, int):
        return size
    return size["shortest_edge"] if "shortest_edge" in size else size["height"]


class ClipEncoder(nn.Module):
    """Unit embeddings of frames and prompts.

    A prompt longer than the text tower reads raises UserError, unless `truncate` allows to cut it.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, preprocess: Preprocess, truncate: bool
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.preprocess, self.truncate = tokenizer, preprocess, truncate

    def images(self, frames_NCHW: Tensor) -> Tensor:
        """Frames in [0, 1] as unit vectors [N, D]."""
        chunks = [
            self.model.vision_model(pixel_values=self.preprocess(chunk)).pooler_output
            for chunk in frames_NCHW.split(FRAMES_AT_ONCE)
        ]
        return F.normalize(self.model.visual_projection(torch.cat(chunks)), dim=-1)

    def texts(self, prompts: list[str]) -> Tensor:
        """Prompts as unit vectors [N, D]."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            prompts, padding=True, truncation=self.truncate, max_length=limit if self.truncate else None
        )
        longest = len(tokens["input_ids"][0])
        if longest > limit:
            raise UserError(
                f"A prompt has {longest} tokens and CLIP reads {limit}. Shorten it, or allow cutting it: "
                "truncate=true for this CLIP."
            )
        ids, mask = (torch.tensor(tokens[key], device=self.model.device) for key in ("input_ids", "attention_mask"))
        self._refuse_other_end(ids)
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def _refuse_other_end(self, ids_NL: Tensor) -> None:
        """CLIP reads a prompt at its end token, and silently elsewhere if the tokenizer has another one."""
        expected, end = self.model.config.text_config.eos_token_id, self.tokenizer.eos_token_id
        # Old configs say 2 whatever the tokenizer; transformers then reads at the highest id.
        found = ids_NL.amax(1) == end if expected == 2 else ((ids_NL == expected) & (ids_NL == end)).any(1)
        if not found.all():
            raise UserError(
                f"CLIP reads prompts at token {'of the highest id' if expected == 2 else expected}, but its "
                f"tokenizer ends them with {end} or not at all. Make eos_token_id of both agree and let the "
                "tokenizer add it."
            )


def load_clip(model: str, truncate: bool = False, processor: str | None = None) -> ClipEncoder:
    """Load CLIP from `shipped:NAME`, a folder, or a hub id; raises UserError if it cannot be read.

    `processor`: where the tokenizer and preprocessor_config.json are, if not with the model. Encoders of the same
    model share its weights.
    """
    source, texts_and_pixels = located(model), located(processor or model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(texts_and_pixels)
        preprocess = read_preprocess(texts_and_pixels)
    except (OSError, ValueError) as error:
        raise UserError(not_loaded("CLIP", texts_and_pixels, error, OFFLINE)) from error
    network = _loaded.get(source)
    if network is None:
        network = _loaded[source] = from_pretrained(CLIPModel, source, "CLIP", OFFLINE)
    return ClipEncoder(network, tokenizer, preprocess, truncate)


def located(model: str) -> str:
    """The folder of `shipped:NAME` or of a path that exists, else the hub id itself."""
    local = model.startswith("shipped:") or Path(model).expanduser().is_dir()
    return str(resolve(model)) if local else model


def read_preprocess(source: str, resample: int = 3) -> Preprocess:
    """preprocessor_config.json of a folder or hub id; OSError without one, UserError where it says too little."""
    config, _ = ImageProcessingMixin.get_image_processor_dict(source)
    try:
        return Preprocess.from_config(config, resample)
    except KeyError as error:
        raise UserError(f"{source}: preprocessor_config.json lacks {error}.") from error

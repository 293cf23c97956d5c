"""The captions of all scenes as a training draws them: embedded once, some replaced by the empty prompt."""

import torch
from torch import Tensor
from transformers import T5EncoderModel

from viditq.data.moving_shapes import SCENES
from viditq.tiny.text import encode, encode_null, t5_tokenizer
from viditq.tiny.trainee import Batch

CAPTION_DROPOUT = 0.1


def text_table(encoder: T5EncoderModel, video: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of all captions, then of the empty prompt [S + 1, T, D]; masks [S + 1, T]; the last row's number."""
    tokenizer = t5_tokenizer()
    text = encode(encoder, tokenizer, [s.caption(video) for s in SCENES])
    null, null_mask = encode_null(encoder, tokenizer, text.shape[1])
    mask = torch.cat([torch.ones(len(text), text.shape[1]), null_mask.float()])
    return torch.cat([text, null]), mask, torch.tensor(len(text))


def draw_captions(table: tuple[Tensor, Tensor, Tensor], scenes: Tensor, generator: torch.Generator) -> Batch:
    """Caption embeddings and masks of the scenes, some replaced by the empty prompt."""
    text, mask, null = table
    dropped = torch.rand(len(scenes), generator=generator) < CAPTION_DROPOUT
    rows = torch.where(dropped, null, scenes)
    return {"text": text[rows], "mask": mask[rows]}

"""How far the embeddings of a quantized text encoder are from the float encoder's.

Legend: 1 a batch of one, L tokens, D channels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from viditq.models.text import PromptEmbeds

Errors = dict[str, dict[str, float]]


def embedding_errors(quantized: PromptEmbeds, exact: PromptEmbeds) -> Errors:
    """Name of an embedding -> relative_l2, ||q - f|| / ||f||, and cosine, the mean over its tokens.

    Tokens that a mask of the same prompt leaves out are not counted. Names are those of the pipeline's arguments.
    """
    return {
        name: _error(quantized[name][_counted(name, exact)].double(), exact[name][_counted(name, exact)].double())
        for name, tensor in exact.items()
        if tensor.is_floating_point() and name in quantized
    }


def _counted(name: str, embeds: PromptEmbeds) -> Tensor:
    """Of an embedding [1, L, D], the tokens [1, L] that count; of another, all of it."""
    tensor, negative = embeds[name], name.startswith("negative_")
    for other, mask_1L in embeds.items():
        belongs = "mask" in other and other.startswith("negative_") == negative
        if belongs and tensor.ndim == 3 and mask_1L.shape == tensor.shape[:2]:
            return mask_1L.bool()
    return torch.ones(tensor.shape[:-1], dtype=torch.bool)


def _error(quantized: Tensor, exact: Tensor) -> dict[str, float]:
    """Of tokens [n, D]. Both zero: no error."""
    difference, size = (quantized - exact).norm(), exact.norm()
    relative = difference / size if size else difference
    cosine = torch.cosine_similarity(quantized, exact, dim=-1, eps=1e-30)
    same = (quantized == exact).all(-1)
    return {"relative_l2": float(relative), "cosine": float(torch.where(same, 1.0, cosine).mean())}


def mean_errors(errors: Sequence[Mapping[str, Mapping[str, float]]]) -> Errors:
    """Name of an embedding -> mean of both over prompts, and the worst prompt's."""
    found: Errors = {}
    for name in errors[0]:
        relative = [each[name]["relative_l2"] for each in errors]
        cosine = [each[name]["cosine"] for each in errors]
        found[name] = {
            "relative_l2": sum(relative) / len(relative),
            "cosine": sum(cosine) / len(cosine),
            "worst_relative_l2": max(relative),
            "worst_cosine": min(cosine),
        }
    return found

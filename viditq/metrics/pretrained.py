"""Models of transformers from a folder or the hub, whole or not at all."""

from typing import Any

import torch
from torch import nn

from viditq.errors import UserError


def from_pretrained(kind: Any, model: str, wanted_by: str, offline: str) -> nn.Module:
    """`kind.from_pretrained(model)` in float32, frozen; UserError if it cannot be read or lacks weights.

    transformers would draw the weights that a checkpoint lacks at random.
    """
    try:
        # Weights stored in half precision would run in it, six times slower on a CPU.
        network, loading = kind.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(not_loaded(wanted_by, model, error, offline)) from error
    if loading["missing_keys"]:
        names = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"{wanted_by}: {model!r} is another model, it lacks {names}. {offline}")
    return network.eval().requires_grad_(False)


def not_loaded(wanted_by: str, model: str, error: Exception, offline: str) -> str:
    """The message for a model that is neither in its folder nor in the cache nor on a hub that can be reached."""
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return (
        f"{wanted_by}: {model!r} cannot be loaded: {reason}. Without network, download it elsewhere "
        f"(hf download {model} --local-dir FOLDER) and give the folder. {offline}"
    )

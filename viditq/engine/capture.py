"""The arguments of a denoiser's forward, as the sampling loop of a pipeline makes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from viditq.models.adapter import ModelAdapter
from viditq.models.generate import denoise, group_by_shape
from viditq.models.text import PromptEmbeds


@dataclass(frozen=True)
class Call:
    """One call of a denoiser: which part of the pipeline, its arguments, how many prompts are sampled by it.

    inference_mode: torch's; else no_grad, where what is called cannot do with it.
    """

    part: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_prompts: int
    inference_mode: bool = True

    def on(self, denoiser: nn.Module) -> Any:
        """The same call of another denoiser of the same model (as `ModelAdapter.denoiser_of` gives it)."""
        called: nn.Module = denoiser[self.part] if isinstance(denoiser, nn.ModuleDict) else denoiser
        with torch.inference_mode() if self.inference_mode else torch.no_grad():
            return called(*self.args, **self.kwargs)


class _Seen(Exception):
    """Ends the sampling loop at the call that was wanted."""


def first_call(
    adapter: ModelAdapter,
    pipeline: Any,
    embeds: Sequence[PromptEmbeds],
    indices: Sequence[int],
    seed: int,
    inference_mode: bool = True,
) -> Call:
    """The first call of a denoiser while the prompts of a batch are sampled, at most at once as can be.

    embeds, indices: of the batch; of prompts whose embeddings differ in shape the largest group is sampled.
    inference_mode: as of Call.
    """
    group = max(group_by_shape(adapter, list(embeds)), key=len)
    seen: list[Call] = []

    def stop(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(Call(name, args, kwargs, len(group), inference_mode))
            raise _Seen

        return hook

    handles = [
        getattr(pipeline, name).register_forward_pre_hook(stop(name), with_kwargs=True, prepend=True)
        for name in adapter.denoiser_names
    ]
    try:
        with torch.inference_mode() if inference_mode else torch.no_grad():
            denoise(adapter, pipeline, [embeds[i] for i in group], [indices[i] for i in group], seed)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]

"""Pipelines whose call takes no embeddings: what `encode_prompt` returned is kept, and given back to the call."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from viditq.errors import UserError
from viditq.models import replay
from viditq.models.generate import group_by_shape
from viditq.models.guess import guess_settings


class Packed:
    """A pipeline that encodes a prompt and, unless it is short, a second text, into more than tensors."""

    def __init__(self) -> None:
        self.transformer = nn.Identity()

    def encode_prompt(self, prompt: str, height: int) -> tuple[Any, ...]:
        if not prompt:
            raise ValueError("no text")
        return torch.full((1, 2), float(len(prompt))), [torch.zeros(()), None], {"tuple": (height, 0.5, "x")}["tuple"]

    def __call__(self, prompt: str = "", height: int = 8, num_inference_steps: int = 2) -> Any:
        found = [self.encode_prompt(prompt, height)]
        if len(prompt) > 2:
            found.append(self.encode_prompt(prompt=prompt[:1], height=height))
        return self.transformer(found) if height > 1 else found


@pytest.fixture
def adapter() -> Any:
    settings = {"encode": {}, "call": {}, "guidance_argument": "guidance_scale", "guidance_scale": None, "width": None}
    return SimpleNamespace(
        **settings,
        **{"num_steps": 2, "height": 4, "modality": "image", "conditioning": "text", "negative_prompt": None},
        **{"pipeline": "Packed", "denoiser_names": ["transformer"]},
    )


@pytest.mark.parametrize("prompt", ["ab", "abc", 'a "b" – ü'])
def test_what_is_given_back_is_what_was_returned(adapter: Any, prompt: str) -> None:
    pipeline = Packed()
    kept = replay.record(adapter, pipeline, prompt)
    assert all(isinstance(value, torch.Tensor) for value in kept.values()) and replay.are_among(kept)
    expected = pipeline(prompt, 4)
    assert len(expected) == (2 if len(prompt) > 2 else 1)  # and the pipeline is as it was
    with replay.given_back(pipeline, kept) as text:
        assert text == {"prompt": prompt}
        found = pipeline(**text, height=2)
    assert repr(found) == repr(expected)
    assert len(group_by_shape(adapter, [kept, kept])) == 2


def test_what_cannot_be_encoded(adapter: Any) -> None:
    with pytest.raises(UserError, match="Packed cannot encode '': no text"):
        replay.record(adapter, Packed(), "")
    adapter.height = 1
    with pytest.raises(UserError, match=r"Packed calls none of its denoisers \['transformer'\]; set model\.denoisers"):
        replay.record(adapter, Packed(), "ab")


@pytest.mark.parametrize(("pipeline", "count"), [("Ideogram4Pipeline", 4), ("BriaFiboPipeline", 7)])
def test_a_call_without_embeddings_is_known_by_its_signature(pipeline: str, count: int) -> None:
    found = guess_settings({"_class_name": pipeline, "transformer": ["diffusers", "X"]})
    assert found["encode_outputs"] == [None] * count and found["encode"].keys() <= {"clean_caption"}

"""Which arguments carry text: by what `encode_prompt` hands on, not by how its source is written."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from zoo import guided, images, unlisted, videos

from viditq.models import measured_text
from viditq.models.guess import guess_settings
from viditq.models.made_up_text import Returned, embeddings, handed_on, marks_in
from viditq.models.measured_text import measured_outputs
from viditq.models.trial import returned_text


class Unreadable:
    """Neither its return statement nor its call's assignment names what is returned."""

    def encode_prompt(
        self,
        prompt: Any,
        num_images_per_prompt: int = 1,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        prompt_embeds_mask: Any = None,
    ) -> Any:
        count = num_images_per_prompt
        found = [pooled_prompt_embeds.repeat(count, 1), prompt_embeds.repeat(count, 1, 1).half()]
        return tuple([*found, prompt_embeds_mask.repeat(count, 1).bool(), torch.zeros(3)])

    def __call__(self, prompt_embeds: Any, pooled_prompt_embeds: Any, prompt_embeds_mask: Any) -> None:
        parts = self.encode_prompt("")
        del parts


class Layers:
    """Prompts along the second axis, behind an encoder's layers; of lists."""

    def encode_prompt(self, prompt: Any, num_videos_per_prompt: int = 1, prompt_embeds: Any = None) -> Any:
        assert prompt_embeds.ndim == 4
        return prompt_embeds.repeat(1, num_videos_per_prompt, 1, 1)

    def __call__(self, prompt_embeds: Any) -> None: ...


def test_what_comes_back_is_known_by_what_was_given() -> None:
    assert handed_on(Unreadable(), {}) == [
        Returned("pooled_prompt_embeds", 0),
        Returned("prompt_embeds", 0),
        Returned("prompt_embeds_mask", 0),
        Returned(None, None),
    ]
    assert handed_on(Layers(), {}) == [Returned("prompt_embeds", 1)]

    def fails(prompt: str, prompt_embeds: Any = None) -> None:
        raise ValueError

    assert handed_on(SimpleNamespace(encode_prompt=fails, __call__=fails), {}) is None


@pytest.mark.parametrize(
    ("found", "outputs"),
    [
        (None, ["prompt_embeds", "prompt_attention_mask"]),
        ([Returned("prompt_embeds", 0), Returned(None, 0)], ["prompt_embeds", "prompt_attention_mask"]),
        (
            [Returned("pooled_prompt_embeds", 0), Returned("prompt_embeds", 0)],
            ["pooled_prompt_embeds", "prompt_embeds"],
        ),
        ([Returned("prompt_embeds", 0)], ["prompt_embeds"]),
        ([Returned(None, 0)], ["prompt_embeds", "prompt_attention_mask"]),
    ],
)
def test_what_is_measured_goes_before_what_is_read(
    found: Any, outputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_text, "returned_text", lambda adapter: found)
    read = SimpleNamespace(encode_outputs=["prompt_embeds", "prompt_attention_mask"], pipeline="PixArtAlphaPipeline")
    assert measured_outputs(read) == outputs


@pytest.mark.parametrize("build", [images.sana, videos.ltx_video, unlisted.chroma, guided.krea2])
def test_of_real_pipelines_both_agree(build: Callable[[], Any], configure: Any, folder_of: Any) -> None:
    adapter = instantiate(configure("model=diffusers", "name=x", f"model.path='{folder_of(build)}'").model)
    read = guess_settings(adapter.index())["encode_outputs"]
    assert adapter.encode_outputs == read
    assert [one.name for one in returned_text(adapter) or ()] == read


def test_marks_are_seen_where_embeddings_went() -> None:
    adapter = SimpleNamespace(encode_outputs=["prompt_embeds", "pooled_prompt_embeds"], pipeline="FluxPipeline")
    adapter.list_embeds = False
    one, other = embeddings(adapter, marked=True)
    assert marks_in(torch.cat([one[0], other]), 2) == [0, 1] and marks_in([other], 2) == [1]
    assert marks_in(torch.arange(9.0), 2) == [] and not any(value.any() for value in embeddings(adapter))

"""Which arguments carry text: by what `encode_prompt` hands on, not by how its source is written."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from zoo import families, guided, images, unlisted, videos, videos_2026

from viditq.errors import UserError
from viditq.models import batch_axis, measured_text
from viditq.models.generate import _stack, generate, group_by_shape
from viditq.models.guess import guess_settings
from viditq.models.made_up_text import Returned, embeddings, handed_on, marks_in
from viditq.models.measured_text import measured_outputs
from viditq.models.schedulers import make_scheduler
from viditq.models.text import encode_prompt
from viditq.models.trial import confirmed_text, returned_text


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


class Beside:
    """An encoder's layers beside plain embeddings, as HiDream's."""

    def encode_prompt(
        self,
        prompt: Any,
        num_images_per_prompt: int = 1,
        prompt_embeds_t5: Any = None,
        prompt_embeds_llama3: Any = None,
    ) -> Any:
        assert (prompt_embeds_t5.ndim, prompt_embeds_llama3.ndim) == (3, 4)
        count = num_images_per_prompt
        return prompt_embeds_t5.repeat(count, 1, 1), prompt_embeds_llama3.repeat(1, count, 1, 1)

    def __call__(self, prompt_embeds_t5: Any, prompt_embeds_llama3: Any) -> None: ...


def test_what_comes_back_is_known_by_what_was_given() -> None:
    assert handed_on(Unreadable(), {}) == [
        Returned("pooled_prompt_embeds", 0),
        Returned("prompt_embeds", 0),
        Returned("prompt_embeds_mask", 0),
        Returned(None, None),
    ]
    assert handed_on(Layers(), {}) == [Returned("prompt_embeds", 1)]
    assert handed_on(Beside(), {}) == [Returned("prompt_embeds_t5", 0), Returned("prompt_embeds_llama3", 1)]

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


def test_names_are_confirmed_by_where_the_calls_arguments_go(configure: Any, folder_of: Any) -> None:
    """Kandinsky 5's `encode_prompt` takes no embeddings; its lengths in a row reach no denoiser."""
    own = (f"model.path='{folder_of(families.kandinsky5)}'", "model.height=1024", "model.width=1024")
    adapter = instantiate(configure("model=diffusers", "name=x", "model.num_steps=1", *own).model)
    assert returned_text(adapter) is None and confirmed_text(adapter, make_scheduler(adapter)) == [0, 1]
    object.__setattr__(adapter, "encode_outputs", [*adapter.encode_outputs[1::-1], adapter.encode_outputs[2]])
    assert confirmed_text(adapter, make_scheduler(adapter)) == []


def test_the_batch_is_the_one_axis_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiDream's Llama: the layers come first. A single token is measured, lengths in a row are alone."""
    found = [Returned("layers", 1), Returned("short", 0), Returned("other", None)]
    monkeypatch.setattr(batch_axis, "returned_text", lambda adapter: found)
    monkeypatch.setattr(batch_axis, "_measured", {})
    names = ["layers", "short", "other"]
    adapter: Any = SimpleNamespace(path="a", revision="b", pipeline="c", encode_outputs=names, conditioning="text")
    adapter.list_embeds = False
    shapes = {"layers": (4, 1, 3, 2), "pooled": (1, 2), "short": (1, 1, 2), "negative_short": (1, 1, 2)}
    embeds = [{name: torch.full(shape, float(i)) for name, shape in shapes.items()} for i in range(2)]
    both = _stack(adapter, embeds)
    assert {name: tuple(value.shape) for name, value in both.items()} == {
        **{"layers": (4, 2, 3, 2), "pooled": (2, 2), "short": (2, 1, 2), "negative_short": (2, 1, 2)},
    }
    assert both["layers"][:, 0].sum() == 0 and both["layers"][:, 1].min() == 1
    assert group_by_shape(adapter, embeds) == [[0, 1]]
    for untold in ((2,), (1, 1, 2)):
        assert group_by_shape(adapter, [one | {"other": torch.zeros(untold)} for one in embeds]) == [[0], [1]]
    adapter.list_embeds = True
    assert group_by_shape(adapter, [one | {"other": torch.zeros(1, 1, 2)} for one in embeds]) == [[0, 1]]


def test_lengths_in_a_row_are_joined_as_the_pipeline_joins_them(configure: Any, folder_of: Any) -> None:
    """Kandinsky 5: two clips made together are those made one by one, by a denoiser that sees both at once."""
    size = ("model.height=32", "model.width=32", "model.num_frames=5", "model.num_steps=2", "model.dtype=float32")
    path = f"model.path='{folder_of(videos_2026.kandinsky5)}'"
    adapter = instantiate(configure("model=kandinsky5", "name=x", path, *size).model, _convert_="all")
    texts, text_part, pipeline = ["a small red circle", "a large blue square"], adapter.load_text_part(), adapter.load()
    embeds = [encode_prompt(adapter, text_part, text) for text in texts]
    theirs = dict(zip(adapter.encode_outputs, text_part.encode_prompt(texts, **adapter.encode), strict=True))
    ours = _stack(adapter, embeds)
    assert ours["prompt_cu_seqlens"].tolist() == theirs["prompt_cu_seqlens"].tolist() and len(theirs) == 3
    sizes = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    both = generate(adapter, pipeline, embeds, [3, 4], 0).float()
    alone = [generate(adapter, pipeline, [one], [i], 0).float() for one, i in zip(embeds, (3, 4), strict=True)]
    assert sizes == [2] * 4 + [1] * 8  # two steps, with guidance
    assert (both - torch.cat(alone)).abs().max() <= 1 and (both[0] - both[1]).abs().max() > 1


def test_a_batch_that_becomes_fewer_samples_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viditq.models.generate._made", lambda *_: (torch.zeros(1, 3, 8, 8),))
    adapter: Any = SimpleNamespace(pipeline="P", modality="image", list_embeds=False, makes_sound=False)
    embeds = [{"prompt_embeds": torch.zeros(1, 4, 2)}] * 2
    with pytest.raises(UserError, match=r"P makes 1 samples of 2 prompts\. Set batch_size=1"):
        generate(adapter, SimpleNamespace(), embeds, [0, 1], 0)


def test_marks_are_seen_where_embeddings_went() -> None:
    adapter = SimpleNamespace(encode_outputs=["prompt_embeds", "pooled_prompt_embeds"], pipeline="FluxPipeline")
    adapter.list_embeds = False
    one, other = embeddings(adapter, marked=True)
    assert marks_in(torch.cat([one[0], other]), 2) == [0, 1] and marks_in([other], 2) == [1]
    assert marks_in(torch.arange(9.0), 2) == [] and not any(value.any() for value in embeddings(adapter))

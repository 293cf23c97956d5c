"""The adapter and the sampling loop it drives, on both shipped pipelines."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.models import generate as sampling
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import DtypeBoundary, generate, noise_generator
from viditq.models.text import check_prompts, encode_prompt, num_tokens

PROMPTS = ["a small red circle", "a large blue square", "a small green cross moving left on a black background"]


@pytest.fixture(scope="module", params=["tiny_image", "tiny_video"])
def adapter(request: pytest.FixtureRequest, configure: Callable) -> ModelAdapter:
    """Two steps of a shipped model, two frames where it has frames."""
    cfg = configure(f"model={request.param}", "model.num_steps=2", "name=x")
    return instantiate(cfg.model, _convert_="all")


@pytest.fixture(scope="module")
def pipeline(adapter: ModelAdapter) -> object:
    return adapter.load_complete()


def float_samples(adapter: ModelAdapter, pipeline: object, indices: list[int]) -> dict[int, Tensor]:
    """Prompt index -> sample before rounding to 8 bits, in [0, 1]; the prompts share one batch."""
    embeds = [encode_prompt(adapter, pipeline, "a small red circle") for _ in indices]
    out = sampling._call(adapter, pipeline, embeds, indices, 0, "pt")
    return dict(zip(indices, out, strict=True))


def test_roles_cover_every_linear(adapter: ModelAdapter) -> None:
    names = [name for name, m in adapter.build_denoiser().named_modules() if isinstance(m, nn.Linear)]
    roles = adapter.linear_roles(names)
    assert list(roles) == names
    wanted = {"spatial_attention", "cross_attention", "mlp", "float"}
    assert set(roles.values()) == wanted | ({"temporal_attention"} if adapter.modality == "video" else set())
    assert all(("attn2" in name) == (role == "cross_attention") for name, role in roles.items())
    with pytest.raises(UserError, match=r"attn1\.to_q.*model\.keep_float"):
        replace(adapter, roles={"mlp": adapter.roles["mlp"]}).linear_roles(names)


def test_structure_is_that_of_the_weights(adapter: ModelAdapter, pipeline: object) -> None:
    built, loaded = adapter.build_denoiser(), getattr(pipeline, adapter.denoiser_names[0])
    assert all(parameter.is_meta for parameter in built.parameters())
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    persistent = built.state_dict().keys()
    for name, buffer in built.named_buffers():  # those that no file restores have to be right already
        if name not in persistent:
            torch.testing.assert_close(buffer, loaded.get_buffer(name))


def test_parts_are_loaded_apart(adapter: ModelAdapter) -> None:
    text, rest = adapter.load_text_part(), adapter.load()
    denoiser = getattr(text, adapter.denoiser_names[0])
    assert text.text_encoder is not None and all(p.is_meta for p in (*denoiser.parameters(), *text.vae.parameters()))
    assert rest.text_encoder is None and rest.tokenizer is None and getattr(rest, adapter.denoiser_names[0]) is not None


def test_adapter_survives_json(adapter: ModelAdapter) -> None:
    assert ModelAdapter.from_dict(adapter.to_dict()) == adapter


def test_sample_depends_on_its_own_index_only(adapter: ModelAdapter, pipeline: object) -> None:
    alone = float_samples(adapter, pipeline, [5])[5]
    for mates in ([5, 6], [7, 6, 5]):
        together = float_samples(adapter, pipeline, mates)
        torch.testing.assert_close(together[5], alone, atol=1e-4, rtol=0)
    assert (together[6] - alone).abs().max() > 0.01


def test_prompts_of_different_length_share_a_batch(adapter: ModelAdapter, pipeline: object) -> None:
    embeds = [encode_prompt(adapter, pipeline, prompt) for prompt in PROMPTS]
    together = generate(adapter, pipeline, embeds, [0, 1, 2], seed=0)
    shape = (adapter.num_frames, 3, adapter.height, adapter.width)
    assert together.shape == (3, *shape) and together.dtype == torch.uint8
    for index, one in enumerate(embeds):
        alone = generate(adapter, pipeline, [one], [index], seed=0)[0]
        difference = (together[index].int() - alone.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.01  # rounding to 8 bits may fall either way


def test_text_and_cached_embeddings_give_the_same_picture(adapter: ModelAdapter) -> None:
    """`pipeline(prompt)`, as `load_quantized` returns it, and the runs' way through embeddings made before."""
    pipeline = sampling.with_settings(adapter, adapter.load_complete())
    for index, prompt in enumerate(PROMPTS):
        out = pipeline(prompt, generator=[noise_generator(0, index)], output_type="pt", return_dict=False)[0]
        cached = sampling._call(adapter, pipeline, [encode_prompt(adapter, pipeline, prompt)], [index], 0, "pt")
        torch.testing.assert_close(out, cached, atol=1e-5, rtol=0)


def test_a_lone_text_is_the_prompt_of_pipelines_whose_first_argument_is_an_image(adapter: ModelAdapter) -> None:
    """FLUX.2's and FLUX.1 Kontext's: findings/a_prompt_taken_for_an_image.sh."""

    editing = adapter.load()

    class Editing(type(editing)):
        def __call__(self, image: object = None, prompt: str | None = None, **settings: object) -> tuple[object, ...]:
            return image, prompt

    editing.__class__ = Editing
    pipeline, picture = sampling.with_settings(adapter, editing), object()
    assert pipeline("a circle") == (None, "a circle")
    assert pipeline(picture) == (picture, None)
    assert pipeline(picture, "a circle") == (picture, "a circle")


def test_prompt_counts_all_its_tokens(adapter: ModelAdapter, pipeline: object) -> None:
    limit = adapter.max_tokens
    check_prompts(adapter, pipeline, ["red " * (limit - 1)])  # and the end token
    with pytest.raises(UserError, match=rf"{limit + 1} tokens.*at most {limit}"):
        check_prompts(adapter, pipeline, ["red " * limit])


def test_unnamed_encoder_output_is_refused(adapter: ModelAdapter, pipeline: object) -> None:
    with pytest.raises(UserError, match=r"encode_prompt returns \d values"):
        encode_prompt(replace(adapter, encode_outputs=["prompt_embeds"]), pipeline, "a circle")


def test_noise_depends_on_seed_and_index() -> None:
    draws = {torch.randn((), generator=noise_generator(seed, i)).item() for seed in range(3) for i in range(3)}
    assert len(draws) == 9
    assert torch.randn((), generator=noise_generator(1, 2)).item() in draws


class Recorder(nn.Module):
    """Keeps the types it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.seen = {"x": x.dtype, "timestep": timestep.dtype, "mask": mask.dtype}
        return (self.linear(x),)


@pytest.mark.parametrize("outer", [torch.float32, torch.float16])
def test_dtype_boundary(outer: torch.dtype) -> None:
    denoiser = Recorder().to(torch.bfloat16)
    DtypeBoundary(denoiser, torch.bfloat16, outer)
    x, timestep, mask = torch.ones(2, 4, dtype=outer), torch.tensor([999.0]), torch.ones(2, dtype=torch.bool)
    out = denoiser(x, timestep=timestep, mask=mask, return_dict=False)[0]
    assert out.dtype == denoiser.dtype == outer and denoiser.linear.weight.dtype == torch.bfloat16
    assert denoiser.seen == {"x": torch.bfloat16, "timestep": torch.float32, "mask": torch.bool}
    for other in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert isinstance(other, Recorder) and other.dtype == outer
        assert torch.equal(other(x, timestep=timestep, mask=mask, return_dict=False)[0], out)


def test_tokens_of_a_processor_are_those_of_its_tokenizer() -> None:
    class Processor:
        """Its own first argument is a picture."""

        tokenizer = staticmethod(lambda text: {"input_ids": text.split()})

        def __call__(self, images: str) -> dict[str, list[str]]:
            raise ValueError("no picture")

    assert num_tokens(Processor(), "a red circle") == num_tokens(Processor.tokenizer, "a red circle") == 3

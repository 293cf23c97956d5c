"""Open-Sora's pipeline around a random STDiT and the other parts of tiny_video."""

import inspect

import pytest
import torch
from diffusers import AutoencoderKL
from official_files import tiny_stdit
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from viditq.assets import SHIPPED
from viditq.errors import UserError
from viditq.models.opensora_pipeline import OpenSoraPipeline
from viditq.models.samplers import SAMPLERS, is_sampler, make_sampler

SHORT, LONG = "a small red circle", "a large blue square moving left on a black background"


@pytest.fixture(scope="module")
def pipeline() -> OpenSoraPipeline:
    parts = SHIPPED / "tiny_video"
    pipeline = OpenSoraPipeline(
        tokenizer=T5Tokenizer.from_pretrained(parts / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(parts / "text_encoder", dtype=torch.float32).eval(),
        vae=AutoencoderKL.from_pretrained(parts / "vae", torch_dtype=torch.float32).eval(),
        transformer=tiny_stdit(),
        scheduler=make_sampler("ancestral"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: OpenSoraPipeline, *, seeds: list[int], **arguments: object) -> Tensor:
    settings = {"num_inference_steps": 3, "height": 32, "width": 32, "num_frames": 4, "clean_caption": False}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(**settings | {"output_type": "pt"} | arguments, generator=generators, return_dict=False)[0]


def test_clip_has_its_frames_and_does_not_depend_on_its_mates(pipeline: OpenSoraPipeline) -> None:
    """Prompts of different length in one batch go by their mask, alone without one."""
    together = call(pipeline, prompt=[SHORT, LONG], seeds=[0, 1])
    assert together.shape == (2, 4, 3, 32, 32) and together.isfinite().all() and together.std() > 0.01
    for index, prompt in enumerate([SHORT, LONG]):
        alone = call(pipeline, prompt=prompt, seeds=[index])
        torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.05


def test_embeddings_have_no_padding(pipeline: OpenSoraPipeline) -> None:
    tokens = [len(pipeline.tokenizer(prompt)["input_ids"]) for prompt in (SHORT, LONG)]
    for prompt, count in zip((SHORT, LONG), tokens, strict=True):
        embeds, mask = pipeline.encode_prompt(prompt, clean_caption=False)
        assert embeds.shape == (1, count, 96) and mask is None
    embeds, mask = pipeline.encode_prompt([SHORT, LONG], clean_caption=False)
    assert embeds.shape[1] == max(tokens) and mask is not None and mask.sum(dim=1).tolist() == tokens
    cut, _ = pipeline.encode_prompt(LONG, clean_caption=False, max_sequence_length=4)
    assert cut.shape[1] == 4


def test_null_caption_is_cut_to_the_prompt(pipeline: OpenSoraPipeline) -> None:
    """What the denoiser is handed: null captions first; giving the same ones by hand changes nothing."""
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["encoder_hidden_states"])

    handle = pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
    embeds, _ = pipeline.encode_prompt(SHORT, clean_caption=False)
    learned = call(pipeline, prompt_embeds=embeds, seeds=[0])
    null = pipeline.transformer.null_caption[:, : embeds.shape[1]]
    assert torch.equal(seen[0], torch.cat([null, embeds]))
    given = call(pipeline, prompt_embeds=embeds, negative_prompt_embeds=null, negative_prompt=None, seeds=[0])
    assert torch.equal(given, learned)
    other = call(pipeline, prompt_embeds=embeds, negative_prompt_embeds=null + 1, seeds=[0])
    assert not torch.equal(other, learned)
    seen.clear()
    call(pipeline, prompt_embeds=embeds, guidance_scale=1.0, seeds=[0])
    handle.remove()
    assert torch.equal(seen[0], embeds)


def test_each_sampler_and_guidance_makes_its_own_clip(pipeline: OpenSoraPipeline) -> None:
    latents = {
        (sampler, channels): call(
            pipeline, prompt=SHORT, sampler=sampler, guidance_channels=channels, output_type="latent", seeds=[0]
        )
        for sampler in SAMPLERS
        for channels in (3, None)
    }
    assert is_sampler(pipeline.scheduler, "dpm_solver")
    values = list(latents.values())
    assert all(v.shape == (1, 4, 4, 8, 8) for v in values)
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    again = call(pipeline, prompt=SHORT, sampler="ancestral", output_type="latent", seeds=[0])
    assert torch.equal(again, latents["ancestral", 3])


def test_scheduler_of_the_wanted_kind_is_kept(pipeline: OpenSoraPipeline) -> None:
    """So that what someone wrapped around it stays."""
    pipeline.scheduler = scheduler = make_sampler("ddim")
    call(pipeline, prompt=SHORT, sampler="ddim", seeds=[0])
    assert pipeline.scheduler is scheduler
    call(pipeline, prompt=SHORT, seeds=[0])
    assert pipeline.scheduler is scheduler
    pipeline.scheduler = make_sampler("ancestral")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": SHORT, "height": 20}, "divisible by 8"),
        ({"prompt": SHORT, "negative_prompt": "blurred"}, "learned null caption"),
        ({"prompt": SHORT, "sampler": "euler"}, "ancestral, ddim, dpm_solver"),
        ({}, "Provide either"),
        ({"prompt_embeds": torch.zeros(1, 130, 96)}, "130 tokens; the null caption has 120"),
        ({"prompt": SHORT, "seeds": [0, 1]}, "list of generators of length 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pipeline: OpenSoraPipeline, arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(pipeline, **{"seeds": [0]} | arguments)
    pipeline.scheduler = make_sampler("ancestral")


def test_cleaning_needs_its_packages(pipeline: OpenSoraPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viditq.models.opensora_pipeline.is_ftfy_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install beautifulsoup4 ftfy.*clean_caption=false"):
        pipeline.encode_prompt(SHORT)


def test_defaults_are_those_of_open_sora() -> None:
    defaults = {k: p.default for k, p in inspect.signature(OpenSoraPipeline.__call__).parameters.items()}
    wanted = {
        "num_inference_steps": 100,
        "guidance_scale": 7.0,
        "num_frames": 16,
        "height": 512,
        "guidance_channels": 3,
    }
    assert {k: defaults[k] for k in wanted} == wanted

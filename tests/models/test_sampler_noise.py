"""A sampler's noise made smaller, against the schedulers' closed forms and by drawing many samples.

Legend: x samples, e the denoiser's output, z noise; x' = f(x) + c e + s z.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.models.sampler_noise import check_shrinkable, cloned, measure, shrink_noise
from viditq.models.schedulers import check_seeded
from viditq.models.step_noise import seeded_steps

STEPS = 8
SHAPE = (64, 4, 16, 16)
LATENT = {"clip_sample": False}


def drawn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_a_pipeline_draws_without_a_generator_depends_on_the_sample_alone() -> None:
    before, pipeline = torch.get_rng_state(), SimpleNamespace(scheduler=diffusers.DDIMScheduler())
    found = []
    for seed in (1, 1, 2):
        with seeded_steps(pipeline, [torch.Generator().manual_seed(seed)]):
            found.append(torch.randn(3))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), before)


def at_step(scheduler: Any, number: int) -> tuple[Any, Tensor]:
    """The scheduler before step `number` of a trajectory, with the sample it got to, as pipelines call it."""
    scheduler.set_timesteps(STEPS)
    x = drawn(0) * scheduler.init_noise_sigma
    for i in range(number):
        t = scheduler.timesteps[i]
        scheduler.scale_model_input(x, t)
        x = scheduler.step(drawn(10 + i), t, x, generator=torch.Generator().manual_seed(i)).prev_sample
    scheduler.scale_model_input(x, scheduler.timesteps[number])
    return scheduler.timesteps[number], x


def ddpm_terms(s: Any, t: Tensor) -> tuple[float, float]:
    """Ho et al., equations 6, 7 and 11; the prediction is epsilon."""
    t = int(t)
    before = t - s.config.num_train_timesteps // STEPS
    bar, bar_before = float(s.alphas_cumprod[t]), float(s.alphas_cumprod[before])
    alpha = bar / bar_before
    small = (1 - bar_before) / (1 - bar) * (1 - alpha)
    variance = {"fixed_small": small, "fixed_large": 1 - alpha}[s.config.variance_type]
    return -(1 - alpha) / math.sqrt(alpha * (1 - bar)), math.sqrt(variance)


def ddim_terms(s: Any, t: Tensor) -> tuple[float, float]:
    """Song et al., equations 12 and 16, eta 0.8."""
    t = int(t)
    bar, bar_before = (float(s.alphas_cumprod[i]) for i in (t, t - s.config.num_train_timesteps // STEPS))
    deviation = 0.8 * math.sqrt((1 - bar_before) / (1 - bar) * (1 - bar / bar_before))
    return math.sqrt(1 - bar_before - deviation**2) - math.sqrt(bar_before * (1 - bar) / bar), deviation


def euler_terms(s: Any, t: Tensor) -> tuple[float, float]:
    """Of sigma and the next one: up^2 = next^2 (1 - next^2 / sigma^2), down^2 = next^2 - up^2."""
    now, then = (float(s.sigmas[s.index_for_timestep(t) + i]) for i in (0, 1))
    up = math.sqrt(then**2 * (1 - then**2 / now**2))
    return math.sqrt(then**2 - up**2) - now, up


def sde_terms(s: Any, t: Tensor) -> tuple[float, float]:
    """First-order SDE-DPM-Solver++ (Lu et al.) of a flow: alpha = 1 - sigma, x0 = x - sigma e."""
    i = s.index_for_timestep(t)
    now, then = float(s.sigmas[i]), float(s.sigmas[i + 1])
    h = math.log((1 - then) / then) - math.log((1 - now) / now)
    return -(1 - then) * (1 - math.exp(-2 * h)) * now, then * math.sqrt(1 - math.exp(-2 * h))


SDE = {"algorithm_type": "sde-dpmsolver++", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], tuple[float, float]], dict[str, Any]]] = {
    "ddpm": (lambda: diffusers.DDPMScheduler(**LATENT), ddpm_terms, {}),
    "ddpm_large": (lambda: diffusers.DDPMScheduler(variance_type="fixed_large", **LATENT), ddpm_terms, {}),
    "ddim": (lambda: diffusers.DDIMScheduler(**LATENT, set_alpha_to_one=False), ddim_terms, {"eta": 0.8}),
    "euler": (lambda: diffusers.EulerAncestralDiscreteScheduler(), euler_terms, {}),
    "sde": (lambda: diffusers.DPMSolverMultistepScheduler(**SDE, solver_order=1), sde_terms, {}),
}
"""Name -> scheduler, its (c, s) at a timestep, arguments of its steps."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("number", [1, 4])
def test_measured_terms_are_the_closed_forms(name: str, number: int) -> None:
    make, terms, call = CASES[name]
    scheduler = make()
    t, x = at_step(scheduler, number)

    def step(output: Tensor, generator: torch.Generator) -> Tensor:
        other = make()
        at_step(other, number)
        return other.step(output, t, x, generator=generator, return_dict=False, **call)[0]

    noise, (coefficient, deviation) = measure(step, drawn(1), x), terms(scheduler, t)
    assert noise.coefficient == pytest.approx(coefficient, rel=1e-3)
    assert float(noise.deviation.median()) == pytest.approx(deviation, rel=1e-3)
    assert float((noise.deviation - deviation).abs().max()) < 0.01 * deviation + 1e-4 * float(x.abs().max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [0.0, 0.5, 4.0])
def test_the_total_variance_is_the_samplers_own(name: str, share: float) -> None:
    """Of x' over draws of the error and of the noise; share: of the sampler's variance that the error brings."""
    make, terms, call = CASES[name]
    scheduler, number = make(), 4
    t, x = at_step(scheduler, number)
    coefficient, deviation = terms(scheduler, t)
    variance = share * (deviation / coefficient) ** 2
    plain = make()
    at_step(plain, number)
    mean = measure(
        lambda e, g: _again(make, number).step(e, t, x, generator=g, return_dict=False, **call)[0], drawn(1), x
    ).mean
    shrink_noise(scheduler, lambda: variance)
    output = drawn(1) + math.sqrt(variance) * drawn(2)
    made = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(3), **call).prev_sample
    total = float((made - mean).square().mean())
    assert total == pytest.approx(max(1.0, share) * deviation**2, rel=0.03)
    if share == 0:
        as_before = plain.step(output, t, x, generator=torch.Generator().manual_seed(3), **call).prev_sample
        torch.testing.assert_close(made, as_before, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def _again(make: Callable[[], Any], number: int) -> Any:
    scheduler = make()
    at_step(scheduler, number)
    return scheduler


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variances(variance_type: str) -> None:
    """Noise of another size at each place: the same variance is taken from each."""
    scheduler = diffusers.DDPMScheduler(variance_type=variance_type, **LATENT)
    plain = diffusers.DDPMScheduler(variance_type=variance_type, **LATENT)
    t, x, seen = 2, drawn(0), drawn(2).clamp(-1, 1)
    bars = plain.alphas_cumprod
    beta, small = 1 - bars[2] / bars[1], (1 - bars[1]) / (1 - bars[2]) * (1 - bars[2] / bars[1])
    variance = beta ** ((seen + 1) / 2) * small ** ((1 - seen) / 2)  # Nichol and Dhariwal, equation 15
    if variance_type == "learned":
        seen = variance
    error = 0.25 * float(small * bars[2] / bars[1] * (1 - bars[2]) / beta**2)  # a quarter of the least variance
    generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
    before = cloned(generators)
    shrink_noise(scheduler, lambda: error)
    made = scheduler.step(torch.cat([drawn(1), seen], 1), t, x, generator=generators).prev_sample
    as_before = plain.step(torch.cat([drawn(1), seen], 1), t, x, generator=cloned(before)).prev_sample
    z = torch.cat([torch.randn(1, *SHAPE[1:], generator=g) for g in before])
    smaller = (variance - small / 4).sqrt() - variance.sqrt()
    assert float(smaller.std()) > 1e-4, "the sizes differ"
    torch.testing.assert_close(made, as_before + smaller * z, rtol=1e-4, atol=1e-4)
    assert torch.equal(generators[0].get_state(), before[0].get_state()), "drawn from once"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddpm", "euler", "sde"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The noise is found whether the scheduler draws it in the output's dtype or in float32."""
    make, terms, call = CASES[name]
    scheduler, wide = make(), make()
    t, x = at_step(scheduler, 4)
    at_step(wide, 4)
    coefficient, deviation = terms(scheduler, t)
    for one in (scheduler, wide):
        shrink_noise(one, lambda: 0.75 * (deviation / coefficient) ** 2)
    made = scheduler.step(drawn(1).to(dtype), t, x.to(dtype), generator=torch.Generator().manual_seed(3), **call)
    assert made.prev_sample.dtype == dtype
    mean = measure(
        lambda e, g: _again(make, 4).step(e, t, x.to(dtype).float(), generator=g, return_dict=False, **call)[0],
        drawn(1).to(dtype).float(),
        x,
    ).mean
    rounding = (torch.finfo(dtype).eps * float(x.std())) ** 2
    found = float((made.prev_sample.float() - mean).square().mean())
    assert found == pytest.approx(deviation**2 / 4, rel=0.03, abs=rounding)


def test_second_order_steps_keep_their_history() -> None:
    """A whole trajectory with an error of variance 0 is the plain one: measuring leaves no trace."""
    finals = []
    for shrunk in (False, True):
        scheduler = diffusers.DPMSolverMultistepScheduler(**SDE, solver_order=2)
        scheduler.set_timesteps(STEPS)
        if shrunk:
            shrink_noise(scheduler, lambda: 0.0)
        x, generator = drawn(0, (1, 4, 8, 8)), [torch.Generator().manual_seed(5)]
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x, generator=generator, return_dict=False)[0]
        finals.append(x)
    torch.testing.assert_close(*finals, rtol=1e-4, atol=1e-4)


def test_without_a_generator_the_global_one_counts() -> None:
    made = []
    for _ in "12":
        scheduler = diffusers.DDPMScheduler(**LATENT)
        shrink_noise(scheduler, lambda: 0.0)
        torch.manual_seed(7)
        made.append(scheduler.step(drawn(1), scheduler.timesteps[400], drawn(0)).prev_sample)
    assert torch.equal(*made)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="LCMScheduler"):
        check_shrinkable(diffusers.LCMScheduler(), {})
    with pytest.raises(UserError, match="clip_sample=false"):
        check_shrinkable(diffusers.DDPMScheduler(), {})
    with pytest.raises(UserError, match="FlowMatchEuler"):
        check_shrinkable(diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {})
    assert check_shrinkable(diffusers.DDIMScheduler(**LATENT), {"eta": 0.5})
    assert not check_shrinkable(diffusers.DDIMScheduler(), {})
    assert not check_shrinkable(diffusers.FlowMatchEulerDiscreteScheduler(), {})
    assert not check_shrinkable(diffusers.DPMSolverMultistepScheduler(), {})
    scheduler = diffusers.DDPMScheduler(clip_sample_range=0.5)  # clips, unchecked
    shrink_noise(scheduler, lambda: 0.1)
    with pytest.raises(UserError, match="in proportion"):
        scheduler.step(drawn(1), scheduler.timesteps[400], drawn(0))


def test_noise_that_cannot_be_seeded_is_refused() -> None:
    check_seeded(diffusers.PixArtAlphaPipeline, diffusers.DDPMScheduler(), {})
    check_seeded(diffusers.DiTPipeline, diffusers.DDIMScheduler(), {})
    check_seeded(diffusers.DiTPipeline, diffusers.DDPMScheduler(), {})
    with pytest.raises(UserError, match="takes no generator"):
        check_seeded(diffusers.DiTPipeline, diffusers.KarrasVeScheduler(), {})

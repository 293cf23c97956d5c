"""PTQD's third part: a stochastic sampler adds less noise where the quantized denoiser's error adds some already.

A step is affine in the denoiser's output e and in its own noise z: x' = f(x) + c e + s z. If e carries an error of
variance v, s is replaced by sqrt(max(s^2 - c^2 v, 0)) (He et al., arXiv 2305.10657, equation 16). c and s are measured
on copies of the scheduler at every step, so that every variance type, prediction type and solver order is covered.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from viditq.errors import UserError
from viditq.models.schedulers import SETTING, adds_noise

SUPPORTED = (
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
NUM_DRAWS = 4
Generators = torch.Generator | list[torch.Generator]


def check_shrinkable(scheduler: Any, call: Mapping[str, Any]) -> bool:
    """Whether its steps add noise; raises UserError if they do in a way that cannot be made less."""
    if not adds_noise(scheduler, call):
        return False
    name, how = type(scheduler).__name__, "or quant.correction=ptqd_mean"
    if name not in SUPPORTED:
        raise UserError(
            f"quant.correction=ptqd makes a sampler's noise smaller, and cannot for {name}, which adds noise (or is "
            "not known not to). Choose a deterministic scheduler or one of "
            f"{', '.join(SUPPORTED)} (model.scheduler), {how}."
        )
    for key in ("clip_sample", "thresholding"):
        if scheduler.config.get(key):
            raise UserError(
                f"quant.correction=ptqd needs steps in proportion to the denoiser's output; {name} clips. "
                f"Set {SETTING}.{key}=false, {how}."
            )
    return True


def shrink_noise(scheduler: Any, variance: Callable[[], float]) -> None:
    """From now on `scheduler.step` adds less noise. variance(): of the error of the output that the step is given.

    Without a generator the noise comes from torch's global one. While sampling, UserError if a step is not affine.
    """
    plain, of_class = scheduler.step, type(scheduler).step
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        output, sample, error = given["model_output"], given["sample"], variance()
        if given.get("generator") is None:
            given["generator"] = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        rest = {k: v for k, v in given.items() if k not in ("model_output", "sample", "generator", "return_dict")}

        def again(output: Tensor, generator: torch.Generator) -> Tensor:
            arguments = {"model_output": output, "sample": sample.float(), "generator": generator, **rest}
            other = copy.deepcopy(scheduler)
            return of_class(other, **arguments, return_dict=False)[0].float()

        noise = measure(again, output.float(), sample)
        before = cloned(given["generator"])
        out = plain(**given)
        made = out[0] if isinstance(out, tuple) else out.prev_sample
        made = noise.shrunk(made, error, before, output.dtype)
        if isinstance(out, tuple):
            return (made, *out[1:])
        out.prev_sample = made
        return out

    scheduler.step = step


@dataclass(frozen=True)
class StepNoise:
    """x' = mean + deviation z (tensors shaped as the sample); coefficient: d x' / d output."""

    mean: Tensor
    deviation: Tensor
    coefficient: float

    def shrunk(self, made: Tensor, error: float, generator: Generators, dtype: torch.dtype) -> Tensor:
        """`made`, a draw of x', as if its noise were smaller. generator: as before it was drawn; dtype: of output."""
        if not bool(self.deviation.any()):
            return made
        z = self._drawn(made.float(), generator, dtype)
        smaller = (self.deviation.square() - self.coefficient**2 * error).clamp(min=0).sqrt()
        return (made.float() - (self.deviation - smaller) * z).to(made.dtype)

    def _drawn(self, made: Tensor, generator: Generators, dtype: torch.dtype) -> Tensor:
        """The noise in `made`; schedulers draw it in the output's dtype or in float32."""
        draws = [
            randn_tensor(made.shape, cloned(generator), made.device, d).float()
            for d in dict.fromkeys((dtype, torch.float32))
        ]
        left = [float((made - self.mean - self.deviation * z).norm()) for z in draws]
        best = min(range(len(draws)), key=left.__getitem__)
        rounding = torch.finfo(dtype).eps * float(self.mean.norm())
        if not left[best] <= 0.02 * float((self.deviation * draws[best]).norm()) + rounding:
            raise _not_affine()
        return draws[best]


def measure(step: Callable[[Tensor, torch.Generator], Tensor], output: Tensor, sample: Tensor) -> StepNoise:
    """How a step depends on its noise and its output, from calls with known noise. step(output, generator) -> x'."""
    made, noise = [], []
    for seed in range(NUM_DRAWS):
        made.append(step(output, _seeded(seed)))
        noise.append(randn_tensor(sample.shape, _seeded(seed), sample.device, torch.float32))
    x, z = torch.stack(made), torch.stack(noise)
    dx, dz = x - x.mean(0), z - z.mean(0)
    deviation = (dx * dz).sum(0) / dz.square().sum(0)
    off = float((dx - deviation * dz).norm())
    moved = output.clone()  # of a learned variance behind the prediction, nothing
    axis = next((i for i, (a, b) in enumerate(zip(output.shape, sample.shape, strict=True)) if a != b), 1)
    moved.narrow(axis, 0, sample.shape[axis]).add_(1.0)
    slope = step(moved, _seeded(0)) - made[0]
    coefficient, size = float(slope.mean()), 1e-5 * (1 + float(made[0].abs().max()))
    spread = float((slope - coefficient).abs().max())
    if off > 1e-3 * float(dx.norm()) + 1e-5 * float(x.norm()) or spread > 1e-3 * abs(coefficient) + size:
        raise _not_affine()
    return StepNoise(x.mean(0) - deviation * z.mean(0), deviation, coefficient)


def cloned(generator: Generators) -> Generators:
    """Generators that will draw the same, which leave these as they are."""
    if isinstance(generator, list):
        return [clone for one in generator if isinstance(clone := cloned(one), torch.Generator)]
    return torch.Generator(generator.device).set_state(generator.get_state())


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _not_affine() -> UserError:
    return UserError(
        "quant.correction=ptqd: a step of the scheduler does not depend on noise and prediction in proportion, so that "
        "its noise cannot be made smaller. Choose another model.scheduler (one that does not clip), or "
        "quant.correction=ptqd_mean."
    )

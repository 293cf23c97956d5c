"""What takes note of one call of a pipeline: the texts it encodes, what its VAE is shown, what denoisers are told.

It stands in place of `encode_prompt`, of denoisers, which predict nothing, and of the scheduler's step.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from viditq.models.made_up_text import NUM_TOKENS, embeddings, marks_in
from viditq.models.particular import STAGES

NUM_REAL = 2  # steps that the scheduler computes; then the sample stays as it is, which can be large
TIMESTEPS = ("timestep", "t", "timesteps", "time", "vision_timesteps")
"""What denoisers call the argument that tells them the noise level."""
PACKED = "vision_tokens"
"""The frames among the arguments of Cosmos 3's denoiser, whose first are the words; beside them it predicts others."""


class AllSteps(Exception):
    """What was to be recorded is; denoising, or decoding, comes next."""


@dataclass(frozen=True)
class Step:
    """told: what `denoiser` was given as `argument`. level: the scheduler's timestep, as a share of those trained on;
    where it rises from step to step (a model that counts backwards), 1 less that."""

    argument: str
    told: float
    level: float
    denoiser: str = ""


class Recorder:
    """What denoisers are told between the scheduler's steps, and which texts are encoded before.

    ranges: of each step the lowest and the highest value told; they differ where tokens that are given (a first frame)
    are told that they are clean, which is the same at every step. encoded: what the VAE is shown.
    text_only: the call ends where it begins to denoise. marked: embeddings are known again where denoisers get them;
    carried: argument of a denoiser -> which of what `encode_prompt` returns it is told. given: those that are known
    again are given to the call, in place of a text, and what `encode_prompt` returns beside them is not. honest: its
    first call is its own, which may ask for the text all the same.
    """

    def __init__(
        self,
        adapter: Any,
        scheduler: Any,
        text_only: bool = False,
        marked: bool = False,
        given: bool = False,
        honest: bool = False,
    ) -> None:
        self.honest = honest
        self.adapter, self.scheduler, self.text_only, self.marked = adapter, scheduler, text_only, marked
        self.given = given
        self.carried: dict[str, set[int]] = {}
        self.texts: list[dict[str, Any]] = []
        self.encoded: list[Tensor] = []
        self.num_train = float(scheduler.config.get("num_train_timesteps", 1000))
        self.told: list[tuple[str, str, tuple[float, float]]] = []
        self.steps: list[Step] = []
        self.ranges: list[tuple[float, float]] = []
        self.count = 0
        self.of_stage, self.stages = 0, STAGES.get(adapter.pipeline, ("", 1))[1]
        self.width = NUM_TOKENS
        self.returned = 1  # values of a step: SCM's also gives what it predicts to be clean

    def encode(self, plain: Any) -> Any:
        """In place of `encode_prompt`."""
        signature = inspect.signature(plain)

        @functools.wraps(plain)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.texts.append(signature.bind(*args, **kwargs).arguments)
            if self.honest and len(self.texts) == 1:
                return plain(*args, **kwargs)
            made = embeddings(self.adapter, marked=self.marked and not self.given, width=self.width)
            return made if len(made) > 1 else made[0]

        return recorded

    def around(self, denoiser: Any, name: str) -> Any:
        """In place of its forward: takes note, and predicts nothing."""
        forward = denoiser.forward
        signature = inspect.signature(forward)
        argument, beside = _argument(self.adapter, signature), _streams(signature)[1:]
        self.width = denoiser.config.get("text_in_dim", NUM_TOKENS)

        @functools.wraps(forward)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self.text_only:
                raise AllSteps
            given = signature.bind(*args, **kwargs).arguments
            self.told.append((name, argument, _range(given[argument])))
            if self.marked:
                count = len(self.adapter.encode_outputs)
                self.carried |= {n: self.carried.get(n, set()).union(marks_in(v, count)) for n, v in given.items()}
            if PACKED in given:
                return _prediction(given[PACKED], denoiser), None, None
            out = _prediction(next(iter(given.values())), denoiser)
            if given.get("return_dict") is not False:
                return Transformer2DModelOutput(sample=out)
            beside_it = [torch.zeros_like(given[name]) for name in beside if given.get(name) is not None]
            return (out, *beside_it, *([given["kv_cache"]] if given.get("kv_cache") is not None else []))

        return recorded

    def step(self, plain: Any) -> Any:
        """In place of the scheduler's step."""
        signature = inspect.signature(plain)

        @functools.wraps(plain)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            if not self.told:  # of a copy of the scheduler: another stream's, after the same call of the denoiser
                return (given["sample"],) if given.get("return_dict") is False else _Stepped(given["sample"])
            level = float(given["timestep"]) / self.num_train
            self.steps += [Step(argument, told[1], level, name) for name, argument, told in self.told]
            self.ranges += [told for _, _, told in self.told]
            self.told = []
            self.count += 1
            sample, out = given["sample"], given["model_output"]
            plainly = given.get("return_dict") is False
            if self.count <= NUM_REAL:
                if out.ndim == 3 or out.shape[2:] != sample.shape[2:]:  # of a denoiser that sees more than it predicts
                    given["model_output"] = torch.zeros_like(sample)
                if widened := getattr(self.scheduler, "n_grid", None):  # Piflow: several predictions side by side
                    given["model_output"] = sample.new_zeros(*sample.shape[:-1], widened * sample.shape[-1])
                stepped = plain(**given)
                self.returned = len(stepped) if plainly else 1
            else:
                stepped = (sample,) * self.returned if plainly else _Stepped(sample)
            self.of_stage += 1
            if self.of_stage == len(self.scheduler.timesteps):
                self.of_stage, self.stages = 0, self.stages - 1
            if not self.stages:
                raise AllSteps
            return stepped

        return recorded


@dataclass
class _Stepped:
    """What schedulers return with return_dict=True."""

    prev_sample: Any


def _argument(adapter: Any, signature: inspect.Signature) -> str:
    names = [adapter.timestep_argument, *TIMESTEPS]
    found = next((name for name in names if name in signature.parameters), None)
    if found is None:
        raise ValueError(f"its denoiser takes none of {', '.join(names)}")
    return found


def _streams(signature: inspect.Signature) -> list[str]:
    """The arguments that hold what is denoised: the sample, and what is made beside it (LTX-2's sound)."""
    names = [name for name, p in signature.parameters.items() if p.default is p.empty or name.startswith("audio")]
    return [name for name in names if name.endswith("hidden_states") and "encoder" not in name]


def _range(value: Any) -> tuple[float, float]:
    """The lowest and the highest; between them there is nothing in a model that samples all tokens in step."""
    values = torch.as_tensor(value, dtype=torch.float64).unique()
    if len(values) > 2:
        raise ValueError("its denoiser is told several timesteps at once")
    return float(values[0]), float(values[-1])


def _prediction(x: Any, denoiser: Any) -> Any:
    """Zeros as large as the denoiser's output: its input, of latents with `out_channels` for `in_channels`.

    Where its configuration has none (Lumina, Hunyuan-DiT: twice as many with a variance), the class knows them; what
    PRX calls so are those of a patch.
    """
    if isinstance(x, (list, tuple)):
        return [_prediction(one, denoiser) for one in x]
    shape, before = list(x.shape), denoiser.config.get("in_channels")
    known = vars(denoiser).get("out_channels")
    after = denoiser.config.get("out_channels", known if before and known in (before, 2 * before) else None)
    if len(shape) > 3 and isinstance(after, int) and before in shape[1:]:
        shape[shape.index(before, 1)] = after
    out: Tensor = x.new_zeros(shape)
    return out

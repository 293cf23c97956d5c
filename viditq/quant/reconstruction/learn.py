"""Learns the roundings of a block: ||f(x) - f^(x)||^2 + lambda sum(1 - |2 h - 1|^beta), all of its Linears at once.

f is the block of the float model, f^ the same with SoftLinears; both see the inputs that the float model gave it. The
reconstruction error counts relative to that of nearest rounding with activations in float, times the number of
weights, so that lambda means the same in every block and as in AdaRound. Learning starts from AdaRound of each weight
by itself; of nearest rounding, this start and what was learned, that with the least error on inputs held out is kept.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.files import is_whole, read_json, write_json, write_tensors
from viditq.quant.calibration.noise_level import interval_of
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.linear import QuantLinear
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.rounding.adaround import WARM_UP, beta_at
from viditq.quant.methods.rounding.block_adaround import BlockAdaRound
from viditq.quant.reconstruction.batches import Batch, Batches, outputs
from viditq.quant.reconstruction.selection import Item
from viditq.quant.reconstruction.soft import LEARNED, NEAREST, SOFT, Position, SoftLinear, SoftWeight, soft_weights
from viditq.quant.reconstruction.start import observed, round_alone
from viditq.quant.reconstruction.store import BlockStore

CPU = torch.device("cpu")
HELD_OUT = 8  # every so many inputs, one is kept for the comparison with nearest rounding
JUDGED = 16  # batches of those at most
ROWS = 2**14  # whose second moments each weight starts from, about
SCALE_RATE = 0.02  # of Adam, for the logarithm of activation scales, as a share of that for roundings


@dataclass(frozen=True)
class BlockReconstruction:
    """What `quantize_denoiser` needs for a plan that learns blocks: their inputs, and where to compute.

    on_block: told of each block when it is done, as a record for the user. kept: a folder for what was learned of each
    block, from which a killed run goes on; None = nowhere.
    """

    store: BlockStore
    device: torch.device = CPU
    on_block: Callable[[dict[str, Any]], None] = lambda record: None
    kept: Path | None = None

    def learn(self, block: str, exact: nn.Module, layers: Mapping[str, QuantLinear], plan: QuantPlan) -> None:
        """Learn the roundings of `layers` and write them to their variants, unless nearest rounding is better.

        exact: the float block, no longer needed by the caller. layers: by full name, as fitted with nearest rounding.
        """
        file = None if self.kept is None else self.kept / f"{block}.safetensors"
        if file is not None and is_whole(file):
            _write(load_file(file), layers)
            self.on_block(read_json(file.with_suffix(".json")))
            return
        start = time.perf_counter()
        record = _Learning(block, exact, layers, plan, self).run()
        record["seconds"] = round(time.perf_counter() - start, 2)
        if file is not None:
            write_json(file.with_suffix(".json"), record)
            write_tensors(file, _learned_tensors(layers))
        self.on_block(record)


def _learned_tensors(layers: Mapping[str, QuantLinear]) -> dict[str, Tensor]:
    """What learning changes of these layers."""
    state = {f"{name}/{key}": t for name, layer in layers.items() for key, t in layer.variants.state_dict().items()}
    return {key: tensor for key, tensor in state.items() if key.endswith((".qweight", ".input_scale"))}


def _write(tensors: Mapping[str, Tensor], layers: Mapping[str, QuantLinear]) -> None:
    for key, mine in _learned_tensors(layers).items():
        mine.copy_(tensors[key])


@dataclass(frozen=True)
class _Problem:
    """Inputs of segments that compute alike. unit: mean squared error of nearest rounding alone."""

    segment: int
    batches: Batches
    judged: list[Batch]
    unit: float


class _Learning:
    """The learning of one block."""

    def __init__(
        self,
        block: str,
        exact: nn.Module,
        layers: Mapping[str, QuantLinear],
        plan: QuantPlan,
        how: BlockReconstruction,
    ) -> None:
        self.block, self.layers, self.plan, self.how = block, layers, plan, how
        self.spec = _spec(plan, layers)
        self.position = Position()
        self.exact = exact.float().requires_grad_(False)
        self.soft, self.linears = self._softened()
        self.exact.to(how.device)
        self.soft.to(how.device)
        self.weights = soft_weights(self.soft)
        self.problems = self._problems()
        self.learnable = [p for p in self.problems if p.unit > 0 and self._learns(p.segment)]

    def run(self) -> dict[str, Any]:
        """Everything; returns the record."""
        steps = self.spec.iterations * max(len(self._sets()), 1)
        errors, start = {"nearest": self._error(NEAREST)}, list[Tensor]()
        if self.learnable:
            self._start()
            errors["layers"] = self._error(LEARNED)
            start = [weight.soft.detach().clone() for weight in self.weights]
            self._descend(steps)
            errors["block"] = self._error(LEARNED)
        errors = {kept: error for kept, error in errors.items() if isfinite(error)}  # learning can diverge
        best = min(errors, key=lambda kept: errors[kept])
        if best == "layers":
            self._go_back(start)
        if best != "nearest":
            for name, linear in self.linears.items():
                linear.to("cpu").write_to(self.layers[name])
        inputs = sum(len(problem.batches.items) for problem in self.problems)
        return {"block": self.block, "inputs": inputs, "steps": steps, "errors": errors, "kept": best}

    @torch.no_grad()
    def _go_back(self, start: list[Tensor]) -> None:
        for weight, soft in zip(self.weights, start, strict=True):
            weight.soft.copy_(soft)
        for variant in (v for linear in self.linears.values() for v in linear.soft_variants()):
            if variant.stretch is not None:
                variant.stretch.zero_()

    def _softened(self) -> tuple[nn.Module, dict[str, SoftLinear]]:
        soft = copy.deepcopy(self.exact)
        linears = {}
        for name, layer in self.layers.items():
            inner = name[len(self.block) + 1 :]
            old = soft.get_submodule(inner)
            assert isinstance(old, nn.Linear)
            learned = [_learned(variant, name) for variant in layer.variants]
            new = SoftLinear(layer, old.weight, learned, self.position, self.spec.learn_activation_scale)
            for parent in [*soft.modules()]:
                for key, child in parent._modules.items():
                    if child is old:
                        parent._modules[key] = new
            linears[name] = new
        return soft, linears

    def _sets(self) -> set[tuple[int, ...]]:
        """Combinations of weights that segments compute with."""
        return {
            tuple(id(linear.variant_of(p.segment).weight) for linear in self.linears.values()) for p in self.learnable
        }

    def _problems(self) -> list[_Problem]:
        alike: dict[tuple[Any, ...], list[Item]] = {}
        segments: dict[tuple[Any, ...], int] = {}
        for item in self.how.store.items(self.block):
            segment = interval_of(self.plan.edges, item.noise_level)
            key = tuple(id(linear.variant_of(segment)) for linear in self.linears.values())
            segments.setdefault(key, segment)
            alike.setdefault(key, []).append(item)
        self._check_enough({key: len(items) for key, items in alike.items()})
        return [self._problem(segments[key], items) for key, items in alike.items()]

    def _learns(self, segment: int) -> bool:
        return any(linear.variant_of(segment).weight is not None for linear in self.linears.values())

    def _check_enough(self, counts: Mapping[tuple[Any, ...], int]) -> None:
        """Raises UserError if the budget left a segment with roundings of its own fewer than two inputs."""
        kept, seen = sum(counts.values()), self.how.store.index["seen"][self.block]
        for segment, (lo, hi) in enumerate(pairwise(self.plan.edges)):
            count = counts.get(tuple(id(linear.variant_of(segment)) for linear in self.linears.values()), 0)
            if count < 2 and kept < seen and self._learns(segment):
                raise UserError(
                    f"calibration.block_input_bytes let {kept} of {seen} inputs of block {self.block} be kept, {count} "
                    f"of them at noise levels {lo:g} to {hi:g}, which have roundings of their own. Learning takes at "
                    "least 2: give more bytes."
                )

    def _problem(self, segment: int, items: list[Item]) -> _Problem:
        how, tokens = self.how, self.spec.tokens
        held = items[HELD_OUT - 1 :: HELD_OUT] or items[-1:]
        rest = [item for item in items if item not in {*held}] or items
        judging = Batches(how.store, self.block, held, self.exact, tokens, how.device)
        judged = [judging.draw() for _ in range(min(JUDGED, len(held)))]
        problem = _Problem(segment, Batches(how.store, self.block, rest, self.exact, tokens, how.device), judged, 0.0)
        self.position.segment = segment
        return _Problem(segment, problem.batches, judged, self._mean_error(problem, NEAREST, activations=False))

    # Learning ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self) -> None:
        """Every weight by itself, on what its Linear reads in the float block."""
        inner = {name: self.exact.get_submodule(name[len(self.block) + 1 :]) for name in self.linears}
        sums: dict[SoftWeight, Tensor] = {}
        for problem in self.problems:
            with observed(inner) as moments:
                for _ in range(min(-(-ROWS // self.spec.tokens), problem.batches.epoch)):
                    problem.batches.draw()  # which runs the float block
            for name, linear in self.linears.items():
                variant = linear.variant_of(problem.segment)
                if variant.weight is not None:
                    behind = variant.chain.moments(moments[name])
                    sums[variant.weight] = sums[variant.weight] + behind if variant.weight in sums else behind
        for weight, moments_CC in sums.items():
            round_alone(weight, moments_CC, self.spec.layer_iterations, self.spec.strength)

    def _descend(self, steps: int) -> None:
        variants = [variant for linear in self.linears.values() for variant in linear.soft_variants()]
        scales = [variant.stretch for variant in variants if variant.stretch is not None]
        groups: list[dict[str, Any]] = [{"params": [weight.soft for weight in self.weights]}]
        if scales:
            groups.append({"params": scales, "lr": self.spec.learning_rate * SCALE_RATE})
        optimizer = torch.optim.Adam(groups, lr=self.spec.learning_rate)
        count = sum(weight.soft.numel() for weight in self.weights)
        self.position.rounding, self.position.activations = SOFT, True
        with torch.enable_grad():
            for step in range(steps):
                problem = self.learnable[step % len(self.learnable)]
                self.position.segment = problem.segment
                optimizer.zero_grad(set_to_none=True)
                batch = problem.batches.draw()
                (self._squared_error(batch) * (count / (problem.unit * batch.numel))).backward()
                progress = step / steps
                if progress >= WARM_UP:
                    for weight in self.weights:
                        weight.add_pull(self.spec.strength, beta_at(progress))
                optimizer.step()

    def _squared_error(self, batch: Batch) -> Tensor:
        total = torch.zeros((), device=self.how.device)
        for (args, kwargs), targets in batch.calls:
            for out, target in zip(outputs(self.soft(*args, **kwargs)), targets, strict=True):
                total = total + (out - target).square().sum()
        return total

    @torch.no_grad()
    def _mean_error(self, problem: _Problem, rounding: str, activations: bool = True) -> float:
        self.position.segment = problem.segment
        self.position.rounding, self.position.activations = rounding, activations
        squared = sum(float(self._squared_error(batch)) for batch in problem.judged)
        return squared / sum(batch.numel for batch in problem.judged)

    def _error(self, rounding: str) -> float:
        """Mean squared error of the block's output on inputs held out, relative to the output; mean over segments."""
        errors = [self._mean_error(p, rounding) / (_mean_square(p) or 1.0) for p in self.problems]
        return sum(errors) / len(errors)


def _mean_square(problem: _Problem) -> float:
    squared = sum(float(t.square().sum()) for batch in problem.judged for _, targets in batch.calls for t in targets)
    return squared / sum(batch.numel for batch in problem.judged)


def _learned(variant: nn.Module, layer: str) -> bool:
    assert isinstance(variant, Variant)
    return variant.scheme.learned_in_block(layer)


def _spec(plan: QuantPlan, layers: Mapping[str, QuantLinear]) -> BlockAdaRound:
    """The settings of a block: those of its first scheme that learns."""
    for name, layer in layers.items():
        for variant in layer.variants:
            if _learned(variant, name) and isinstance(variant, Variant):
                found = variant.scheme.rounding
                assert isinstance(found, BlockAdaRound)
                return found
    raise AssertionError("a block without learned layers")

"""Modules whose weights stay in their files: widened while they compute where they are stored narrower, then let go of.

What is small, or belongs to a module that others read from, is made real at once: it is a few MB of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from viditq.hooks import Hook, add_hook
from viditq.mapped import release

SMALL_BYTES = 2**22
Check = Callable[[Iterable[str]], None]
ALONE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # nobody but their own forward reads the weights


class Visit:
    """A module's large tensors: in the type they run in (`runs`) from the start of its forward to its end.

    An embedding is looked up as it is stored, and what was found is cast.
    """

    def __init__(
        self, module: nn.Module, names: Mapping[str, str], runs: Mapping[str, torch.dtype], check: Check, hide: bool
    ) -> None:
        """names: of the module's own parameters -> in the model; check: is told those about to be read; hide: as of
        `leave_on_disk`."""
        self._names, self._check = names, check
        self._stored = {key: module.get_parameter(key) for key in names}
        self.runs = {key: runs.get(name, self._stored[key].dtype) for key, name in names.items()}
        self._resting = dict(self._stored)
        if hide:
            self._resting |= {k: stand_in(t, self.runs[k]) for k, t in self._stored.items() if t.dtype != self.runs[k]}
        module._parameters.update(self._resting)
        add_hook(module.register_forward_pre_hook, self._come)
        add_hook(module.register_forward_hook, self._go, always_call=True)

    def _come(self, module: nn.Module, args: Any) -> None:
        self._check(self._names.values())
        module._parameters.update(self._stored)
        for key, stored in () if type(module) is nn.Embedding else self._stored.items():
            if self.runs[key] != stored.dtype:
                module._parameters[key] = made_real(stored, self.runs[key])

    def _go(self, module: nn.Module, args: Any, output: Any) -> Any:
        module._parameters.update(self._resting)
        release(self._stored.values())
        failed = output is None
        return output if type(module) is not nn.Embedding or failed else output.to(self.runs["weight"])


def stand_in(stored: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """NaN of a tensor's shape and device in another type, without memory: for who asks for the type alone."""
    return nn.Parameter(stored.new_full((), torch.nan, dtype=dtype).expand(stored.shape), requires_grad=False)


def is_stand_in(parameter: Tensor) -> bool:
    """Whether it stands in for one that lies in its file."""
    return parameter.numel() > 1 and not any(parameter.stride())


def is_visit(hook: Any) -> bool:
    """Whether a hook is a Visit's, which is there for whoever calls the module, and watches nothing."""
    return isinstance(hook, Hook) and isinstance(getattr(hook.function, "__self__", None), Visit)


def runs_in(linear: nn.Linear) -> torch.dtype:
    """The type in which a Linear computes, whatever its weight is stored in."""
    hooks: Iterable[Any] = linear._forward_pre_hooks.values()
    visits: list[Visit] = [hook.function.__self__ for hook in hooks if is_visit(hook)]
    return next((v.runs["weight"] for v in visits if "weight" in v.runs), linear.weight.dtype)


def leave_on_disk(
    model: nn.Module,
    runs: Mapping[str, torch.dtype],
    check: Check = lambda names: None,
    skip: Iterable[nn.Module] = (),
    hide: bool = False,
) -> tuple[int, int]:
    """Let the large weights of `model`, which are mapped, come and go with their modules' forward.

    runs: names of tensors that compute in another type than they are stored in -> that type. check: is told the names
    of tensors before they are read. skip: modules that see to themselves. hide: between calls a weight that computes in
    another type looks as if it had it, and is NaN: for models that ask their layers' weights which type they are of.
    Returns the bytes of what is always in memory from now on, and of what the largest module takes beside it while it
    computes.
    """
    always = largest = 0
    skipped = {id(part) for module in skip for part in module.modules()}
    for prefix, module in model.named_modules():
        if id(module) in skipped:
            continue
        names = {key: f"{prefix}.{key}" if prefix else key for key in (*module._parameters, *module._buffers)}
        large = {}
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            dtype = runs.get(names[key], parameter.dtype)
            if comes_and_goes(module, parameter):
                large[key] = names[key]
                largest = max(largest, held_by_call(module, parameter, dtype))
            else:
                check([names[key]])
                module._parameters[key] = made_real(parameter, dtype)
                always += parameter.numel() * dtype.itemsize
        for key, buffer in module._buffers.items():
            if buffer is not None and names[key] in runs:
                module._buffers[key] = buffer.to(runs[names[key]])
        if large:
            Visit(module, large, runs, check, hide)
    return always, largest


def comes_and_goes(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a module's parameter lies in its file while the module does not compute."""
    return type(module) in ALONE and parameter.nbytes > SMALL_BYTES


def held_by_call(module: nn.Module, parameter: Tensor, dtype: torch.dtype) -> int:
    """Bytes that it takes while the module computes in `dtype`: of an embedding a few rows, which count as nothing."""
    return 0 if type(module) is nn.Embedding else parameter.numel() * dtype.itemsize


def made_real(stored: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A mapped tensor as a parameter of its own."""
    real = stored.detach().to(dtype, copy=True)
    release([stored])
    return nn.Parameter(real, requires_grad=False)

"""Tensors of the simulated device, and what an operator does with them."""

import weakref
from collections import Counter
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, *(getattr(aten.to, name) for name in aten.to.overloads())}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COMPOSITE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.addmv.default}


class Memory:
    """Bytes of the device that are held, and the most there were."""

    def __init__(self) -> None:
        self.held = self.most = 0
        self._users: Counter[int] = Counter()

    def lease(self, inner: Tensor) -> "Lease":
        """What holds the bytes of a tensor for as long as it is there; views of one storage count once."""
        storage = inner.untyped_storage()
        lease, place, size = Lease(), storage.data_ptr(), storage.nbytes()
        if size:
            if not self._users[place]:
                self.held += size
                self.most = max(self.most, self.held)
            self._users[place] += 1
            weakref.finalize(lease, self._let_go, place, size).atexit = False
        return lease

    def _let_go(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            self.held -= size


class Lease:
    """A part of a tensor: of a tensor itself no weak reference may be held, or torch could not swap it."""


MEMORY = Memory()


class Simulated(Tensor):
    """A tensor on the device, which `inner` on the CPU computes for."""

    inner: Tensor
    lease: Lease

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool | None = None) -> "Simulated":
        if requires_grad is not None:  # accelerate makes a parameter anew of the class it had
            return cast(Simulated, torch.nn.Parameter(inner, requires_grad))
        tensor: Simulated = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=CUDA,
        )  # fmt: skip
        tensor.inner = inner
        tensor.lease = MEMORY.lease(inner)
        return tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """With it modules swap their parameters when they are moved or cast, `inner` with them."""
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *rest: Any) -> "Simulated":
        return Simulated(parts["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def storage(self) -> Any:
        return self.inner.storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **kwargs: Any) -> str:
        return f"{self.inner!r} on {CUDA}"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Simulated":
        if id(self) not in memo:
            memo[id(self)] = Simulated(self.inner.clone())
        return memo[id(self)]


def put_in_place(tensor: Tensor, other: Tensor) -> None:
    """`tensor.data = other`, whose own way would leave `inner` behind."""
    as_parameter = isinstance(tensor, torch.nn.Parameter)
    made = torch.nn.Parameter(other.detach(), tensor.requires_grad) if as_parameter else other.detach()
    torch.utils.swap_tensors(tensor, made)


class Device(TorchDispatchMode):
    """Makes what is asked for on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs), where some are on the device or `device` says that the result is."""
    leaves = tree_leaves((args, kwargs))
    there = [one for one in leaves if isinstance(one, Simulated)]
    asked = next((one for one in leaves if isinstance(one, torch.device)), None)
    on_device = bool(there) if asked is None else asked.type == "cuda"
    if func is aten.copy_.default:
        on_device = isinstance(args[0], Simulated)
    if there and func not in COPIES:
        check(func, args, kwargs)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    called = _on_cuda(func) if there and func.namespace not in ("aten", "prims") else func
    made = called(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not on_device:
        return made
    known = {id(one.inner): one for one in there}
    return tree_map(lambda one: _outer(one, known), made)


def _inner(one: Any) -> Any:
    if isinstance(one, torch.device) and one.type == "cuda":
        return CPU
    return one.inner if isinstance(one, Simulated) else one


def _outer(one: Any, known: dict[int, Simulated]) -> Any:
    if not isinstance(one, Tensor):
        return one
    before = known.get(id(one))
    if before is None:
        return Simulated(one)
    assert before.shape == one.shape and before.stride() == one.stride(), "changing a shape in place is not simulated"
    return before


def check(func: Any, args: Any, kwargs: Any) -> None:
    """Raises where a GPU would."""
    if func in INDEXED:
        args = [args[0], *args[2:]]  # indices may lie on the CPU
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    strangers = [one for one in tensors if not isinstance(one, Simulated) and one.dim()]
    if strangers:
        raise RuntimeError(f"{func}: expected all tensors to be on {CUDA}, found one on {strangers[0].device}")
    if func in PRODUCTS and not all(one.is_floating_point() for one in tensors):
        raise RuntimeError(f"{func} is not implemented for {tensors[0].dtype} on CUDA")
    if func is aten._int_mm.default:
        (rows, width), outs = args[0].shape, args[1].shape[1]
        if rows <= 16 or width % 8 or outs % 8:
            raise RuntimeError(f"{func}: more than 16 rows, and multiples of 8, not {rows} x {width} x {outs}")


def _on_cuda(func: Any) -> Any:
    """What an operator that is not torch's own does on CUDA."""
    name, has = func.name(), torch._C._dispatch_has_kernel_for_dispatch_key
    if has(name, "CUDA"):
        return partial(func.redispatch, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA))
    if any(has(name, key) for key in COMPOSITE):
        return func
    raise NotImplementedError(f"could not run '{name}' with arguments from the 'CUDA' backend")

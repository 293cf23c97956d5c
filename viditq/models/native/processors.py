"""How a denoiser of diffusers comes to use our attention: through its dispatch, or where it calls torch's.

Legend: B batch, L queries, K keys, H heads, G heads of keys, D channels of a head.
"""

from collections.abc import Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

from diffusers.models import attention_dispatch as dispatch
from torch import Tensor, nn
from torch.nn import functional

from viditq.errors import UserError
from viditq.models.native.op import INSTEAD, attention, check_head_dim, load

CAUSAL = ("Cosmos3AttnProcessor",)
_NO_MASK = "model.attention=native has neither a causal mask nor dropout."
NAME = "viditq"  # in diffusers' dispatch, whose "native" is torch's


def takes_native(processor: Any) -> bool:
    """Whether this attention processor goes through diffusers' dispatch or calls torch's attention as `F.`..."""
    return hasattr(processor, "_attention_backend") or _calls_torch(type(processor))


def check_heads(denoiser: nn.Module) -> None:
    """Raises UserError naming the first attention layer of `denoiser` that the kernel does not take."""
    for name, module in _attention_layers(denoiser):
        if type(module.processor).__name__ in CAUSAL:
            raise UserError(f"{_NO_MASK} {type(denoiser).__name__}.{name} has one over the words. {INSTEAD}")
        head_dim = _head_dim(module)
        if head_dim is not None:
            check_head_dim(head_dim, f"{type(denoiser).__name__}.{name}")


def use_native(denoiser: nn.Module) -> None:
    """Let `denoiser`, and it alone, compute attention with our kernel; raises UserError where that cannot be built."""
    load()
    member = _dispatch_member()
    for _, module in _attention_layers(denoiser):
        if hasattr(module.processor, "_attention_backend"):
            module.processor._attention_backend = member
        else:
            cls: Any = type(module.processor)
            module.processor.__class__ = _on_native(cls)


def _attention_layers(denoiser: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in denoiser.named_modules() if takes_native(getattr(m, "processor", None)))


def _head_dim(module: Any) -> int | None:
    """None where the layer does not say; then it is checked as it runs."""
    head_dim, channels, heads = (getattr(module, key, None) for key in ("head_dim", "inner_dim", "heads"))
    if isinstance(head_dim, int):
        return head_dim
    return channels // heads if isinstance(channels, int) and isinstance(heads, int) else None


# Through the dispatch -------------------------------------------------------------------------------------------------


@cache
def _dispatch_member() -> Any:
    """A member of diffusers' closed list of backends, added to it: the dispatch takes members only."""
    names: Any = dispatch.AttentionBackendName
    member = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    names._member_map_[NAME.upper()] = names._value2member_map_[NAME] = member
    dispatch._AttentionBackendRegistry.register(member)(_dispatched)
    return member


def _dispatched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """q [B, L, H, D], k and v [B, K, G, D]; a mask [B, K] is one of keys, as the dispatch's other backends have it."""
    _check_plain(query, key, dropout_p, is_causal, enable_gqa)
    if _parallel_config is not None:
        raise UserError(f"model.attention=native does not split attention over devices. {INSTEAD}")
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    return attention(query, key, value, attn_mask, scale)


# In place of torch's --------------------------------------------------------------------------------------------------


def _calls_torch(cls: type) -> bool:
    call: Any = cls.__call__
    named = isinstance(call, FunctionType) and "scaled_dot_product_attention" in call.__code__.co_names
    return named and call.__globals__.get("F") is functional


@cache
def _on_native(cls: type) -> type:
    """A subclass of a processor's class whose `__call__` finds our attention in `F`; other denoisers keep theirs."""
    call: Any = cls.__call__
    names = {**call.__globals__, "F": _functional()}
    del names["__name__"]  # torch.compile looks names up in the module of that name, and would find torch's again
    ours = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    ours.__kwdefaults__ = call.__kwdefaults__
    return type(f"Native{cls.__name__}", (cls,), {"__call__": ours, "is_native": True})


@cache
def _functional() -> ModuleType:
    module = ModuleType("viditq_functional", "torch.nn.functional with our attention.")
    module.__dict__.update(functional.__dict__, scaled_dot_product_attention=_like_torch)
    return module


def _like_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """q [B, H, L, D], k and v [B, G, K, D], as torch's."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    _check_plain(query, key, dropout_p, is_causal, enable_gqa)
    return attention(query, key, value, attn_mask, scale).transpose(1, 2)


def _check_plain(query: Tensor, key: Tensor, dropout_p: float, is_causal: bool, enable_gqa: bool) -> None:
    if dropout_p or is_causal:
        raise UserError(f"{_NO_MASK} {INSTEAD}")
    if not enable_gqa and query.shape[2] != key.shape[2]:
        raise UserError(f"model.attention=native: {query.shape[2]} heads of queries, {key.shape[2]} of keys. {INSTEAD}")

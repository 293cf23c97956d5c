"""The Linears of a model that can be quantized: their names and shapes, and the places that they hang from."""

from torch import nn


def linear_names(denoiser: nn.Module) -> list[str]:
    """Names of the Linears that can be quantized, in module order; one reached by two names appears once."""
    return list(linears_of(denoiser))


def shapes_of(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    """Linear -> (out_features, in_features)."""
    return {name: (linear.out_features, linear.in_features) for name, linear in linears_of(denoiser).items()}


def linears_of(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """The Linears by name, each once."""
    # MultiheadAttention reads its out_proj's weight itself: a swapped one would never be called
    excluded = nn.modules.linear.NonDynamicallyQuantizableLinear
    modules = denoiser.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and not isinstance(m, excluded)}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are reached by an earlier name too, as where an embedding is shared -> that name."""
    first: dict[int, str] = {}
    everything = model.named_parameters(remove_duplicate=False)
    names = {name: first.setdefault(id(parameter), name) for name, parameter in everything}
    return {name: earlier for name, earlier in names.items() if name != earlier}


def places_of(denoiser: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Module -> every (parent, attribute) it hangs from: a shared Linear must stay shared."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in denoiser.modules():
        for key, child in parent._modules.items():  # named_children skips a child's second name
            if child is not None:
                places.setdefault(child, []).append((parent, key))
    return places


def put_at(places: list[tuple[nn.Module, str]], new: nn.Module) -> None:
    """Hang a module there, in the place of another."""
    for parent, key in places:
        setattr(parent, key, new)

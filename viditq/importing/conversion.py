"""Imported codes as the conversion of a denoiser, which is written to an artifact or put in place as any other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from viditq.errors import UserError
from viditq.importing.layer import ImportedLayer
from viditq.mapped import is_finite
from viditq.quant.calibration.context import TimestepScaleLike
from viditq.quant.convert import Conversion
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.linear import QuantLinear


class ImportedConversion(Conversion):
    """Linears whose codes are there already.

    denoiser: as `ImportedDenoiser.put_into` leaves it. layers: by name. runs: what that returned.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layers: Mapping[str, ImportedLayer],
        runs: Mapping[str, torch.dtype],
        timestep_scale: TimestepScaleLike = 1000.0,
        backend: str = "fake",
    ) -> None:
        plan = plan_of({name: layer.scheme for name, layer in layers.items()})
        super().__init__(denoiser, plan, None, backend, timestep_scale, dtypes=runs)
        self._imported = layers

    def check_finite(self, names: Iterable[str]) -> None:
        """Of biases; scales are checked as they are read, and the Linears have no weights."""
        for name in names:
            bias = self.linears[name].bias
            if bias is not None and not is_finite(bias.detach(), self.dtype_of(name)):
                dtype = str(self.dtype_of(name)).removeprefix("torch.")
                raise UserError(
                    f"the bias of {name} contains NaN or inf as {dtype}; check the file and --set model.dtype"
                )

    def quantized(self, names: Sequence[str]) -> dict[str, QuantLinear]:
        """Not prepared."""
        layers = {name: self.empty(name) for name in names}
        for name, layer in layers.items():
            layer.variants[0].load_state_dict(self._imported[name].tensors(name), assign=True)
        return layers


def plan_of(schemes: Mapping[str, LayerScheme]) -> QuantPlan:
    """One segment. schemes: by layer."""
    names: dict[LayerScheme, str] = {}
    for scheme in schemes.values():
        if scheme not in names:
            sides = [f"{side}{spec.bits}" for side, spec in (("w", scheme.weight), ("a", scheme.activation)) if spec]
            same = sum(name.partition("_")[0] == "".join(sides) for name in names.values())
            names[scheme] = "".join(sides) + (f"_{same + 1}" if same else "")
    layers: dict[str, tuple[str | None, ...]] = {layer: (names[scheme],) for layer, scheme in schemes.items()}
    return QuantPlan((0.0, 1.0), {name: scheme for scheme, name in names.items()}, layers)

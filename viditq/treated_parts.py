"""The parts that a search of treatments has to choose for in one model, and the bytes of the artifact they lead to."""

from collections.abc import Callable, Mapping, Sequence
from math import prod

from viditq.errors import UserError
from viditq.mapped import header_bound
from viditq.models.adapter import ModelAdapter
from viditq.models.stored_weights import stored_dtypes
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.search.allotment import SIZE, Part, Treated, allotted, leanest, treated_plan, used
from viditq.quant.search.treatment_policy import TreatmentSearch
from viditq.quant.sizes import artifact_bytes, laid_out, safetensors_bytes, stored_entries

META_BYTES = 800  # of meta.json: what it tells beside the model and its tensors


def planned_bytes(adapter: ModelAdapter, plan: QuantPlan) -> int:
    """Of the artifact that a plan leads to, at most, and of denoisers left in float; only headers of files are read."""
    quantized = laid_out(adapter.build_denoiser().to(adapter.torch_dtype), plan, adapter.timestep_scale)
    stored = stored_dtypes(adapter)
    entries = stored_entries(quantized, stored)
    tensors = sum(prod(shape) * dtype.itemsize for dtype, shape in entries.values())
    header = safetensors_bytes(entries) - tensors
    room = 16 + header_bound({name: shape for name, (_, shape) in entries.items()}, tensors)
    rest = artifact_bytes(quantized, plan, stored, {"model": adapter.to_dict()}) - tensors - header
    return tensors + room + rest + META_BYTES + adapter.left_in_float_bytes()


def float_bytes(adapter: ModelAdapter) -> int:
    """Of all denoisers in 16 bits."""
    return sum(2 * p.numel() for p in adapter.build_denoiser().parameters()) + adapter.left_in_float_bytes()


def check_treatments(adapter: ModelAdapter, policy: TreatmentSearch, base: QuantPlan, roles: Mapping[str, str]) -> None:
    """Raises UserError for a budget that even the leanest treatments exceed, and for what no part could have."""
    parts = policy.parts(base, roles, shapes_of(adapter.build_denoiser()))
    room = Room(adapter, policy, base.edges, parts)
    every = {part.name: dict.fromkeys(part.menu.lean, 0.0) for part in parts}
    allotted(parts, every, policy.parsed_budget, room.for_parts)


class Room:
    """The bytes that a budget leaves to the parts. Raises UserError where the leanest treatments exceed it."""

    def __init__(
        self, adapter: ModelAdapter, policy: TreatmentSearch, edges: Sequence[float], parts: Sequence[Part]
    ) -> None:
        self._adapter, self._edges, self._parts = adapter, edges, parts
        self.limit = policy.parsed_budget.bytes_of(float_bytes(adapter))
        lean = leanest(parts)
        least = self.bytes_of(lean)
        self.beside = least - used(parts, lean, policy.parsed_budget)[SIZE]
        if self.limit is not None and least > self.limit:
            raise UserError(
                f"quant.policy.budget.size={policy.parsed_budget.size:g} is {self.limit:.0f} bytes, and the least that "
                f"the choices lead to is {least}: give that many, or fewer bits (quant.policy.weight_choices)."
            )

    def bytes_of(self, treated: Treated) -> int:
        """Of the whole artifact."""
        return planned_bytes(self._adapter, treated_plan(self._edges, self._parts, treated))

    @property
    def for_parts(self) -> float | None:
        """None = any."""
        return None if self.limit is None else self.limit - self.beside

    def fitting(self, allot: Callable[[float | None], Treated | None]) -> Treated | None:
        """What `allot` makes of the room, so that the whole artifact keeps to the limit; None where it finds nothing.

        What files take beside tensors hangs on the plan, and is known when there is one.
        """
        room = self.for_parts
        while (treated := allot(room)) is not None and self.limit is not None and room is not None:
            over = self.bytes_of(treated) - self.limit
            if over <= 0:
                break
            room -= over
        return treated

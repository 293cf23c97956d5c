"""Which Linears have read the very same inputs so far: q, k and v of an attention, for which one entry of statistics
does."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence


class InputGroups:
    """members: first layer of a group -> its layers, all in the order given."""

    def __init__(self, groups: Iterable[Sequence[str]]) -> None:
        """groups: layers that could share at all; all that have seen nothing yet are alike."""
        self.members = {layers[0]: list(layers) for layers in groups}

    def refine(self, seen: Mapping[str, Sequence[Hashable]]) -> dict[str, str]:
        """Parts layers that have not read the same; returns first layer of each new group -> that of its former one.

        seen: layer -> what it has read since, in order; nothing where it is absent.
        """
        came: dict[str, str] = {}
        for leader, layers in [*self.members.items()]:
            parts: dict[tuple[Hashable, ...], list[str]] = {}
            for layer in layers:
                parts.setdefault(tuple(seen.get(layer, ())), []).append(layer)
            if len(parts) > 1:
                self.members |= {part[0]: part for part in parts.values()}
                came |= {part[0]: leader for part in parts.values() if part[0] != leader}
        return came

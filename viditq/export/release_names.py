"""diffusers' names of a denoiser's tensors -> those of the model's original release, which ComfyUI and others read.

Releases join Linears that read one input (q, k, v) by their rows, and some keep a modulation's shift before its scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from viditq.errors import UserError

LAST = "LAST"  # in `swapped`: the number of the last block
BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class Joined:
    """Linears `within.part` whose rows one after another are those of `within.name`; within: a pattern."""

    within: str
    parts: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class Origin:
    """Where the rows of a release's tensor lie: in these of diffusers', in turn; swapped: its halves change places.

    shape: that its numbers have there, in their order, where it is another.
    """

    names: tuple[str, ...]
    swapped: bool = False
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ReleaseNames:
    """joined is applied first; then each of `renames` (pattern, replacement), in order, to the whole name.

    swapped: patterns of the release's names whose halves of rows lie the other way round here.
    """

    joined: tuple[Joined, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    swapped: tuple[str, ...] = ()

    def origins(self, names: Iterable[str]) -> dict[str, Origin]:
        """Release's name -> origin. Raises UserError where some of the parts that belong together are not there."""
        names = list(names)
        last = max((int(found) for name in names for found in BLOCK.findall(name)), default=0)
        swapped = [re.compile(pattern.replace(LAST, str(last))) for pattern in self.swapped]
        places: dict[str, dict[int, str]] = {}
        counts: dict[str, int] = {}
        for name in names:
            together, place, count = self._joined(name)
            target = self._renamed(together)
            if place in places.setdefault(target, {}):
                raise UserError(f"{name} and {places[target][place]} would both be called {target}")
            places[target][place], counts[target] = name, count
        for target, parts in places.items():
            if len(parts) != counts[target]:
                raise UserError(f"{target} would lack a part: there is {', '.join(parts.values())} alone")
        return {
            target: Origin(
                tuple(parts[place] for place in sorted(parts)), any(pattern.search(target) for pattern in swapped)
            )
            for target, parts in places.items()
        }

    def _joined(self, name: str) -> tuple[str, int, int]:
        """The name that its rows go by, their place among the parts, and how many parts there are."""
        for joined in self.joined:
            for place, part in enumerate(joined.parts):
                found = re.fullmatch(rf"({joined.within})\.{re.escape(part)}\.(\w+)", name)
                if found:
                    return f"{found[1]}.{joined.name}.{found[found.lastindex or 2]}", place, len(joined.parts)
        return name, 0, 1

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

"""What differs between a part's tensors and those of its files, and what is the likely cause."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

FIRST = 3  # names of each kind that a message shows
WRAPPERS = {  # a piece of a name -> what puts it there, and how to be rid of it
    "module.": ("DataParallel or DistributedDataParallel", "save model.module"),
    "_orig_mod.": ("torch.compile", "save model._orig_mod"),
    "_fsdp_wrapped_module.": ("FSDP", "gather the whole state dict of the model without its wrapper, and save that"),
    "base_layer.": ("PEFT", "merge the adapter first (model.merge_and_unload()), then save the model"),
    "base_model.model.": ("PEFT", "merge the adapter first (model.merge_and_unload()), then save the model"),
}
QUANTIZED = (  # the end of a name that belongs to integer or 8-bit weights
    r"(?:^|\.)((weight_|input_|output_)?scales?(_inv|_weight|_input)?|(weight_)?zero_point|weight_format|scb|absmax"
    r"|quant_map|quant_state\..*|qweight|qzeros|g_idx)$"
)
SAVE_AGAIN = "save this part again with save_pretrained"


@dataclass(frozen=True)
class Mismatch:
    """missing: of the files. left_over: the model has no place for them. shapes: name -> as stored, as it has to be.

    integers: weights that are stored as whole numbers. known: all names of the model.
    """

    missing: Collection[str] = ()
    left_over: Collection[str] = ()
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    integers: Collection[str] = ()
    known: Collection[str] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.left_over or self.shapes or self.integers)

    def told(self) -> str:
        """How many of each kind, the first names, the likely cause and the remedy."""
        kinds = {
            "missing from the files": sorted(self.missing),
            "left over in the files": sorted(self.left_over),
            "of another shape": [f"{n} ({_sizes(a)} stored, {_sizes(b)} needed)" for n, (a, b) in self.shapes.items()],
            "stored as whole numbers": sorted(self.integers),
        }
        counts = [f"{len(names)} {kind}, first {', '.join(names[:FIRST])}" for kind, names in kinds.items() if names]
        cause, remedy = self._cause()
        return f"{'; '.join(counts)}. {cause} {remedy[0].upper()}{remedy[1:]}."

    def _cause(self) -> tuple[str, str]:
        if any(re.search(r"(^|[._])lora[._]", name, re.IGNORECASE) for name in self.left_over):
            return "They hold an adapter (LoRA) beside the weights, which is not applied.", (
                "fuse it (pipeline.fuse_lora(), then pipeline.unload_lora_weights()) and " + SAVE_AGAIN
            )
        if self.integers or any(re.search(QUANTIZED, name, re.IGNORECASE) for name in self.left_over):
            return "The weights are stored quantized, and their scales are not applied.", (
                "take the float checkpoint (bfloat16, float16 or float32)"
            )
        return (
            self._renamed()
            or self._layers()
            or (
                "config.json and the weights are not of the same model, or a file is missing.",
                f"copy the model's folder again, or {SAVE_AGAIN}",
            )
        )

    def _renamed(self) -> tuple[str, str] | None:
        """Where names are the same but for a piece of them."""
        missing, left_over = set(self.missing), set(self.left_over)
        pieces: Counter[str] = Counter()
        for name in left_over:
            pieces.update([piece for piece in WRAPPERS if piece in name and name.replace(piece, "") in missing][:1])
        if not pieces:
            pieces.update(_prefixes(left_over, missing))
        if pieces:
            piece, count = pieces.most_common(1)[0]
            by, remedy = WRAPPERS.get(piece, ("", "take it off the names, or " + SAVE_AGAIN))
            names = f"The names of {count} of them have {piece!r} too much"
            return f"{names}{f', as saved from {by}' if by else ''}.", remedy
        absent = Counter(_prefixes(missing, left_over))
        if absent:
            piece, count = absent.most_common(1)[0]
            return f"The names of {count} of them lack {piece!r} at their beginning.", f"put it there, or {SAVE_AGAIN}"
        return None

    def _layers(self) -> tuple[str, str] | None:
        """Where config.json counts other layers than the files hold."""
        if self.shapes:
            return None
        known = {_numberless(name) for name in self.known if name not in self.missing and _numberless(name) != name}
        for names, word in ((self.left_over, "fewer"), (self.missing, "more")):
            if any(_numberless(name) in known for name in names):
                return (
                    f"config.json describes {word} layers than the files hold.",
                    "give the config.json that belongs to these weights, or copy the model's folder again",
                )
        return None


def _prefixes(longer: Iterable[str], shorter: Collection[str]) -> Iterable[str]:
    """What precedes a name of `shorter` in one of `longer`, wherever there is one."""
    for name in longer:
        cuts = [match.end() for match in re.finditer(r"\.", name)]
        cut = next((cut for cut in cuts if name[cut:] in shorter), None)
        if cut is not None:
            yield name[:cut]


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"

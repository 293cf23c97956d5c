"""Arguments that our docstrings explain in sentences ("path: an artifact. backend: what multiplies.") as a table."""

import re
from collections.abc import Iterator
from typing import Any

import griffe

ENDS = re.compile(r"(?<=\.)\s+(?=(?:Raises|Returns)\b)")


class Arguments(griffe.Extension):
    """Rewrites them as sections of Google's style, which mkdocstrings draws, before docstrings are parsed."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for found in _members(pkg):
            if found.docstring is None:
                continue
            found.docstring.value = plain(found.docstring.value)
            if isinstance(found, griffe.Function):
                found.docstring.value = tabled(found.docstring.value, [p.name for p in found.parameters])
            elif isinstance(found, griffe.Class):
                fields = [name for name, member in found.members.items() if member.is_attribute]
                given = [*fields, *(p.name for p in found.parameters)]
                found.docstring.value = tabled(found.docstring.value, given)


def _members(found: griffe.Object) -> Iterator[griffe.Object]:
    for member in found.members.values():
        if isinstance(member, griffe.Object):
            yield member
            yield from _members(member)


def plain(text: str) -> str:
    """text whose <words> are no tags of HTML."""
    parts = text.split("`")  # every second one is code
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def tabled(text: str, names: list[str]) -> str:
    """text with each paragraph that explains some of `names` as a section of its own."""
    if not names:
        return text
    one = f"(?:{'|'.join(map(re.escape, names))})"
    begins = re.compile(rf"(?:(?<=[.;)] )|(?<=[.;)]\n)|^)({one}(?:(?:, | and ){one})*(?: \([^)]*\))?):\s+")
    return "\n\n".join(_section(paragraph, begins) for paragraph in text.split("\n\n"))


def _section(paragraph: str, begins: re.Pattern[str]) -> str:
    before, *found = begins.split(paragraph)
    if not found:
        return paragraph
    *found, last = found
    last, *after = ENDS.split(last, maxsplit=1)
    texts = [*found[1::2], last]
    rows = []
    for given, text in zip(found[::2], texts, strict=True):
        name, _, note = given.partition(" (")
        words = f"({note} {text}" if note else text  # between name and colon it would be taken for a type
        rows.append(f"    {name}: {' '.join(words.split()).removesuffix(';')}")
    return "\n\n".join(part for part in (before.strip(), "\n".join(["Args:", *rows]), *after) if part)

"""Prompts of a file: one a line of a text file, or one an entry of a table (csv, tsv, json, jsonl)."""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from viditq.assets import resolve
from viditq.errors import UserError

NEWLINE = re.compile(r"\r\n|\r|\n")  # str.splitlines also ends lines at characters that captions contain
NO_TEXT = re.compile("[\0\ufeff\ud800-\udfff]")  # signs of UTF-16, of joined files, of half a character
BLANK = "\u115f\u1160\u3164\uffa0\u2800"  # letters and symbols by their category, of no ink
DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHER = re.compile(r"\.(ya?ml|toml|xml|html?|parquet|arrow|feather|xlsx?|ods|docx?|rtf|odt|pdf|pkl|pth?|npy|npz|db)")
KINDS = "Give a text file with one prompt a line, or csv, tsv, json or jsonl with data.column=NAME."
Numbered = tuple[int, Any]
"""The number of a line or an entry, from 1, and what it holds."""


def read_prompts(path: str, column: str | None = None) -> list[str]:
    """The prompts of a file, by its suffix; in a text file empty lines are passed over.

    path: of UTF-8 text (a byte order mark is no part of it), or shipped:prompts/NAME. column: where a table or entries
    of json hold them. Raises UserError for anything that cannot be meant as a prompt, with its line.
    """
    where = "entry" if prompt_file(path).suffix.lower() == ".json" else "line"
    found = _read(path, column)
    prompts = [_checked(value, f"Prompt file {path!r}, {where} {number}") for number, value in found]
    if not prompts:
        raise UserError(f"Prompt file {path!r} holds no prompt. Write one prompt a line.")
    return prompts


def read_column(path: str, column: str) -> list[Any]:
    """What a table, or entries of json, hold under a name, row by row; raises UserError as `read_prompts`."""
    return [value for _, value in _read(path, column)]


def _read(path: str, column: str | None) -> Iterator[Numbered]:
    file = prompt_file(path)
    suffix = file.suffix.lower()
    if not file.is_file():
        raise UserError(f"Prompt file {path!r} does not exist. Give a text file with one prompt a line.")
    if OTHER.fullmatch(suffix):
        raise UserError(f"Prompt file {path!r}: {suffix} is not read as prompts. {KINDS}")
    text = _text(file, path)
    if suffix in DELIMITERS:
        return _of_table(path, text, DELIMITERS[suffix], column)
    if suffix in (".json", ".jsonl", ".ndjson"):
        return _of_entries(path, _json(path, text, lines=suffix != ".json"), column)
    if column is not None:
        raise UserError(f"data.column={column!r}: a text file such as {path!r} has no columns. {KINDS}")
    return ((number, line) for number, line in enumerate(NEWLINE.split(text), 1) if line)


def prompt_file(path: str) -> Path:
    """The file that `path` names, which need not be there; raises UserError for no shipped folder."""
    shipped = path.startswith("shipped:")
    return resolve(path.rpartition("/")[0]) / path.rpartition("/")[2] if shipped else Path(path).expanduser()


def _text(file: Path, path: str) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"Prompt file {path!r} is not UTF-8 text: {error}. Save it as UTF-8.") from error


def _of_table(path: str, text: str, delimiter: str, column: str | None) -> Iterator[Numbered]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if column not in header or header.count(column) > 1:
            raise UserError(
                f"Prompt file {path!r} is a table; data.column={column or 'NAME'} must be one of its columns: "
                f"{', '.join(header)}."
            )
        for row in rows:
            if len(row) not in (0, len(header)):
                raise UserError(
                    f"Prompt file {path!r}, line {rows.line_num}: {len(row)} fields where the header has "
                    f"{len(header)}. Put text that holds a {delimiter!r} in double quotes."
                )
            if row:
                yield rows.line_num, row[header.index(column)]
    except csv.Error as error:
        raise UserError(f"Prompt file {path!r}, line {rows.line_num}, is no table row: {error}.") from error


def _json(path: str, text: str, lines: bool) -> list[Numbered]:
    parts = [(n, line) for n, line in enumerate(NEWLINE.split(text), 1) if line.strip()] if lines else [(1, text)]
    number = 1
    try:
        values = []
        for number, part in parts:
            values.append((number, json.loads(part)))
    except ValueError as error:
        raise UserError(f"Prompt file {path!r} is no json{f' in line {number}' if lines else ''}: {error}.") from error
    if lines:
        return values
    if not isinstance(values[0][1], list):
        raise UserError(
            f"Prompt file {path!r} must hold a list of prompts, or of objects. COCO's captions are read by data=coco."
        )
    return list(enumerate(values[0][1], 1))


def _of_entries(path: str, entries: list[Numbered], column: str | None) -> Iterator[Numbered]:
    for number, entry in entries:
        if isinstance(entry, dict) and column in entry:
            yield number, entry[column]
        elif isinstance(entry, str) and column is None:
            yield number, entry
        else:
            names = f"it has {', '.join(map(str, entry))}" if isinstance(entry, dict) else f"it is {entry!r:.60}"
            raise UserError(
                f"Prompt file {path!r}, entry {number}: data.column={column or 'null'} must name one of the entry's "
                f"fields, or be null where entries are plain text; {names}."
            )


def _checked(value: Any, where: str) -> str:
    """The prompt without space around it; raises UserError for what is none."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {value!r:.60} is no text.")
    if odd := NO_TEXT.search(value):
        raise UserError(
            f"{where} holds U+{ord(odd[0]):04X}, which no text has: the file may be UTF-16, cut, or joined of several. "
            "Save it anew as UTF-8."
        )
    if not has_ink(value):
        names = ", ".join(f"U+{ord(c):04X}" for c in dict.fromkeys(value[:4])) or "no characters"
        raise UserError(f"{where} has nothing to see in it ({names}). Delete it, or write a prompt there.")
    return value.strip()


def has_ink(text: str) -> bool:
    """Whether any character of it can be seen."""
    return any(unicodedata.category(c)[0] not in "CZM" and c not in BLANK for c in text)

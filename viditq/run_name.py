"""Names of runs' folders: short, and of characters that no shell, pattern or override takes for its own."""

import hashlib
import re
from collections import Counter
from pathlib import Path

from viditq.errors import UserError
from viditq.run_dir import CONFIG

LONGEST = 100  # characters; W&B and file systems take more, tables and terminals do not
DIGITS = 8  # of the hash
FIRST = ("quant", "bits", "seed")  # what runs are looked for by, so that it is not what is cut off


def check_name(key: str, name: str | None) -> str:
    """`name`, which is part of a path; raises UserError for one that would lead out of its folder, or is empty."""
    if name is None:
        raise UserError(f"{key}=null: a value is needed. Give a word, such as {key}=my_run.")
    if not name.strip() or ".." in name.split("/") or name in (".", "/"):
        raise UserError(f"{key}={name!r} is no name of a folder. Give a word, such as {key}=my_run.")
    return name


def run_name(name: str, overrides: str, parent: str = "") -> str:
    """Folder name of a run: its name, and where the command line has other overrides their words and a hash of them.

    overrides: `key=value,key=value`, sorted. parent: where the folder will lie; a run that lies there under the name
    that earlier versions gave it keeps that. Raises UserError for a name that is none.
    """
    check_name("name", name)
    parts = [part for part in overrides.split(",") if part and part != f"quant={name}" and not part.startswith("name=")]
    whole = ",".join([name, *parts])
    text = "-".join([_plain(name, r"[^\w.+-]+"), *_words(parts)])
    if text != name or len(text) > LONGEST:
        digest = hashlib.sha256(whole.encode()).hexdigest()[:DIGITS]
        text = f"{text[: LONGEST - DIGITS - 1].rstrip('-_.')}-{digest}"
    folder, old = Path(parent).expanduser(), old_name(name, overrides)
    if old != text and (folder / old / CONFIG).is_file() and not (folder / text / CONFIG).is_file():
        return old
    return text


def old_name(name: str, overrides: str) -> str:
    """What versions before 0.2 called the folder."""
    parts = [part for part in overrides.split(",") if part and part != f"quant={name}"]
    return shorten(",".join([name, *parts]).replace("/", "."), 150)


def shorten(text: str, limit: int) -> str:
    """`text` if it fits, else its beginning and a hash of it all."""
    return text if len(text) <= limit else f"{text[: limit - 13]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _words(parts: list[str]) -> list[str]:
    """`seed_1` of `seed=1`, `alpha_0.3_0.2` of `quant.smoothing.alpha=[0.3` and `0.2]`; those of FIRST come first.

    Of keys that end alike (data.num_prompts, noise_floor.num_prompts) the word before stands too.
    """
    words: list[tuple[bool, str]] = []
    ends = Counter(_path(part)[-1] for part in parts if "=" in part)
    for part in parts:
        key, given, value = part.partition("=")
        if given:
            path = _path(key)
            spoken = "_".join(path[-2:] if ends[path[-1]] > 1 else path[-1:])
            words.append((path[-1] not in FIRST or len(path) > 1, f"{spoken}_{_plain(value)}"))
        elif words:  # of a list, in which commas stand too
            late, before = words.pop()
            words.append((late, f"{before}_{_plain(part)}"))
    return [_plain(word) for _, word in sorted(words, key=lambda word: word[0])]


def _path(part: str) -> list[str]:
    """The words of an override's key."""
    return re.split(r"[./@]", part.partition("=")[0].lstrip("+~"))


def _plain(text: str, but: str = r"[^A-Za-z0-9.]+") -> str:
    return re.sub(but, "_", text).strip("_")

"""Exceptions whose message is written for the user, not for a developer, and words that such messages share."""

import difflib
import re
import shlex
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and what to do.

    `run.py` prints it without a traceback and exits with status 2 (`debug=true` shows the traceback).
    """


class AlreadyReported(Exception):
    """The run failed in another process, which has said why: exit status 2 without another word."""


class GateFailed(Exception):
    """The run is complete and its numbers do not pass `gate`: exit status 3."""


def close_names(name: str, allowed: Iterable[str], count: int = 3) -> str:
    """A readable hint: the names nearest to `name`, or all of them when none is near."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=count, cutoff=0.5)
    if near:
        return "close names: " + ", ".join(near)
    shown = ", ".join(allowed[:8]) + (", ..." if len(allowed) > 8 else "")
    return f"known names: {shown or 'none'}"


def no_linear(pattern: str, linear_names: Iterable[str]) -> str:
    """The message for a pattern of layers that matches none."""
    return f"pattern {pattern!r} matches no Linear of the model; {close_names(pattern.strip('*.'), linear_names)}"


def extra_command(extra: str) -> str:
    """Words of a message: how an extra is installed, at the tested versions, with the clone still the one in use."""
    return f'pip install --constraint constraints.txt --editable ".[{extra}]" in the folder of this project'


def quoting(override: str) -> str:
    """How `key=value` is written on the command line where the value holds what Hydra's grammar reserves."""
    key, _, value = override.partition("=")
    bare = re.sub(r"^([\"'])(.*)\1$", r"\2", value)
    # In Hydra's quotes a backslash stands for itself, but before a quote.
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), bare)
    word = shlex.quote(f'{key}="{escaped}"')
    return (
        "A path or text with spaces, commas, brackets, quotes, ~ or letters beyond a to z goes into quotes of its own, "
        f"inside those of the shell: {word}"
    )

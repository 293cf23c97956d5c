"""The commands of docs/reproduce.md compose: every group, option and key that they name exists."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text()
VARIABLES = dict(re.findall(r'^    ([A-Z])="(.*?)"', PAGE, re.MULTILINE))
COMMANDS = re.findall(r"^    python run\.py (.*)$", PAGE, re.MULTILINE)


def test_the_page_has_commands() -> None:
    assert VARIABLES.keys() == {"G", "O", "P", "S", "L"}
    assert len(COMMANDS) >= 14


@pytest.mark.parametrize("command", COMMANDS)
def test_it_composes(command: str, configure: Callable[..., Any]) -> None:
    expanded = re.sub(r"\$([A-Z])", lambda match: VARIABLES[match[1]], command)
    cfg = configure(*shlex.split(expanded, comments=True))
    assert cfg.model.name in ("opensora_v1", "pixart_alpha", "pixart_sigma", "latte")
    assert {"fid_inception", "dover"} & set(cfg.metric)

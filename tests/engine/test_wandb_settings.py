"""What W&B would refuse at the end of a run is refused at its start."""

from pathlib import Path

import pytest
import wandb

from viditq.engine.wandb_settings import LONGEST_PROJECT, MODES, NOT_IN_PROJECTS, check_wandb
from viditq.errors import UserError


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a key; returns the file that may hold one."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".netrc"


@pytest.mark.parametrize("mode", [None, "offline", "disabled", "dryrun"])
def test_no_key_is_needed(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    check_wandb("viditq", None)


@pytest.mark.parametrize("mode", ["on", "", "Offline"])
def test_unknown_mode(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(UserError, match=f"WANDB_MODE={mode} is unknown to W&B.*offline, online"):
        check_wandb("viditq", None)


@pytest.mark.parametrize("mode", ["online", "run", "shared"])
def test_missing_key(mode: str, nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    nobody.write_text("machine elsewhere.org login user password 0\n")
    with pytest.raises(UserError, match="`wandb login`, set WANDB_API_KEY, or leave WANDB_MODE out"):
        check_wandb("viditq", None)
    nobody.write_text("machine api.wandb.ai login user password 0\n")
    check_wandb("viditq", None)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.company.org:8080")
    with pytest.raises(UserError, match="needs a key"):
        check_wandb("viditq", None)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_wandb("viditq", None)


@pytest.mark.parametrize("project", ["a/b", "50%", "what?", "x" * 129, "", None, 3])
def test_projects(project: object) -> None:
    with pytest.raises(UserError, match=r"logger\.project="):
        check_wandb(project, None)


def test_projects_and_modes_are_those_of_wandb() -> None:
    check_wandb("x" * LONGEST_PROJECT, "team")
    wandb.Settings(project="x" * LONGEST_PROJECT)
    for character in NOT_IN_PROJECTS:
        with pytest.raises(Exception, match="Invalid project name"):
            wandb.Settings(project=f"a{character}")
    for mode in MODES:
        wandb.Settings(mode=mode)


@pytest.mark.parametrize("entity", ["", "a/b", 7])
def test_entities(entity: object) -> None:
    with pytest.raises(UserError, match=r"logger\.entity="):
        check_wandb("viditq", entity)

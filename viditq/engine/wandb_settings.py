"""What W&B would refuse only after hours of sampling: its mode, a missing key, names of projects."""

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from viditq.errors import UserError

MODES = ("offline", "online", "shared", "disabled", "dryrun", "run")
WITHOUT_NETWORK = ("offline", "disabled", "dryrun")
NOT_IN_PROJECTS = "/\\#?%:"
LONGEST_PROJECT = 128
KEY_VARIABLES = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def of_sweep() -> bool:
    """Whether an agent of a W&B sweep has started this process: it has named run, project and entity."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def default_mode() -> str:
    """Offline; in a sweep of W&B, which waits for numbers, online."""
    return "online" if of_sweep() else "offline"


def logged_as(target: str) -> str:
    """What logged.json calls a logger: its function, and in a sweep of W&B the run too, as every trial is one."""
    run = os.environ.get("WANDB_RUN_ID") if of_sweep() and target.endswith(".wandb_logger") else None
    return f"{target}:{run}" if run else target


def check_wandb(project: Any, entity: Any) -> None:
    """Raises UserError unless W&B can log to `project` with the WANDB_ variables as they are; nothing is sent."""
    mode = os.environ.get("WANDB_MODE", default_mode())
    if mode not in MODES:
        raise UserError(f"WANDB_MODE={mode} is unknown to W&B. Use one of: {', '.join(MODES)}.")
    if not isinstance(project, str) or not project or len(project) > LONGEST_PROJECT:
        raise UserError(f"logger.project={project!r} must be a name of 1 to {LONGEST_PROJECT} characters.")
    if bad := [character for character in NOT_IN_PROJECTS if character in project]:
        raise UserError(f"logger.project={project}: W&B allows no {' '.join(bad)} in the name of a project.")
    if entity is not None and (not isinstance(entity, str) or not entity or "/" in entity):
        raise UserError(f"logger.entity={entity!r} must be the name of a user or team, or null for your own.")
    if mode not in WITHOUT_NETWORK and not _logged_in():
        raise UserError(
            f"WANDB_MODE={mode} needs a key, and there is none. Log in with `wandb login`, set WANDB_API_KEY, or leave "
            "WANDB_MODE out: the run is logged offline, for `wandb sync` later."
        )


def _logged_in() -> bool:
    """Whether a key is at hand where W&B looks for one; its value is not read."""
    if any(os.environ.get(name) for name in KEY_VARIABLES):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    for file in [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]:
        try:
            if host in netrc.netrc(Path(file).expanduser()).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False

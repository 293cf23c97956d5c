"""Models named by their id on the Hugging Face hub: taken from the local cache, or downloaded when online."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from viditq.assets import INDICES
from viditq.errors import UserError
from viditq.models.modular import REWRITES

DESCRIPTIONS = ["*.json", "*.txt", "*.model", "*.jinja"]  # what all checks before slow work read
NETWORK_ERRORS = (OSError, HfHubHTTPError, LocalEntryNotFoundError)


@cache
def fetch(hub_id: str, revision: str, weights: bool, variant: str | None = None) -> Path:
    """The folder of a model in the hub's cache, with its weights (of `variant`) or only its descriptions.

    In offline mode (HF_HUB_OFFLINE=1) nothing is downloaded. Raises UserError that says how to get the model.
    """
    if weights and not constants.HF_HUB_OFFLINE:  # diffusers knows which of a repository's files the pipeline needs
        with _explained(hub_id, revision):
            try:
                return Path(DiffusionPipeline.download(hub_id, revision=revision, variant=variant))
            except NETWORK_ERRORS:  # also where there is no model_index.json
                if parts := _modular_parts(_snapshot(hub_id, revision, *DESCRIPTIONS)):
                    return _snapshot(hub_id, revision, *DESCRIPTIONS, *(f"{part}/*" for part in parts))
                raise
    return _snapshot(hub_id, revision, *DESCRIPTIONS)


def _modular_parts(folder: Path) -> list[str]:
    """The folders of parts of a modular pipeline's repository; none of another's. folder: its descriptions."""
    plain, modular = (folder / name for name in INDICES)
    if plain.is_file() or not modular.is_file():
        return []
    return sorted({path.parent.name for path in folder.glob("*/*.json") if not path.parent.name.startswith(REWRITES)})


@cache
def _snapshot(hub_id: str, revision: str, *patterns: str) -> Path:
    with _explained(hub_id, revision):
        offline = constants.HF_HUB_OFFLINE
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
        return Path(folder)


def fetch_whole(hub_id: str, revision: str) -> Path:
    """The folder of everything that a repository holds. Raises UserError that says how to get it."""
    return _snapshot(hub_id, revision, "*")


@contextmanager
def _explained(hub_id: str, revision: str) -> Iterator[None]:
    """The hub's errors as UserErrors that say what to do."""
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{hub_id} asks for its licence to be accepted: do so on https://huggingface.co/{hub_id}, then log in with "
            "`hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{hub_id!r} (revision {revision}) is no folder here and no model on the hub. Give model.path=FOLDER."
        ) from error
    except NETWORK_ERRORS as error:
        raise UserError(_remedy(hub_id, revision)) from error
    except ValueError as error:  # a variant that the repository lacks
        raise UserError(f"{hub_id} (revision {revision}) cannot be downloaded: {error}") from error


def fetch_part(hub_id: str, revision: str, part: str, weights: bool) -> Path:
    """The same for one part of a repository that need not hold a whole pipeline; it lies in the folder's `part`."""
    return _snapshot(hub_id, revision, f"{part}/*" if weights else f"{part}/config.json")


def commit(folder: Path) -> str:
    """The commit that a folder of the cache, or one inside it, holds."""
    parts = folder.parts
    return parts[len(parts) - parts[::-1].index("snapshots")]


def _remedy(hub_id: str, revision: str) -> str:
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    return (
        f"{hub_id!r} (revision {revision}) is no folder here, not in the hub's cache, and cannot be downloaded now"
        f"{offline}. Where there is a network, run `hf download {hub_id} --revision {revision} --local-dir FOLDER`, "
        "copy the folder here, and give model.path=FOLDER (or shipped:NAME for a shipped model)."
    )

"""Where models and plans live: on disk, or `shipped:NAME` for one that comes with the package."""

import re
from pathlib import Path

from viditq.errors import UserError

SHIPPED = Path(__file__).parent / "assets"
INDICES = ("model_index.json", "modular_model_index.json")


def is_hub_id(path: str) -> bool:
    """Whether `path` is written like `organisation/model` and is no folder here."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None and not Path(path).exists()


def index_name(folder: Path) -> str:
    """The file that names a pipeline's parts."""
    return next((name for name in INDICES if (folder / name).is_file()), INDICES[0])


def check_pipeline(folder: Path) -> None:
    """Raises UserError for a folder that is not laid out as diffusers' pipelines are."""
    if not any((folder / name).is_file() for name in INDICES):
        raise UserError(f"{folder} holds no diffusers pipeline: {' or '.join(INDICES)} is missing there.")


def resolve(path: str) -> Path:
    """Return the folder that `path` names.

    Raises UserError if `shipped:NAME` names no shipped folder or a plain path is no folder.
    """
    if path.startswith("shipped:"):
        folder = SHIPPED / path.removeprefix("shipped:")
        if not folder.is_dir():
            names = sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.is_dir() else []
            raise UserError(f"No shipped model {path!r}. Shipped are: {', '.join('shipped:' + n for n in names)}.")
        return folder
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"Folder {path!r} does not exist. Give an existing folder, or shipped:NAME for a shipped model."
        )
    return folder


def resolve_plan(path: str) -> Path:
    """Return the file that `path` names: a plan.json, or `shipped:MODEL/NAME`, one that comes with the package.

    Raises UserError if there is none.
    """
    if not path.startswith("shipped:"):
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"Plan file {path!r} does not exist. Give the path of a plan.json.")
        return file
    name = path.removeprefix("shipped:")
    file = SHIPPED / "plans" / f"{name}.json"
    if not file.is_file():
        names = sorted(str(p.relative_to(SHIPPED / "plans").with_suffix("")) for p in SHIPPED.glob("plans/*/*.json"))
        raise UserError(
            f"No plan {path!r} is shipped; there are {', '.join('shipped:' + n for n in names)}. Search one for this "
            "model with experiment=w4a8_mp_search, or give the path of a plan.json (quant.policy.path=...)."
        )
    return file

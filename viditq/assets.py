"""Where models live: a folder on disk, or `shipped:NAME` for one that comes with the package."""

from pathlib import Path

from viditq.errors import UserError

SHIPPED = Path(__file__).parent / "assets"


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

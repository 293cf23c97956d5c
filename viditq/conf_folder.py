"""The configuration: beside the package in a clone, inside it where it was installed."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
CONF = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if (path / "config.yaml").is_file())

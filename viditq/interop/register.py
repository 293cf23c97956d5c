"""Makes viditq a quantization method of diffusers, whichever of the two is imported first.

`import viditq` takes no time: neither torch nor diffusers is imported for this, only watched for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "viditq"
TABLES = "diffusers.quantizers.auto"  # the module that holds diffusers' tables of methods
CLASSES = "viditq.interop.quantizer"


class _Watch(MetaPathFinder):
    """Finds nothing itself; what others find for TABLES registers once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _add_to(module)

            loader.exec_module = exec_module
        return spec


def register() -> None:
    """At once where diffusers' tables are there already, else as soon as they are."""
    loaded = sys.modules.get(TABLES)
    if loaded is not None and hasattr(loaded, "AUTO_QUANTIZER_MAPPING"):
        _add_to(loaded)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _add_to(tables: Any) -> None:
    if CLASSES in sys.modules and not hasattr(sys.modules[CLASSES], "ViditqQuantizer"):
        return  # it is what imports diffusers, and registers in the end
    classes = import_module(CLASSES)
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = classes.ViditqConfig
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = classes.ViditqQuantizer

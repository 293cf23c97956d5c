"""docs/models.md places every transformer class of the installed diffusers: a new one fails until it is placed."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import diffusers
import diffusers.models.transformers
import pytest
import test_conditions
import test_generic
import yaml

from viditq.models.registry import find_class

ROOT = Path(__file__).parents[2]
STATES = ("own yaml", "verified", "not verified", "refused", "other kind")
ROW = re.compile(r"^\| (\w+) \| (own yaml|verified|not verified|refused|other kind) \| (.+) \|$", re.MULTILINE)
TEXT = (ROOT / "docs" / "models.md").read_text()
LISTED = {name: (state, why) for name, state, why in ROW.findall(TEXT)}
BUILDERS = {build.__name__: build for module in (test_generic, test_conditions) for build in module.KNOWN}


def installed() -> set[str]:
    """Names of the denoisers that diffusers hands out."""
    package, found = diffusers.models.transformers, set()
    for module in pkgutil.iter_modules(package.__path__):
        values = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        classes = {name: value for name, value in values.items() if inspect.isclass(value) and hasattr(diffusers, name)}
        here = f"{package.__name__}.{module.name}"
        found |= {n for n, c in classes.items() if issubclass(c, diffusers.ModelMixin) and c.__module__ == here}
    return found


def test_every_class_is_listed_once() -> None:
    assert LISTED.keys() == installed()
    assert len(ROW.findall(TEXT)) == len(LISTED)
    counts = {state: sum(s == state for s, _ in LISTED.values()) for state in STATES}
    assert f"The {len(LISTED)} transformer classes" in TEXT
    assert ", ".join(f"{state} {count}" for state, count in counts.items()) in TEXT


@pytest.mark.parametrize("name", [name for name, (state, _) in LISTED.items() if state == "own yaml"])
def test_a_class_with_a_yaml_is_that_of_its_pipeline(name: str) -> None:
    (first, *_) = re.findall(r"`([\w.]+)`", LISTED[name][1])
    values = yaml.safe_load((ROOT / "conf" / "model" / f"{first}.yaml").read_text())
    while "pipeline" not in values:
        base = next(one for one in values["defaults"] if isinstance(one, str) and one != "_self_")
        values = yaml.safe_load((ROOT / "conf" / "model" / f"{base}.yaml").read_text())
    parameters = inspect.signature(find_class(values["pipeline"]).__init__).parameters
    assert name in str(parameters["transformer"].annotation)


@pytest.mark.parametrize("name", [name for name, (state, _) in LISTED.items() if state == "verified"])
def test_what_is_called_verified_has_a_test(name: str) -> None:
    (builder,) = re.findall(r"`(\w+)`", LISTED[name][1])
    assert f"diffusers.{name}" in inspect.getsource(BUILDERS[builder])

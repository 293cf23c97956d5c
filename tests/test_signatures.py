"""The source tells what a constructor takes as Python itself would, for every target of the configuration."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object

from viditq.signatures import REQUIRED, arguments_of, unknown_key

CONF = Path(__file__).parents[1] / "conf"


def targets(node: Any) -> set[str]:
    if isinstance(node, dict):
        return {str(v) for k, v in node.items() if k == "_target_"} | {t for v in node.values() for t in targets(v)}
    return {t for value in node for t in targets(value)} if isinstance(node, list) else set()


TARGETS = sorted({t for file in CONF.rglob("*.yaml") for t in targets(yaml.safe_load(file.read_text()))})


def default_of(name: str, parameter: inspect.Parameter, target: Any) -> Any:
    fields = {f.name: f for f in dataclasses.fields(target)} if dataclasses.is_dataclass(target) else {}
    if name in fields and fields[name].default_factory is not dataclasses.MISSING:
        return fields[name].default_factory()
    return REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default


TRAINER = "viditq.engine.trainer.Trainer"


@pytest.mark.parametrize("target", [t for t in TARGETS if t != TRAINER and arguments_of(t) is not None])
def test_as_python_sees_it(target: str) -> None:
    found, taken = arguments_of(target) or {}, inspect.signature(get_object(target)).parameters
    assert list(found) == list(taken)
    for name, parameter in taken.items():
        default = default_of(name, parameter, get_object(target))
        assert found[name] is default or found[name] == default or isinstance(default, tuple) or callable(default)


def test_the_trainer_takes_what_lightning_s_takes() -> None:
    import lightning as L

    assert list(arguments_of(TRAINER) or {}) == [
        "offload",
        "memory_budget",
        "workers",
        *inspect.signature(L.Trainer).parameters,
    ]
    assert (unknown_key({"trainer": {"_target_": TRAINER, "foo": 1}}) or ("",))[0] == "trainer.foo"


def test_most_targets_can_be_read() -> None:
    readable = [target for target in TARGETS if arguments_of(target) is not None]
    assert "viditq.models.adapter.ModelAdapter" in readable and len(readable) > len(TARGETS) / 2


@pytest.mark.parametrize("target", ["torchmetrics.image.PeakSignalNoiseRatio", "viditq.no.Such", "print"])
def test_what_the_source_does_not_tell(target: str) -> None:
    assert arguments_of(target) is None


def test_unknown_keys() -> None:
    spec = {"_target_": "viditq.metrics.paired.RelativeL2", "name": "x"}
    assert unknown_key({"metric": {"a": spec}, "rules": [spec]}) is None
    assert unknown_key({"metric": {"a": spec | {"foo": 1}}}) == ("metric.a.foo", ["name"])
    assert unknown_key({"rules": [spec, {"inner": spec | {"bar": 1}}]}) == ("rules.1.inner.bar", ["name"])
    assert unknown_key({"a": spec | {"_convert_": "all"}}) is None
    assert unknown_key({"a": {"_target_": "elsewhere.Thing", "foo": 1}}) is None

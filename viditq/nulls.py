"""Nulls in the configuration where a value is needed, told by key before anything is built."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from viditq.errors import UserError


def check_nulls(node: Any, key: str, but: Collection[str] = ()) -> None:
    """Raises UserError for the first null under `node` that its `_target_` does not take, as its signature says.

    key: the node's own, such as quant.policy. but: names in `node` for which null means something all the same.
    """
    if not isinstance(node, DictConfig) or node._is_none():
        return
    parameters = _parameters(node)
    for name in map(str, node):
        if OmegaConf.is_missing(node, name):
            continue
        value = node[name]
        needed = name.startswith("_") or (name in parameters and not _takes_none(parameters[name]))
        if value is None and needed and name not in but:
            raise UserError(f"{key}.{name}=null: a value is needed. Leave it as the yaml has it, or give another.")
        check_nulls(value, f"{key}.{name}")


def _parameters(node: DictConfig) -> Mapping[str, inspect.Parameter]:
    target = node.get("_target_")
    return inspect.signature(get_object(target)).parameters if isinstance(target, str) else {}


def _takes_none(parameter: inspect.Parameter) -> bool:
    said = parameter.annotation
    words = said if isinstance(said, str) else str(said)
    optional = any(word in words for word in ("None", "Optional")) or words in ("Any", "typing.Any")
    return said is parameter.empty or parameter.default is None or optional

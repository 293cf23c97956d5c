"""What would run, as `--help` shows it: values in the place of the references that the yamls hold."""

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from viditq.errors import UserError

TO_GIVE = "???"  # as Hydra writes what has no value; the help says so in words


def shown_config(*, _root_: DictConfig) -> str:
    """The configuration of the run as yaml, for the template of the help: `$` is doubled there."""
    found = {key: _value(_root_, key) for key in _root_ if key != "hydra"}
    return OmegaConf.to_yaml(OmegaConf.create(found)).rstrip("\n").replace("$", "$$")


def _value(node: DictConfig | ListConfig, key: Any) -> Any:
    """What a key stands for; of one that only the user can give, `???`, with the reason where there is one."""
    if OmegaConf.is_missing(node, key):
        return TO_GIVE
    try:
        value = node[key]
    except Exception as error:  # a reference to what is not given, or not there
        why: BaseException | None = error
        while why is not None and not isinstance(why, UserError):
            why = why.__cause__ or why.__context__
        return f"{TO_GIVE} ({why})" if why else TO_GIVE
    if isinstance(value, DictConfig):
        return {inner: _value(value, inner) for inner in value}
    if isinstance(value, ListConfig):
        return [_value(value, inner) for inner in range(len(value))]
    return value

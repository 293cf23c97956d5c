"""The float model that codes belong to: its folder, its id on the hub, or the name of a yaml or checkpoint in conf."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from viditq import config
from viditq.assets import is_hub_id
from viditq.checkpoints import checkpoints, known_of
from viditq.conf_folder import CONF
from viditq.errors import UserError, close_names
from viditq.models.adapter import ModelAdapter


def names_yaml(name: str) -> bool:
    """Whether a model has a yaml of this name, or this is MODEL/NAME of conf/checkpoints.yaml."""
    model, _, checkpoint = name.partition("/")
    return checkpoint in checkpoints().get(model, ()) if checkpoint else _is_model(name)


def _is_model(name: str) -> bool:
    return name not in ("", "diffusers") and (CONF / "model" / f"{name}.yaml").is_file()


def float_model(name: str, settings: Sequence[str] = (), path: str | None = None) -> ModelAdapter:
    """Its adapter. settings: such as model.dtype=bfloat16. path: of its folder, where that is not the one of the yaml.

    Raises UserError for an unknown name and what ModelAdapter refuses, Hydra's own error for unknown settings.
    """
    of_yaml = names_yaml(name)
    if not of_yaml:
        if _is_model(name.partition("/")[0]) and "/" in name and not Path(name).expanduser().is_dir():
            raise UserError(f"the model {name} is none that is known.{known_of(name)}")
        if not (name.startswith("shipped:") or is_hub_id(name) or Path(name).expanduser().is_dir()):
            known = sorted(file.stem for file in (CONF / "model").glob("*.yaml"))
            raise UserError(
                f"the model {name}: no folder here, no id on the hub, no yaml of conf/model; {close_names(name, known)}"
            )
        path = name if path is None else path
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", overrides=[f"model={name if of_yaml else 'diffusers'}", *settings]).model
    if path is not None:
        node.path = path
    adapter: ModelAdapter = instantiate(node, _convert_="all")
    return adapter

"""The float model that codes belong to: its folder, its id on the hub, or the name of a yaml of conf/model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from viditq import config
from viditq.assets import is_hub_id
from viditq.cli import CONF
from viditq.errors import UserError, close_names
from viditq.models.adapter import ModelAdapter


def model_config(name: str, settings: Sequence[str] = ()) -> DictConfig:
    """The `model` node of a configuration. settings: such as model.dtype=bfloat16. UserError for an unknown name."""
    known = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
    words = [f"model={name}"]
    is_path = name not in known or name == "diffusers"
    if is_path:
        if not (name.startswith("shipped:") or is_hub_id(name) or Path(name).expanduser().is_dir()):
            raise UserError(
                f"--model {name}: no folder here, no id on the hub, no yaml of conf/model; {close_names(name, known)}"
            )
        words = ["model=diffusers"]
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed: DictConfig = compose("config", overrides=[*words, *settings])
    if is_path:
        composed.model.path = name
    return composed


def float_model(name: str, settings: Sequence[str] = ()) -> ModelAdapter:
    """Its adapter; errors as of `model_config`, of Hydra for settings that are not there, and of ModelAdapter."""
    adapter: ModelAdapter = instantiate(model_config(name, settings).model, _convert_="all")
    return adapter

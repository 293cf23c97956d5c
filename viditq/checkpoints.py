"""Other checkpoints of the models, most of them distilled: what `conf/checkpoints.yaml` lists, as options of Hydra."""

from functools import cache
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from viditq.conf_folder import CONF
from viditq.errors import UserError

FILE = CONF / "checkpoints.yaml"


@cache
def checkpoints() -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> name of a checkpoint -> the fields of ModelAdapter that differ from the model's yaml."""
    found: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def register() -> None:
    """Make them known to Hydra: model=MODEL/NAME is the yaml of MODEL with the checkpoint's values over it."""
    for model, options in checkpoints().items():
        for name, values in options.items():
            node = {"defaults": [f"/model/{model}@_here_", "_self_"], "name": f"{model}_{name}", **values}
            ConfigStore.instance().store(group=f"model/{model}", name=name, node=node)
    OmegaConf.register_new_resolver("merge_first", merge_first, replace=True)


def known_of(option: str) -> str:
    """For MODEL/NAME that is none of them, a sentence that says which there are; empty for other options."""
    model, slash, _ = option.partition("/")
    if not slash:
        return ""
    names = ", ".join(f"{model}/{name}" for name in checkpoints().get(model, ()))
    return f" Checkpoints of {model} beside its own: {names or 'none'} (conf/checkpoints.yaml)."


def merge_first(*lora: str, _root_: DictConfig) -> str:
    """In place of a folder that only the user can make; raises UserError, which says how.

    lora: its id on the hub, and which of its files.
    """
    model = _root_.model
    raise UserError(
        f"{model.name} is {model.path} with a LoRA merged into it ({', '.join(lora)}), which a run does not do. Merge "
        "it first, as docs/lora.md says, and give the folder of the denoisers: model.denoiser_path=FOLDER; or that of "
        "the whole pipeline: model.path=FOLDER model.denoiser_path=null."
    )

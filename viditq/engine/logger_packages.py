"""Loggers that come with an extra of this project: told before any slow work."""

from importlib.util import find_spec

from viditq.errors import UserError, extra_command

NEEDED = {  # function of engine.logging -> extra, modules of which one has to be there
    "tensorboard_logger": ("tensorboard", ("tensorboard", "tensorboardX")),
    "mlflow_logger": ("mlflow", ("mlflow",)),
}


def check_package(logger: str) -> None:
    """Raises UserError where the package of a logger is not installed. logger: the name of its function."""
    extra, modules = NEEDED.get(logger, ("", ()))
    if extra and not any(find_spec(module) for module in modules):
        raise UserError(
            f"logger={extra} needs the package {extra}: {extra_command(extra)}, or pip install {extra}. "
            "logger=wandb, csv and none need nothing more."
        )

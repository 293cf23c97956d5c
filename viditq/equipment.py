"""What a run computes and logs with: its trainer, its logger and the backend of its quantized Linears."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException

from viditq.checks import OF_LOGGERS
from viditq.errors import UserError
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.backends import check_supported, get_backend

GPUS = ("gpu", "cuda")


def make_trainer(node: Any, settings: Mapping[str, Any]) -> L.Trainer:
    """Of the configuration's node, with `settings` on top; raises UserError where it cannot be built."""
    try:
        trainer = instantiate(node, **settings, _convert_="all")
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if node.get("accelerator") in GPUS and not torch.cuda.is_available():
            built = (
                "is built without CUDA" if torch.version.cuda is None and torch.version.hip is None else "finds none"
            )
            raise UserError(
                f"trainer.accelerator={node.accelerator} wants a GPU, and torch {torch.__version__} {built} on this "
                "machine. Use trainer=cpu (trainer=ddp_cpu for several processes), or a machine and a build of torch "
                "for it (nvidia-smi shows the driver's GPUs, CUDA_VISIBLE_DEVICES which of them may be used)."
            ) from error
        if isinstance(cause, MisconfigurationException | ValueError | TypeError):
            given = ", ".join(f"trainer.{key}={value}" for key, value in node.items() if key != "_target_")
            raise UserError(
                f"The trainer cannot be built: {cause} Given: {given}. Use trainer=cpu or trainer=gpu with "
                "trainer.devices=1."
            ) from error
        raise
    strategy = node.get("strategy", "auto")
    if trainer.world_size > 1 and strategy not in ("auto", "ddp"):
        raise UserError(
            f"trainer.strategy={strategy} with trainer.devices={node.devices}: processes share a run by prompts, which "
            "is trainer.strategy=ddp (trainer=ddp_cpu, trainer=ddp)."
        )
    return trainer


def make_logger(node: Any) -> Callable[..., Any]:
    """The logger's function with its own settings; it takes (folder, name, group, run_id).

    Raises UserError for settings that it does not know.
    """
    make = instantiate(node, _partial_=True, _convert_="all")
    try:
        inspect.signature(make).bind(*OF_LOGGERS)
    except (TypeError, ValueError) as error:
        given = ", ".join(str(key) for key in node if key != "_target_")
        raise UserError(
            f"The logger does not take the keys it was given ({given}). conf/logger shows the known ones; "
            "logger=csv and logger=none need none."
        ) from error
    return make


def backend_for(name: str, device: str, plan: QuantPlan) -> str:
    """The backend that runs on this kind of device; on a CUDA device auto is `cuda`, on others emulation.

    Builds its kernels where that is still to be done, and says what each kind of layer gets. Raises UserError where it
    cannot run here, or cannot take a layer.
    """
    if name == "native" and device != "cpu":
        raise UserError(
            f"backend=native multiplies on a CPU, and this run on {device}. Leave backend=auto, or choose trainer=cpu."
        )
    if name in ("triton", "cuda") and device != "cuda":
        raise UserError(
            f"backend={name} multiplies on a CUDA device, and this run on {device}. Leave backend=auto, or choose "
            "trainer=gpu."
        )
    if name == "auto" and device != "cpu":
        name = "cuda" if device == "cuda" else "fake"
    backend = get_backend(name)
    if plan.layers:
        backend.check_available()
    for layer in plan.layers:
        for segment in range(plan.num_segments):
            if (scheme := plan.scheme(layer, segment)) is not None:
                check_supported(backend, layer, scheme)
                backend.resolve(scheme)
    return name

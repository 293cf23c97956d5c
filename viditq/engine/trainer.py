"""Lightning's Trainer with one more setting, and what it does at SIGTERM."""

import signal
from typing import Any

import lightning as L

from viditq.engine.offload import check_offload
from viditq.engine.progress import callbacks
from viditq.errors import UserError

PRECISION = "what models compute in is model.dtype, model.component_dtypes and quant.float_dtype, which results go by."
PART = "it would leave out batches, or count them twice. data.num_prompts says how many prompts there are."
# Setting -> what it may be, and why nothing else.
FIXED: dict[str, tuple[Any, ...]] = {
    "precision": ("32-true", "32", 32, None),
    "plugins": (None,),
    "use_distributed_sampler": (False,),
    "fast_dev_run": (False, 0),
    **dict.fromkeys(("limit_predict_batches", "limit_test_batches"), (None, 1.0)),
    "overfit_batches": (0.0,),
}
WHY = dict.fromkeys(FIXED, PART) | {"precision": PRECISION, "plugins": PRECISION}


class Trainer(L.Trainer):
    """offload: null, or which models lie on the CPU while they do not compute (model | sequential), for small GPUs; or
    disk, on a CPU: weights of denoisers stay in their files, those of the quantized one within memory_budget bytes.
    workers: at most so many processes make batches of a small model side by side on a CPU (None: one a thread).

    Everything else is Lightning's own, but for what would change samples or leave some out without being part of any
    result's key. Raises UserError for that, and where `offload` cannot be had.
    """

    def __init__(
        self,
        *,
        offload: str | None = None,
        memory_budget: int | str = 10**9,
        workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        for key, value in kwargs.items():
            kinds = [(type(allowed), allowed) for allowed in FIXED.get(key, (value,))]  # 1 batch is not 1.0 of all
            if (type(value), value) not in kinds:
                raise UserError(f"trainer.{key}={value}: {WHY[key]} Leave it out, or give {FIXED[key][0]}.")
        given = kwargs.pop("callbacks", None) or []
        given = given if isinstance(given, list) else [given]
        bar = kwargs.get("enable_progress_bar") in (None, True)
        super().__init__(callbacks=callbacks(given, bar), **kwargs)
        check_offload(offload, self.strategy.root_device)
        if not (workers is None or (type(workers) is int and workers >= 0)):
            raise UserError(f"trainer.workers={workers} is no number of processes. Give null, 0 or a whole number.")
        self.offload, self.memory_budget, self.workers = offload, memory_budget, workers


def heed_sigterm(trainer: L.Trainer) -> None:
    """Stop at SIGTERM, between batches and after the last, with status 143.

    Lightning notes it, but its predict loop goes on, and its test loop ends with status 0.
    """
    if trainer.received_sigterm:
        raise SystemExit(128 + signal.SIGTERM)

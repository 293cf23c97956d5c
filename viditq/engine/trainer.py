"""Lightning's Trainer with one more setting."""

from typing import Any

import lightning as L

from viditq.engine.offload import check_offload


class Trainer(L.Trainer):
    """offload: null, or which models lie on the CPU while they do not compute (model | sequential), for small GPUs.

    Everything else is Lightning's own. Raises UserError where `offload` cannot be had.
    """

    def __init__(self, *, offload: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_offload(offload, self.strategy.root_device)
        self.offload = offload

"""One Lightning module for every tiny training: a network, batches drawn per step, a loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from viditq.tiny.optimizer import MasterAdamW

Batch = dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """Optimizer settings: peak learning rate, number of steps, share of them over which the rate decays to zero."""

    steps: int
    lr: float
    decay: float = 0.4
    warmup: int = 100
    ema_decay: float = 0.998

    def factor(self, step: int) -> float:
        """Learning rate at `step` as a fraction of the peak: linear warm-up, flat, linear decay."""
        left = (self.steps - step) / max(1, int(self.decay * self.steps))
        return max(0.0, min(1.0, (step + 1) / self.warmup, left))


class Trainee(L.LightningModule):
    """Trains `net` in bfloat16 with float32 masters; each step draws its batch from (seed, step): resuming is exact.

    masks: by name of a parameter, 0 where it stays as it is; such parameters have no weight decay.
    """

    def __init__(
        self,
        net: nn.Module,
        draw: Callable[[torch.Generator], Batch],
        loss: Callable[[Any, Batch], Tensor],
        schedule: Schedule,
        seed: int,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.net = net.to(torch.bfloat16).train()
        self.masked = [self.net.get_parameter(name) for name in masks or {}]
        for param, mask in zip(self.masked, (masks or {}).values(), strict=True):
            param.register_hook(partial(torch.mul, mask.to(torch.bfloat16)))
        self.draw, self.loss, self.schedule, self.seed = draw, loss, schedule, seed

    def training_step(self, _: list[Tensor], batch_idx: int) -> Tensor:
        """Draw, forward, log."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)
        loss = self.loss(self.net, self.draw(generator))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """MasterAdamW with the schedule's learning rate."""
        optimizer = MasterAdamW(
            self.net.parameters(), self.schedule.lr, ema_decay=self.schedule.ema_decay, undecayed=self.masked
        )
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def averaged(self) -> nn.Module:
        """The network with its averaged weights, float32, in evaluation mode."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer) and isinstance(optimizer.optimizer, MasterAdamW)
        average = optimizer.optimizer.average()
        for param, value in average.items():
            param.data = value.clone()
        self.net.float()
        return self.net.eval().requires_grad_(False)

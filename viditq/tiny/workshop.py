"""The workshop: folders of one training, its stages' schedules, and what finished stages hand to the next."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from viditq.data.moving_shapes import ATTRIBUTES
from viditq.errors import UserError
from viditq.tiny import losses, networks
from viditq.tiny.trainee import Batch, Schedule, Trainee

SCHEDULES = {
    "judge": Schedule(steps=3000, lr=2e-3, decay=0.7),
    "vae": Schedule(steps=4500, lr=2.5e-3, decay=0.8),
    "text": Schedule(steps=400, lr=2e-3, warmup=20),
    "clip": Schedule(steps=1000, lr=1.5e-3, decay=0.8),
    "image": Schedule(steps=3500, lr=1.5e-3, decay=0.5),
    "video": Schedule(steps=4500, lr=1e-3, decay=0.5),
    "image_hard": Schedule(steps=3500, lr=1.5e-3, decay=0.5),
    "image_hard_mild": Schedule(steps=1000, lr=8e-4, decay=0.7),
    "video_hard": Schedule(steps=4500, lr=1e-3, decay=0.5),
    "video_hard_steep": Schedule(steps=2400, lr=8e-4, decay=0.7),
    "vae_i2v": Schedule(steps=2500, lr=2.5e-3, decay=0.8),
    "vae_i2v_fine": Schedule(steps=1200, lr=2e-3, decay=0.8),
    "vae_i2v_decoder": Schedule(steps=1500, lr=2e-3, decay=0.8),
    "i2v": Schedule(steps=4000, lr=1.5e-3, decay=0.5),
}


@dataclass(frozen=True)
class Workshop:
    """Folders, seed and step cap of one training; finished networks are files in `work`."""

    work: Path
    out: Path
    seed: int = 0
    max_steps: int | None = None

    def train(
        self,
        stage: str,
        net: Any,
        draw: Callable[[torch.Generator], Batch],
        loss: Callable[[Any, Batch], Tensor],
        masks: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Train `net` unless its file exists; resumes from the stage's last checkpoint. masks: as Trainee's."""
        target = self.work / f"{stage}.safetensors"
        if target.exists():
            net.load_state_dict(load_file(target))
            print(f"{stage}: done before ({target})")
            return net.eval().requires_grad_(False)
        schedule = SCHEDULES[stage]
        steps = min(schedule.steps, self.max_steps or schedule.steps)
        trainee = Trainee(net, draw, loss, schedule, self.seed, masks)
        folder = self.work / "checkpoints" / stage
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=1.0,
            logger=CSVLogger(self.work, name="logs", version=stage),
            callbacks=[ModelCheckpoint(folder, every_n_train_steps=200, save_last=True), TQDMProgressBar(20)],
            enable_model_summary=False,
        )
        last = folder / "last.ckpt"
        print(f"{stage}: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {steps} steps")
        ticks = DataLoader(TensorDataset(torch.arange(steps)))  # batches are drawn by the trainee
        trainer.fit(trainee, ticks, ckpt_path=str(last) if last.exists() else None, weights_only=True)
        net = trainee.averaged()
        save(net, target)
        return net

    def exported(self, part: str) -> dict[str, Tensor]:
        """The weights of tiny_image's VAE, text encoder or denoiser in `out`, float32."""
        files = list((self.out / "tiny_image" / part).glob("*.safetensors"))
        if not files:
            raise UserError(f"{self.out / 'tiny_image' / part} has no weights; run the stages before this one first.")
        print(f"{part}: from {files[0]}")
        return {name: tensor.float() for name, tensor in load_file(files[0]).items()}

    @cached_property
    def vae(self) -> Any:
        net, trained = networks.vae(), self.work / "vae_unit.safetensors"
        net.load_state_dict(load_file(trained) if trained.exists() else self.exported("vae"))
        return net.eval().requires_grad_(False)

    @cached_property
    def text_encoder(self) -> Any:
        net = networks.text_encoder()
        if not (self.work / "text.safetensors").exists():
            net.load_state_dict(self.exported("text_encoder"), strict=False)  # embeddings are stored once, named twice
            return net.eval().requires_grad_(False)
        probe = losses.TextProbe(net, {k: len(v) for k, v in ATTRIBUTES.items()})
        probe.load_state_dict(load_file(self.work / "text.safetensors"))
        return net.eval().requires_grad_(False)


def save(net: nn.Module, path: Path) -> None:
    """Write the weights of a finished network, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous().clone() for k, v in net.state_dict().items()}, temporary)
    temporary.rename(path)

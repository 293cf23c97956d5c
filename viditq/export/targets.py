"""The programs that artifacts can be written for, by the name that `--to` takes.

A target's module has `export(artifact, out)`, or `export(artifact, out, requantize)` where it `requantizes`: it refuses
before it writes, and then writes `out` whole or not at all. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from viditq.errors import UserError, close_names


@dataclass(frozen=True)
class Target:
    """module: with `export`. what: one line for the help. suffix: of the file that it writes; empty = a folder.

    requantizes: whether it can turn what the program cannot hold into what it can.
    """

    module: str
    what: str
    suffix: str = ""
    requantizes: bool = False

    def load(self) -> ModuleType:
        return import_module(self.module)


TARGETS = {
    "diffusers": Target("viditq.export.diffusers", "a whole pipeline's folder; every scheme goes"),
    "torchao": Target("viditq.export.torchao", "a whole pipeline's folder, for diffusers with torchao, without viditq"),
    "sdnq": Target("viditq.export.sdnq", "a whole pipeline's folder, for diffusers with SDNQ", requantizes=True),
    "vllm-omni": Target("viditq.export.vllm_omni", "a whole pipeline's folder, int8, for vllm-omni", requantizes=True),
    "comfyui": Target("viditq.export.comfyui", "one file with the original release's names", ".safetensors", True),
}


def target_of(name: str) -> Target:
    """Raises UserError with the known names."""
    if name not in TARGETS:
        raise UserError(f"--to {name} is unknown; {close_names(name, TARGETS)}")
    return TARGETS[name]

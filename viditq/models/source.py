"""Where a model's files are: a folder, a model shipped with the package, or a repository on the hub."""

from dataclasses import dataclass
from pathlib import Path

from viditq.assets import check_pipeline, is_hub_id, resolve
from viditq.errors import UserError
from viditq.files import digest_of
from viditq.models import hub


@dataclass(frozen=True)
class Source:
    """path: a folder in the diffusers layout, shipped:NAME, or a hub id, there of `revision` (weights of `variant`)."""

    path: str
    revision: str
    variant: str | None = None

    @property
    def of_hub(self) -> bool:
        """Whether it is named by its id on the hub."""
        return is_hub_id(self.path)

    def pipeline(self, weights: bool) -> Path:
        """The pipeline's folder, of the hub without `weights` its descriptions alone; UserError if there is none."""
        folder = hub.fetch(self.path, self.revision, weights, self.variant) if self.of_hub else resolve(self.path)
        check_pipeline(folder)
        return folder

    def part(self, name: str, weights: bool) -> Path:
        """The folder of one part, of a source that need not hold a whole pipeline; UserError if there is none."""
        if self.path.endswith(".safetensors") and not self.of_hub:
            raise UserError(
                f"{self.path} is one file, where a folder with {name}/config.json is needed. Make one of it first: "
                f"viditq import {self.path} --model MODEL --out FOLDER"
            )
        root = hub.fetch_part(self.path, self.revision, name, weights) if self.of_hub else resolve(self.path)
        if not (root / name / "config.json").is_file():
            raise UserError(f"{root} holds no {name}: {name}/config.json is missing there.")
        return root / name

    def fingerprint(self, folder: Path) -> str:
        """Hash of the files in `folder`: names, sizes and the first and last MiB of each; on the hub, the commit."""
        if self.of_hub:
            return hub.commit(folder)[:16]
        return digest_of(sorted(p for p in folder.rglob("*") if p.is_file()), folder)

"""A quantization that another library makes while diffusers loads the denoiser: what it is, and whether it is here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from viditq.errors import UserError, extra_command
from viditq.files import read_mapping
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.recipe import Recipe

# quant_method of a folder's config.json -> what diffusers needs for it. Others: diffusers says so itself.
NEEDS = {
    "torchao": "torchao>=0.15",
    "sdnq": "sdnq>=0.2",
    "quanto": "optimum-quanto>=0.2.6",
    "bitsandbytes": "bitsandbytes>=0.43.3",
}
GPU_ALONE = ("bitsandbytes",)  # diffusers 0.42 refuses it elsewhere, though the library has kernels for a CPU


@dataclass(frozen=True)
class ExternalQuantization:
    """What stands in the place of a recipe of ours (conf/quant/external).

    library: who quantizes. config: the quantization_config of diffusers, as Hydra builds it; None = the folder has its
    own. path: a pipeline's or denoiser's folder that was quantized before, or a denoiser's GGUF file; None = the
    model's own weights are quantized while they are loaded. takes: what path has to be, folder or gguf.
    weight_bits, activation_bits: what it counts as; None for weights = counted from the bytes of its tensors.
    skips: the argument of config that names modules to leave in float, skip_as: how it writes them ({name}, or {last},
    the last word of the name); with keep_float it is given those that the model keeps in float (model.keep_float), as
    our recipes do; else the library chooses.
    requires: packages with versions, as pip writes them. devices: kinds it runs on. instead: what to take elsewhere.
    Raises UserError for packages and files that are not there.
    """

    library: str
    config: Mapping[str, Any] | None
    weight_bits: float | None
    activation_bits: float
    requires: Sequence[str]
    devices: Sequence[str] = ("cpu", "cuda")
    skips: str | None = None
    skip_as: str = "{name}"
    keep_float: bool = True
    path: str | None = None
    takes: str | None = None
    instead: str = ""

    def __post_init__(self) -> None:
        for name, bits in {"weight_bits": self.weight_bits, "activation_bits": self.activation_bits}.items():
            if bits is not None and not 0 < bits <= 16:
                raise UserError(f"quant.policy.{name}={bits}: bits are numbers of at most 16 (16 = float).")
        self._check_path()
        for text in self.packages:
            _check_package(text, self.instead)

    def _check_path(self) -> None:
        if self.takes == "gguf" and not (self.place.is_file() and self.place.suffix == ".gguf"):
            raise UserError(f"quant.policy.path={self.path} is no GGUF file: give that of the denoiser, NAME.gguf.")
        if self.takes == "folder":
            if not self.place.is_dir():
                raise UserError(
                    f"quant.policy.path={self.path} is no folder: give a pipeline's, or a denoiser's, with config.json."
                )
            self.methods()

    @property
    def place(self) -> Path:
        """Where `path` is."""
        return Path(str(self.path)).expanduser()

    def methods(self) -> list[str]:
        """The quant_method of each quantized part of the folder that is diffusers' own; UserError if there is none."""
        inside = [self.place / "config.json", *sorted(self.place.glob("*/config.json"))]
        configs = [read_mapping(file, []) for file in inside if file.is_file()]
        found = [config.get("quantization_config") for config in configs if "_class_name" in config]
        methods = [str(config.get("quant_method")) for config in found if isinstance(config, Mapping)]
        if not methods:
            raise UserError(
                f"{self.path}: no config.json there has a quantization_config, so nothing in it is quantized. Give the "
                "folder that save_pretrained of a quantized pipeline or denoiser has written."
            )
        return [method for i, method in enumerate(methods) if method not in methods[:i]]

    @property
    def who(self) -> str:
        """The library's name, of a folder the method's."""
        return " and ".join(self.methods()) if self.takes == "folder" else self.library

    @property
    def packages(self) -> list[str]:
        """What has to be installed, in pip's words."""
        of_folder = [NEEDS[method] for method in self.methods() if method in NEEDS] if self.takes == "folder" else []
        return [*self.requires, *of_folder]

    @property
    def versions(self) -> dict[str, str]:
        """Package -> the version that is installed."""
        return {name: version(name) for name in (Requirement(text).name for text in self.packages)}

    @property
    def files(self) -> Sequence[Path]:
        """All that it reads."""
        if self.path is None:
            return []
        return [self.place] if self.place.is_file() else sorted(p for p in self.place.rglob("*") if p.is_file())

    def check_device(self, device: str) -> None:
        """Raises UserError where it does not run on this kind of device."""
        on_gpu_alone = self.takes == "folder" and any(method in GPU_ALONE for method in self.methods())
        if device not in (["cuda"] if on_gpu_alone else self.devices):
            raise UserError(
                f"quant=external: {self.who} in diffusers does not run on {device}, where this run would be. "
                + (self.instead or "Choose trainer=gpu on a machine with one.")
            )

    def plan(self, recipe: Recipe, linear_names: Sequence[str], keep_float: Sequence[str]) -> QuantPlan:
        """None of the Linears is quantized by us."""
        return QuantPlan((0.0, 1.0), {}, {})


def _check_package(text: str, instead: str) -> None:
    needed = Requirement(text)
    try:
        found = version(needed.name)
    except PackageNotFoundError:
        found = None
    if found is None or not needed.specifier.contains(found, prereleases=True):
        state = "is not installed" if found is None else f"{found} is installed"
        remedy = f'{extra_command("rivals")}, or pip install "{text}"'
        raise UserError(f"quant=external needs {text}, and {needed.name} {state}: {remedy}. {instead}".rstrip())

"""A quantized denoiser on disk: plan.json, meta.json and safetensors files in one folder; no pickle.

Format 3: the tensors lie in model.safetensors, or in shards with an index in the form of Hugging Face
(model.safetensors.index.json), and meta.json holds a digest of each, which is checked when that tensor is first read.
Format 2 had one file and one digest of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.files import is_whole
from viditq.mapped import in_pieces, mapped_tensors
from viditq.quant.calibration.context import StepContext
from viditq.quant.convert import build_quantized
from viditq.quant.correction.ptqd import attach_empty
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.linear import quant_linears
from viditq.quant.execution.residency import Residency

FORMAT_VERSION, READABLE = 3, (2, 3)
AGAIN = "delete the folder and quantize again"
META, PLAN, MODEL = "meta.json", "plan.json", "model.safetensors"
INDEX = f"{MODEL}.index.json"
CARD, PICTURES = "README.md", ("comparison.gif", "comparison.png")  # for its readers; no part of the model
OWN_KEYS = ("format_version", "timestep_scale", "dtypes", "widened", "equal", "digests", "sha256")


class StoredTensors:
    """The tensors of an artifact, mapped from its files; none is read before it is looked at.

    The names are those of the denoiser's state: a tensor that equals another is stored once.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], files: Mapping[Path, str] | None = None) -> None:
        """meta: digests, equal and widened. files: path -> what begins the names of its tensors; None = those of the
        artifact.
        """
        self.folder, self._digests, self._equal = folder, meta.get("digests"), meta["equal"]
        self._stored: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        files = {folder / name: "" for name in model_files(folder)} if files is None else files
        for path, prefix in files.items():
            try:
                found = {f"{prefix}{name}": tensor for name, tensor in mapped_tensors(path).items()}
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{path} is truncated or was altered ({error}); {AGAIN}") from error
            self._stored |= found
            self._files |= dict.fromkeys(found, path)
        for name in {} if self._digests is None else self._stored.keys() ^ self._digests.keys():
            path = self._files.get(name, next(iter(files), folder))
            raise UserError(f"{path} was altered ({name} is not as told); {AGAIN}")
        self._checked: set[str] = set()
        widened = meta["widened"]
        self.runs: dict[str, torch.dtype] = {
            name: getattr(torch, widened[name]) if isinstance(widened, dict) else torch.float32 for name in widened
        }
        """What runs in a wider type than it is stored in."""
        self.runs |= {name: self.runs[other] for name, other in self._equal.items() if other in self.runs}

    def state(self) -> dict[str, Tensor]:
        """Name -> tensor in the type that it is stored in."""
        return self._stored | {name: self._stored[other] for name, other in self._equal.items()}

    def run_state(self) -> dict[str, Tensor]:
        """The same in the type that it runs in; what is stored once is in memory once."""
        runs = {name: tensor.to(self.runs.get(name, tensor.dtype)) for name, tensor in self._stored.items()}
        return runs | {name: runs[other] for name, other in self._equal.items()}

    def of(self, name: str) -> Tensor:
        """One of `state`; raises UserError where it is not as it was written."""
        self.check([name])
        return self.state()[name]

    def check(self, names: Iterable[str]) -> None:
        """Raises UserError for a tensor whose bytes are not those that were written; each is read once."""
        if self._digests is None:  # format 2: its file was checked as a whole
            return
        for name in (self._equal.get(name, name) for name in names):
            if name in self._stored and name not in self._checked:
                if tensor_digest(self._stored[name]) != self._digests[name]:
                    raise UserError(f"{self._files[name]} was altered (the sha256 of {name} does not match); {AGAIN}")
                self._checked.add(name)

    def check_all(self) -> None:
        """The same for all of them."""
        self.check(self._stored)


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes as they are stored."""
    digest = hashlib.sha256()
    for piece in in_pieces(tensor):
        digest.update(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_denoiser(
    folder: str | Path,
    build: Callable[[], nn.Module],
    backend: str = "fake",
    memory_budget: int | None = None,
) -> tuple[nn.Module, QuantPlan, dict[str, Any], StepContext]:
    """The quantized denoiser, its plan, its meta and its attached context.

    build: returns the float denoiser; its parameters may be on meta, its non-persistent buffers must be real.
    memory_budget: bytes that its weights may take in memory (on a CPU): they stay in their files, and what a backend
    makes of them is made when a layer is called; 0 = for that call alone; None = all of it is made here, and kept.
    Raises UserError for a missing, truncated or altered file (with a budget: when the tensor is first read).
    """
    folder = Path(folder)
    meta = read_meta(folder)
    plan = QuantPlan.from_json((folder / PLAN).read_text())
    denoiser = build()
    context = fill(denoiser, plan, meta, StoredTensors(folder, meta), backend, memory_budget)
    return denoiser, plan, meta, context


def fill(
    denoiser: nn.Module,
    plan: QuantPlan,
    meta: Mapping[str, Any],
    stored: StoredTensors,
    backend: str,
    memory_budget: int | None,
) -> StepContext:
    """QuantLinears in a denoiser that was just built, on stored tensors; returns its context.

    meta: timestep_scale and dtypes. The rest, and errors: as of `load_denoiser`.
    """
    context = build_quantized(denoiser, plan, backend, meta["timestep_scale"])
    for name, layer in quant_linears(denoiser).items():
        for variant in layer.variants:
            variant.dtype = getattr(torch, meta["dtypes"][name])
    tensors = stored.state()
    if memory_budget is None:
        stored.check_all()
        tensors = stored.run_state()
    attach_empty(denoiser, tensors, context)
    check_fits(denoiser, tensors, f"{stored.folder} does not fit this model", "build the model it was made from")
    denoiser.load_state_dict(tensors, assign=True)
    on_meta = [name for name, t in (*denoiser.named_parameters(), *denoiser.named_buffers()) if t.is_meta]
    assert not on_meta, f"build() left non-persistent buffers on meta: {on_meta[:3]}"
    if memory_budget is not None:
        Residency(memory_budget, stored.check).attach(denoiser, quant_linears(denoiser), stored.runs)
        return context
    for layer in quant_linears(denoiser).values():
        layer.prepare()
    return context


def model_files(folder: Path) -> list[str]:
    """The names of the files that hold the tensors."""
    if not (folder / INDEX).is_file():
        return [MODEL]
    try:
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / INDEX} is damaged; {AGAIN}") from None


def broken_file(folder: Path) -> Path | None:
    """The first file of an artifact that is missing or was cut off; its values are not read."""
    for encoder in encoder_folders(folder):
        if (bad := broken_file(encoder)) is not None:
            return bad
    names = [PLAN, META, *([INDEX] if (folder / INDEX).exists() else [])]
    bad = next((folder / name for name in names if not is_whole(folder / name)), None)
    return bad or next((folder / name for name in model_files(folder) if not is_whole(folder / name)), None)


def read_meta(folder: str | Path) -> dict[str, Any]:
    """meta.json, after checking that every file is there and that none is of another version or was altered.

    Tensors of format 3 are checked when they are read (`StoredTensors`); a file that was cut off is found here.
    """
    folder = Path(folder)
    names = [META, PLAN, *model_files(folder)]
    absent = [name for name in names if not (folder / name).is_file()]
    if len(absent) == len(names):
        what = "holds no quantized model" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {what}: give the folder `quantized` of a run whose stage quantize is done")
    if absent:
        raise UserError(f"{folder} is no whole quantized model: {absent[0]} is missing; {AGAIN}")
    try:
        meta = json.loads((folder / META).read_text())
        version, digests = meta["format_version"], dict(meta["sha256"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / META} is damaged; {AGAIN}") from None
    if version not in READABLE:
        readable = " and ".join(map(str, READABLE))
        raise UserError(f"{folder} has format version {version}; this program reads {readable}; {AGAIN}")
    whole = [PLAN, MODEL] if version == 2 else [PLAN, *([INDEX] if (folder / INDEX).is_file() else [])]
    found = {META: meta_sha256(meta)} | {name: file_sha256(folder / name) for name in whole}
    for name in found.keys() | digests.keys():
        if found.get(name) != digests.get(name):
            raise UserError(f"{folder / name} is truncated or was altered (its sha256 does not match); {AGAIN}")
    cut = next((folder / name for name in names[2:] if not is_whole(folder / name)), None)
    if cut is not None:
        raise UserError(f"{cut} is truncated or was altered; {AGAIN}")
    return {"equal": {}, **meta}


def verify(folder: str | Path) -> int:
    """Read every byte of an artifact; returns how many. Raises UserError for the first file that is not as written."""
    folder = Path(folder)
    for part in (folder, *encoder_folders(folder)):
        StoredTensors(part, read_meta(part)).check_all()
    return size_bytes(folder)


def encoder_folders(folder: Path) -> list[Path]:
    """The folders of quantized text encoders, which lie in the denoiser's."""
    return sorted(path for path in folder.iterdir() if path.is_dir())


def denoiser_bytes(folder: Path) -> int:
    """Bytes of an artifact without its text encoders."""
    return size_bytes(folder) - sum(map(size_bytes, encoder_folders(folder)))


def size_bytes(folder: str | Path) -> int:
    """Bytes of all files of an artifact but for its card."""
    files = (path for path in Path(folder).rglob("*") if path.name not in (CARD, *PICTURES) and path.is_file())
    return sum(path.stat().st_size for path in files)


def check_fits(model: nn.Module, tensors: Mapping[str, Tensor], files: str, remedy: str) -> None:
    """Raises UserError where names or shapes differ from the model's; files, remedy: for its message."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differing = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if differing:
        name = differing[0]
        raise UserError(
            f"{files}: {name} is {found.get(name, 'absent')} in the file and {wanted.get(name, 'absent')} in the "
            f"model; {remedy}"
        )


def meta_sha256(meta: Mapping[str, Any]) -> str:
    """Digest of everything in meta.json but the digests of files."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

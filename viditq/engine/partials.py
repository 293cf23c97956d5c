"""What an unfinished pass over batches has gathered: one file per process, each saying which batches it holds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from viditq.errors import UserError
from viditq.files import write_tensors

State = dict[str, Tensor]
PARTIAL = "partial-*.safetensors"


@dataclass(frozen=True)
class Partial:
    """`done`: numbers of the batches that `state` is made of."""

    done: frozenset[int]
    state: State


@dataclass(frozen=True)
class Partials:
    """The files `partial-<rank>.safetensors` of `folder`; `merge` joins the states of disjoint sets of batches."""

    folder: Path
    merge: Callable[[State, State], State]

    def path(self, rank: int) -> Path:
        """The file of one process."""
        return self.folder / f"partial-{rank}.safetensors"

    def save(self, rank: int, partial: Partial) -> None:
        """Replace the file of process `rank`."""
        write_tensors(self.path(rank), partial.state, {"done": " ".join(map(str, sorted(partial.done)))})

    def gathered(self) -> Partial:
        """Everything on disk as one; a file whose batches another one holds as well was left by a kill."""
        found = sorted((_load(path) for path in self._files()), key=lambda p: len(p.done), reverse=True)
        whole = Partial(frozenset(), {})
        for partial in found:
            if not partial.done <= whole.done:
                assert not partial.done & whole.done, "files share some batches but not all"
                state = self.merge(whole.state, partial.state) if whole.state else partial.state
                whole = Partial(whole.done | partial.done, state)
        return whole

    def compact(self) -> frozenset[int]:
        """Gather everything in the file of process 0, whatever number of processes wrote; returns what is done."""
        whole = self.gathered()
        if whole.done:
            self.save(0, whole)
        for path in self._files():
            if path != self.path(0):
                path.unlink()
        return whole.done

    def remove(self) -> None:
        """Delete all files."""
        for path in self._files():
            path.unlink()

    def load(self, rank: int) -> Partial:
        """The file of process `rank`, empty if there is none."""
        path = self.path(rank)
        return _load(path) if path.is_file() else Partial(frozenset(), {})

    def only(self) -> Path | None:
        """The file that holds everything by itself."""
        files = self._files()
        return files[0] if len(files) == 1 else None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(PARTIAL))


def _load(path: Path) -> Partial:
    try:
        with safe_open(path, "pt") as file:
            done = frozenset(int(number) for number in file.metadata()["done"].split())
        return Partial(done, load_file(path))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it: its batches are then done anew.") from error

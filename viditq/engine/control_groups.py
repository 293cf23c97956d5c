"""What the control groups of this process (Linux, version 2 or 1) allow it: cores' time and memory."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_quota(groups: Path = CGROUPS, own: Path = OWN_GROUPS) -> float | None:
    """How many cores' time they allow; None without a limit."""
    return _least("cpu", _quota, groups, own)


def memory_left(groups: Path = CGROUPS, own: Path = OWN_GROUPS) -> int | None:
    """How many more bytes they allow, what of files can be dropped included; None without a limit."""
    left = _least("memory", _left, groups, own)
    return None if left is None else int(left)


def _least(controller: str, limit: Callable[[Path], float | None], groups: Path, own: Path) -> float | None:
    found = [limit(level) for level in _levels(controller, groups, own)]
    return min((value for value in found if value is not None), default=None)


def _levels(controller: str, groups: Path, own: Path) -> Iterator[Path]:
    """Folders of this process's groups that `controller` may limit, each with those above it."""
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = groups / controllers if controllers else groups
        folder = root / path.strip("/")
        yield from (level for level in (folder, *folder.parents) if level == root or root in level.parents)


def _quota(level: Path) -> float | None:
    with suppress(OSError, ValueError):  # not a control group, or no limit: "max"
        if (level / "cpu.max").is_file():
            quota, period = (level / "cpu.max").read_text().split()
        else:
            quota, period = ((level / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if float(quota) > 0:
            return float(quota) / float(period)
    return None


def _left(level: Path) -> float | None:
    names = ("memory.max", "memory.current", "inactive_file")
    if not (level / names[0]).is_file():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    with suppress(OSError, ValueError, KeyError):  # not a control group, or no limit: "max"
        limit, used = (int((level / name).read_text()) for name in names[:2])
        stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat[names[2]]))
    return None

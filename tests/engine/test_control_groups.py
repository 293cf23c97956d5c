"""Limits of control groups, of both versions and at every level."""

from pathlib import Path

import pytest

from viditq.engine.control_groups import cpu_quota, memory_left


def write(tmp_path: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """The groups' folder and the process's file."""
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "groups", tmp_path / "own"


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "400000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        ("0::/gone\n", {}, None),
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("4:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpuset:/x\n", {"cpuset/x/cpu.cfs_quota_us": "100000\n", "cpuset/x/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_quotas_of_control_groups(own: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cpu_quota(*write(tmp_path, own, files)) == quota


V2 = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 600\ninactive_file 100\n"}
V1 = {
    "memory.limit_in_bytes": "1000\n",
    "memory.usage_in_bytes": "950\n",
    "memory.stat": "inactive_file 0\ntotal_inactive_file 10\n",
}


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/a/b\n", {f"a/{name}": text for name, text in V2.items()}, 400),
        ("0::/a\n", {f"a/{name}": text for name, text in V2.items()} | {"a/memory.current": "1200\n"}, 0),
        ("0::/a\n", {f"a/{name}": text for name, text in V2.items()} | {"a/memory.max": "max\n"}, None),
        ("4:memory:/x\n0::/\n", {f"memory/x/{name}": text for name, text in V1.items()}, 60),
        ("4:cpu:/x\n", {f"memory/x/{name}": text for name, text in V1.items()}, None),
    ],
)
def test_memory_of_control_groups(own: str, files: dict[str, str], left: int | None, tmp_path: Path) -> None:
    """What of files can be dropped counts as left; the process's own group need not have a limit."""
    assert memory_left(*write(tmp_path, own, files)) == left

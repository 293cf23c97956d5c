"""Where something grows before it is put in its place: resumed, held by one process, never somebody else's folder."""

from pathlib import Path

import pytest

from viditq.errors import UserError
from viditq.work_folder import end, held, resume, work_folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return work_folder(tmp_path / "out")


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_same_key_goes_on_and_another_begins_anew(work: Path) -> None:
    with held(work):
        resume(work, {"of": (1, 2)})
        (work / "part").mkdir()
        (work / "part" / "shard").write_text("whole")
        resume(work, {"of": [1, 2]})
        assert (work / "part" / "shard").exists()
        resume(work, {"of": [3]})
        assert not (work / "part").exists()
        end(work)
        assert not content(work)


def test_what_a_killed_writer_had_open_is_gone(work: Path) -> None:
    resume(work, 1)
    (work / "part").mkdir()
    for name in (".shard.safetensors.123.tmp", "part/.shard.safetensors.123.tmp", "part/shard"):
        (work / name).write_text("")
    with held(work):
        resume(work, 1)
        assert content(work) == {"key.json", ".lock", "part"} and content(work / "part") == {"shard"}


def test_one_process_at_a_time(work: Path) -> None:
    with held(work):
        with pytest.raises(UserError, match="is being written by another process"), held(work):
            pass
        resume(work, 1)
    with held(work):
        pass


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_is_not_ours_stays(what: str, work: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    if what == "folder":
        mine.rename(work)
    elif what == "file":
        work.write_text("mine")
    else:
        work.symlink_to(mine)
    for begin in (lambda: resume(work, 1), lambda: held(work).__enter__()):
        with pytest.raises(UserError, match="and is not of viditq"):
            begin()
    kept = work if what == "file" else (work if what == "folder" else mine) / "notes.txt"
    assert kept.read_text() == "mine"


def test_a_folder_that_was_just_begun_is_ours(work: Path) -> None:
    work.mkdir()
    (work / ".key.json.123.tmp").write_text("{")
    with held(work):
        resume(work, 1)
        assert content(work) == {"key.json", ".lock"}

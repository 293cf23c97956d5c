"""Folders that a run may take, and those that it may not."""

from pathlib import Path

import pytest

from viditq.errors import UserError
from viditq.files import lock, write_json
from viditq.run_dir import RunDir, check_place


@pytest.mark.parametrize("left", [[], ["hydra/config.yaml"], ["viditq.log"], [".lock", ".run.json.7.tmp"]])
def test_new_empty_or_just_begun(left: list[str], tmp_path: Path) -> None:
    """What a run that was killed at its start has left is no hindrance."""
    for name in left:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("")
    assert check_place(tmp_path / "run") == tmp_path / "run"
    with RunDir(tmp_path / "run", {"seed": 0}).held():
        pass


def test_a_run_may_hold_what_it_likes(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"seed": 0})
    (tmp_path / "notes.txt").write_text("mine")
    check_place(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "samples/000000.png", ".git/config", "quantized/model.safetensors"])
def test_files_of_others(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"such as {name.split('/')[0]}.*hydra.run.dir=FOLDER"):
        RunDir(tmp_path, {}).held().__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [name.split("/")[0]], "nothing is written"


def test_the_lock_alone_is_of_a_run(tmp_path: Path) -> None:
    with lock(tmp_path, lambda: None):
        check_place(tmp_path)

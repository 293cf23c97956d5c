"""The folder of a run: which configuration it belongs to, and which folders a run may take."""

from pathlib import Path
from typing import Any

import pytest

from viditq.errors import UserError
from viditq.files import lock, write_json
from viditq.run_dir import RunDir, check_place, overrides_of
from viditq.seconds import read_conditions, read_seconds, timed


def config(module: str, name: str = "SmoothSpec", alpha: float = 0.5) -> dict[str, Any]:
    return {"quant": {"transforms": [{"_target_": f"{module}.{name}", "alpha": alpha}], "weight": {"_target_": module}}}


def test_a_class_that_moved_is_the_same_configuration(tmp_path: Path) -> None:
    RunDir(tmp_path, config("viditq.quant.transforms.smooth")).claim()
    RunDir(tmp_path, config("viditq.quant.methods.transforms.smooth")).claim()


@pytest.mark.parametrize("other", [{"name": "RotateSpec"}, {"alpha": 0.25}])
def test_another_class_or_value_is_not(other: dict[str, Any], tmp_path: Path) -> None:
    RunDir(tmp_path, config("viditq.quant.transforms.smooth")).claim()
    with pytest.raises(UserError, match="made by another configuration"):
        RunDir(tmp_path, config("viditq.quant.methods.transforms.smooth", **other)).claim()


def test_the_words_that_made_a_run_stand_in_it_and_are_no_part_of_its_configuration(tmp_path: Path) -> None:
    first = RunDir(tmp_path, {"seed": 1}, overrides=("experiment=w4a8", "seed=1"))
    first.claim()
    assert overrides_of(tmp_path) == ["experiment=w4a8", "seed=1"]
    other = RunDir(tmp_path, {"seed": 1}, overrides=("seed=1",))
    other.claim()  # another way to say the same
    assert other.fingerprint == first.fingerprint and overrides_of(tmp_path) == ["experiment=w4a8", "seed=1"]


def test_of_a_run_of_an_earlier_version_the_words_are_those_that_hydra_kept(tmp_path: Path) -> None:
    RunDir(tmp_path, {"seed": 1}).claim()
    assert overrides_of(tmp_path) == []
    (tmp_path / "hydra").mkdir()
    (tmp_path / "hydra/overrides.yaml").write_text("- bits=w4a8\n- seed=1\n")
    assert overrides_of(tmp_path) == ["bits=w4a8", "seed=1"]


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


def test_what_seconds_were_measured_on_stands_beside_them(tmp_path: Path) -> None:
    """A stage that went on elsewhere has both; one that an earlier version began says so."""
    (tmp_path / "seconds.json").write_text('{"prompts": 1.5}')
    for stage, on in [("generate", "a"), ("generate", "a"), ("prompts", "b"), ("generate", "c")]:
        with timed(tmp_path, stage, lambda on=on: on):  # type: ignore[misc]
            pass
    assert read_conditions(tmp_path) == {"generate": ["a", "c"], "prompts": ["what was not recorded", "b"]}
    assert read_seconds(tmp_path)["prompts"] >= 1.5
    (tmp_path / "seconds_on.json").write_text("{")
    assert read_conditions(tmp_path) == {}


@pytest.mark.parametrize(
    "what", ["null", "[1]", '"x"', '{"generate": [3], "evaluate": "a", "report": -1, "search": NaN, "quantize": 1e308}']
)
def test_files_of_seconds_that_hold_something_else_tell_nothing_and_fail_nothing(what: str, tmp_path: Path) -> None:
    for name in ("seconds.json", "seconds_on.json"):
        (tmp_path / name).write_text(what)
    assert read_seconds(tmp_path) == read_conditions(tmp_path) == {}
    with timed(tmp_path, "generate", lambda: "a"):
        pass
    assert [*read_seconds(tmp_path)] == ["generate"] and read_conditions(tmp_path) == {"generate": ["a"]}

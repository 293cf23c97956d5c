"""quant/rounding=block_adaround through whole runs: inputs of blocks in the cache, kills, other bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from viditq.engine.partials import Partials
from viditq.errors import UserError
from viditq.files import read_json
from viditq.quant.reconstruction.learn import _Learning
from viditq.quant.reconstruction.store import INDEX, BlockStore

Run = Callable[..., Any]
BLOCKS = [f"transformer_blocks.{i}" for i in range(4)]
SHORT = ["stages=[prompts,reference,calibrate,quantize]", "quant/smoothing=none", "quant.segments=[0.0,1.0]"]
LEARNED = [*SHORT, "quant=w4a8_naive", "quant/rounding=block_adaround", "calibration.block_input_bytes=400_000"]
LEARNED += ["quant.rounding.iterations=4", "quant.rounding.layer_iterations=4", "quant.rounding.tokens=16"]


class Killed(Exception):
    """In place of a SIGKILL."""


def inputs_in(cache: Path) -> dict[str, bytes]:
    """Every input that the index names."""
    (entry,) = (cache / "block_inputs").iterdir()
    assert len([*entry.rglob("*.slots")]) == len(BLOCKS)
    store = BlockStore(entry)
    return {f"{block} {item.name}": store.slots(block).get(item) for block in BLOCKS for item in store.items(block)}


@pytest.fixture(scope="module")
def undisturbed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run and its cache."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder / "run", folder / "cache", *LEARNED)
    return folder


def test_every_block_is_learned_within_the_budget(undisturbed: Path) -> None:
    (entry,) = (undisturbed / "cache" / "block_inputs").iterdir()
    index = read_json(entry / INDEX)
    assert list(index["blocks"]) == BLOCKS and all(index["blocks"].values())
    on_disk = sum(path.stat().st_size for path in entry.rglob("*.slots"))
    assert 200_000 < on_disk == index["bytes"] <= 400_000
    records = read_json(undisturbed / "run" / "reconstruction.json")
    assert [record["block"] for record in records] == BLOCKS
    assert all(record["errors"][record["kept"]] == min(record["errors"].values()) for record in records)
    assert not (undisturbed / "run" / "blocks").exists()
    meta = read_json(undisturbed / "run" / "quantized" / "meta.json")
    assert meta["average_weight_bits"] < 6


def test_other_bits_take_the_same_inputs(
    run: Run, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("viditq.stages.calibrate._observe", lambda *_: pytest.fail("calibrated again"))
    run(tmp_path / "run", undisturbed / "cache", *LEARNED, "quant.weight.bits=6", "quant.activation.bits=6")
    assert len(read_json(tmp_path / "run" / "reconstruction.json")) == 4


# Slow: with statistics that are there already.
@pytest.mark.parametrize("statistics_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_while_calibrating(
    run: Run, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistics_first: bool
) -> None:
    """In the middle of the second batch; also where the statistics were there before, from another run."""
    if statistics_first:
        run(tmp_path / "nearest", tmp_path / "cache", *SHORT, "quant=w4a8_naive")
    times, write, save = [0], BlockStore.write, Partials.save

    def dying(self: BlockStore, *args: Any) -> None:
        write(self, *args)
        if times[0] == 1:
            raise Killed

    def counting(self: Partials, *args: Any) -> None:
        save(self, *args)
        times[0] += 1

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "write", dying)
        patch.setattr(Partials, "save", counting)
        with pytest.raises(Killed):
            run(tmp_path / "run", tmp_path / "cache", *LEARNED)
    run(tmp_path / "run", tmp_path / "cache", *LEARNED)
    assert inputs_in(tmp_path / "cache") == inputs_in(undisturbed / "cache")
    (entry,) = (tmp_path / "cache" / "stats").iterdir()
    left = {"stats.safetensors", "key.json", "seconds.json", "seconds_on.json", ".lock"}
    assert {path.name for path in entry.iterdir()} <= left
    artifact = tmp_path / "run" / "quantized" / "model.safetensors"
    assert artifact.read_bytes() == (undisturbed / "run" / "quantized" / "model.safetensors").read_bytes()


def test_killed_while_learning(run: Run, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[str] = []
    go = _Learning.run

    def dying(self: _Learning) -> dict[str, Any]:
        learned.append(self.block)
        if len(learned) == 3:
            raise Killed
        return go(self)

    monkeypatch.setattr(_Learning, "run", dying)
    with pytest.raises(Killed):
        run(tmp_path / "run", undisturbed / "cache", *LEARNED)
    run(tmp_path / "run", undisturbed / "cache", *LEARNED)
    assert learned == [*BLOCKS[:3], *BLOCKS[2:]]
    artifact = tmp_path / "run" / "quantized" / "model.safetensors"
    assert artifact.read_bytes() == (undisturbed / "run" / "quantized" / "model.safetensors").read_bytes()
    strip = [{k: v for k, v in r.items() if k != "seconds"} for r in read_json(tmp_path / "run/reconstruction.json")]
    assert strip == [
        {k: v for k, v in r.items() if k != "seconds"} for r in read_json(undisturbed / "run/reconstruction.json")
    ]
    assert not (tmp_path / "run" / "blocks").exists()


def test_too_small_a_budget_is_told_before_anything_slow(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"calibration\.block_input_bytes=9,000 is too small.*Give at least"):
        run(tmp_path / "run", tmp_path / "cache", *LEARNED, "calibration.block_input_bytes=9_000")
    with pytest.raises(UserError, match=r"calibration\.block_input_bytes=0 must be a whole number of at least 1"):
        run(tmp_path / "other", tmp_path / "cache", *LEARNED, "calibration.block_input_bytes=0")

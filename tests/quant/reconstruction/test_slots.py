"""The file of slots: whatever was cut off or dropped is free, and nothing else is lost."""

from pathlib import Path

import pytest

from viditq.quant.reconstruction.selection import Item
from viditq.quant.reconstruction.slots import START, Slots, slot_size

A, B, C = Item(-3, 5, 0), Item(2**40, 2**24, 1), Item(7, 0, 2)


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    slots = Slots(tmp_path / "deep" / "0.slots")
    slots.put(A, b"a" * 100, slot_size(100))
    slots.put(B, b"b" * 90, slot_size(100))
    return slots


def test_what_was_put_is_there_also_for_another_reader(slots: Slots) -> None:
    for reader in (slots, Slots(slots.path)):
        assert {*reader} == {A, B} and A in reader and C not in reader
        assert reader.get(A) == b"a" * 100 and reader.get(B) == b"b" * 90
        with pytest.raises(ValueError, match="cannot be read"):
            reader.get(C)


def test_a_dropped_slot_is_taken_by_the_next(slots: Slots) -> None:
    before = slots.path.stat().st_size
    slots.drop(A)
    slots.drop(C)  # was never there
    assert A not in slots
    slots.put(C, b"c" * 80, 0)
    assert slots.path.stat().st_size == before
    assert {*Slots(slots.path)} == {B, C}


def test_an_input_replaces_itself(slots: Slots) -> None:
    slots.put(A, b"new", 0)
    slots.put(A, b"newer", 0)
    assert {item: Slots(slots.path).get(item) for item in Slots(slots.path)} == {A: b"newer", B: b"b" * 90}


def test_larger_slots_keep_what_was_there(slots: Slots) -> None:
    slots.drop(A)
    slots.put(C, b"c" * 1000, slot_size(1200))
    for reader in (slots, Slots(slots.path)):
        assert {item: reader.get(item) for item in reader} == {B: b"b" * 90, C: b"c" * 1000}
    slots.put(A, b"a" * 1200, 0)
    assert slots.path.stat().st_size == START.size + 3 * slot_size(1200)
    assert [path.name for path in slots.path.parent.iterdir()] == ["0.slots"]  # no temporary file


@pytest.mark.parametrize("length", [0, 1, 60, 129, 130, 200, 213])
def test_a_writer_was_killed_within_the_second_slot(slots: Slots, length: int) -> None:
    content = slots.path.read_bytes()
    assert len(content) == START.size + slot_size(100) + slot_size(90)
    slots.path.write_bytes(content[: START.size + slot_size(100) + min(length, slot_size(90) - 1)])
    found = Slots(slots.path)
    assert {*found} == {A}
    found.put(C, b"c" * 100, 0)
    assert {*Slots(slots.path)} == {A, C} and Slots(slots.path).get(A) == b"a" * 100


def test_a_slot_that_was_half_written_over_is_free(slots: Slots) -> None:
    with slots.path.open("r+b") as file:  # of another input, over A
        file.seek(START.size)
        file.write(b"x" * 50)
    assert {*Slots(slots.path)} == {B}
    with pytest.raises(ValueError, match="check sum"):
        slots.get(A)


@pytest.mark.parametrize("content", [b"", b"some other file, longer than a start", b"viditq01" + bytes(8)])
def test_a_file_that_is_none_of_ours_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "0.slots"
    path.write_bytes(content)
    slots = Slots(path)
    assert not [*slots]
    slots.put(A, b"a", 0)
    assert Slots(path).get(A) == b"a"

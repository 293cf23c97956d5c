"""Inputs of blocks on disk: what is kept, how many bytes, in whatever order and after whatever interruptions."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_blocks import BLOCKS, NUM_BUCKETS, NUM_FRAMES, NUM_TOKENS, WIDTH, collect, run_batch, sample

from viditq.errors import UserError
from viditq.quant import BlockInputs, BlockStore
from viditq.quant.calibration.noise_level import interval_of
from viditq.quant.reconstruction.batches import _tokens
from viditq.quant.reconstruction.calls import Call, Stored, joined
from viditq.quant.reconstruction.collect import finish, joined_states
from viditq.quant.reconstruction.selection import LEVELS, Item
from viditq.quant.reconstruction.store import INDEX

CPU = torch.device("cpu")


def kept(folder: Path) -> dict[str, Any]:
    """The index, and every input that it names; nothing else is there."""
    store = BlockStore(folder)
    assert {*folder.rglob("*.*")} == {folder / INDEX, *(folder / block for block in BLOCKS), *map(store.path, BLOCKS)}
    return {INDEX: store.index} | {
        f"{block} {item.name}": store.slots(block).get(item) for block in BLOCKS for item in store.items(block)
    }


def round_trip(args: list, kwargs: dict, num_elements: int) -> tuple[list, dict]:
    """All elements of a call taken apart and joined again."""
    call = Call("block", args, kwargs, num_elements)
    parts = [Stored.of(share.tensors, share.meta) for share in map(call.share, range(num_elements))]
    assert all(part.goes_with(parts[0]) for part in parts)
    return joined([(part, torch.arange(part.rows)) for part in parts], torch.float32, CPU)


def test_a_call_is_put_together_as_it_was() -> None:
    args = [torch.randn(6, 5, 4), None, torch.randn(3, 2, 4).repeat_interleave(2, 0), torch.ones(3, 1, 2).bool()]
    rotary = (torch.randn(5, 4), torch.polar(torch.ones(5, 2), torch.randn(5, 2)))
    kwargs = {"rotary": rotary, "scale": 0.5, "nested": {"time": torch.randn(3, 4), "flags": [True, "x"]}}
    kwargs["index"] = torch.arange(6)
    back, named = round_trip(args, kwargs, 3)
    for old, new in [*zip(args, back, strict=True), (kwargs["nested"]["time"], named["nested"]["time"])]:
        if isinstance(old, Tensor):
            torch.testing.assert_close(new, old, rtol=2**-10, atol=0)  # 16 bits
    assert back[1] is None and named["scale"] == 0.5 and named["nested"]["flags"] == [True, "x"]
    assert torch.equal(back[3], args[3]) and torch.equal(named["index"], kwargs["index"])
    assert isinstance(named["rotary"], tuple) and all(map(torch.equal, named["rotary"], rotary))


def test_equal_rows_are_stored_once_and_large_values_as_bfloat16() -> None:
    caption = torch.randn(3, 2, 4)
    call = Call("block", [torch.randn(6, 5, 4) * 1e6, caption.repeat_interleave(2, 0)], {}, 3)
    share = call.share(1)
    assert share.tensors["0"].shape == (2, 5, 4) and share.tensors["0"].dtype == torch.bfloat16
    assert share.tensors["1"].shape == (1, 2, 4) and share.tensors["1"].dtype == torch.float16


def test_rows_of_several_inputs_make_one_call() -> None:
    hidden, mask = torch.arange(24.0).view(6, 2, 2), torch.arange(3.0).view(3, 1)
    call = Call("block", [hidden, mask], {}, 3)
    parts = [Stored.of(share.tensors, share.meta) for share in (call.share(0), call.share(2))]
    args, _ = joined([(parts[0], torch.tensor([1])), (parts[1], torch.tensor([0]))], torch.float32, CPU)
    assert torch.equal(args[0], hidden[[1, 4]]) and torch.equal(args[1], mask[[0, 2]])


def test_what_differs_without_a_batch_axis_is_kept_apart() -> None:
    one, other = (Call("block", [torch.randn(2, 3, 4), torch.full((), t)], {}, 2).share(0) for t in (1.0, 2.0))
    assert not Stored.of(one.tensors, one.meta).goes_with(Stored.of(other.tensors, other.meta))


def test_a_stream_without_tokens() -> None:
    """What a block is given of a text that has none, before or after the hidden states."""
    hidden, none = torch.randn(4, 3, 2), torch.zeros(4, 0, 2)
    for args in ([none, hidden], [hidden, none]):
        back, _ = round_trip(args, {}, 2)
        for old, new in zip(args, back, strict=True):
            torch.testing.assert_close(new, old, rtol=2**-10, atol=0)
        share = Call("block", args, {}, 2).share(0)
        assert _tokens(Stored.of(share.tensors, share.meta)) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([torch.randn(5, 2, 2)], "was called with 5 hidden states for a batch of 2"),
        ([torch.randn(4, 2)], "was called with no hidden states for a batch of 2"),
        ([torch.randn(4, 2, 2), object()], "an argument of type object, which cannot be stored"),
        ([torch.randn(4, 2, 2), torch.ones(3).to(torch.complex128)], "a tensor of torch.complex128, which cannot be"),
    ],
)
def test_calls_that_cannot_be_taken_apart(args: list, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.*adaround"):
        Call("block", args, {}, 2)


def test_inputs_are_those_of_their_prompt_step_and_branch(denoiser: nn.Module, store: BlockStore) -> None:
    seen: list[Tensor] = []
    handle = denoiser.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sample(denoiser, [3], [350])  # one prompt by itself: [2 branches x 2 frames, N, C]
    handle.remove()
    items = store.items("blocks.1")
    assert len(items) == 24 * 4 * 2
    for branch in (0, 1):
        item = next(i for i in items if i.seed == 3 and i.branch == branch and i.level == int(0.35 * LEVELS))
        stored = store.load("blocks.1", item)
        torch.testing.assert_close(
            stored.tensors[0].float(), seen[0][2 * branch : 2 * branch + 2], rtol=2e-3, atol=2e-3
        )


@pytest.mark.parametrize("budget", [20_000, 60_001, 200_000])
def test_the_budget_is_obeyed_and_used(denoiser: nn.Module, tmp_path: Path, budget: int) -> None:
    store = collect(denoiser, tmp_path, [range(8), range(8, 16)], budget)
    for block in BLOCKS:
        size, count = store.path(block).stat().st_size, len(store.items(block))
        assert size <= budget // 2 < size + size / count + 16
    assert store.index["bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*.slots")) <= budget


def test_neither_order_nor_batches_nor_processes_matter(denoiser: nn.Module, tmp_path: Path) -> None:
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    collect(denoiser, tmp_path / "one", pairs, 40_000)
    collect(denoiser, tmp_path / "reversed", pairs[::-1], 40_000)
    parts = [BlockInputs(denoiser, BLOCKS, tmp_path / "two", 40_000, writer=i) for i in range(2)]  # side by side
    for seeds, part in zip(pairs, [*parts, *parts], strict=True):
        run_batch(denoiser, part, seeds)
    one, other = (part.state() for part in parts)
    finish(parts[0].store, 40_000, joined_states(one, other), 20)
    assert kept(tmp_path / "one") == kept(tmp_path / "reversed") == kept(tmp_path / "two")


def test_a_batch_that_was_cut_off_is_done_again(denoiser: nn.Module, tmp_path: Path) -> None:
    pairs = [[0, 1], [2, 3], [4, 5]]
    collect(denoiser, tmp_path / "one", pairs, 30_000)
    killed = BlockInputs(denoiser, BLOCKS, tmp_path / "two", 30_000)
    run_batch(denoiser, killed, pairs[0])
    state = killed.state()
    run_batch(denoiser, killed, pairs[1], (950, 600))  # then the process dies: its state is that of the first batch
    resumed = BlockInputs(denoiser, BLOCKS, tmp_path / "two", 30_000)
    resumed.load_state(state)
    for seeds in pairs[1:]:
        run_batch(denoiser, resumed, seeds)
    finish(resumed.store, 30_000, resumed.state(), 20)
    assert kept(tmp_path / "one") == kept(tmp_path / "two")


def test_too_small_a_budget(denoiser: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"block_input_bytes=2,000 is too small: one input of block .* Give at least"):
        collect(denoiser, tmp_path, [range(2)], 2_000)


def test_a_block_that_is_no_module_of_its_own(tmp_path: Path, make_denoiser: type[nn.Module]) -> None:
    denoiser = make_denoiser()  # its blocks are ModuleDicts, never called
    inputs = BlockInputs(denoiser, BLOCKS, tmp_path, 2**20)
    with inputs, torch.no_grad():
        inputs.set_sample_seeds([0])
        denoiser(torch.randn(1, 5, 8), torch.tensor([500]))
    with pytest.raises(UserError, match=r"blocks.0 was never called as a module.*adaround"):
        finish(inputs.store, 2**20, inputs.state(), 20)


def test_a_block_that_mixes_the_elements_of_a_batch(denoiser: nn.Module, tmp_path: Path) -> None:
    forward = denoiser.blocks[1].forward
    denoiser.blocks[1].forward = lambda x, *args, **kwargs: forward(x + x.mean(0, keepdim=True), *args, **kwargs)
    with pytest.raises(UserError, match=r"blocks\.1 does not give for one element of a batch what .* in the batch"):
        collect(denoiser, tmp_path, [range(2)])


def test_the_check_is_not_observed(denoiser: nn.Module, tmp_path: Path) -> None:
    times = []
    denoiser.blocks[0].fc1.register_forward_hook(lambda *_: times.append(1))
    collect(denoiser, tmp_path, [range(2), range(2, 4)])
    assert len(times) == 2 * 4  # two batches of four steps


def test_bad_states_seeds_and_files(denoiser: nn.Module, tmp_path: Path, store: BlockStore) -> None:
    inputs = BlockInputs(denoiser, BLOCKS, tmp_path / "new", 2**20)
    with pytest.raises(UserError, match="other blocks than this model's"):
        inputs.load_state({"@inputs/blocks.7": torch.tensor([3, 1])})
    inputs.set_sample_seeds([0, 1, 2])
    with inputs, pytest.raises(UserError, match="does not fit 3 sample seeds"):
        denoiser(torch.randn(2, 2, 6, 8), torch.tensor([500, 500]), torch.randn(2, 3, 32))
    with pytest.raises(UserError, match=r"holds no inputs of block blocks\.9"):
        store.items("blocks.9")
    item = store.items("blocks.0")[0]
    with pytest.raises(UserError, match="is missing or damaged"):
        store.load("blocks.0", Item(999, 1, 0))
    store.path("blocks.0").write_bytes(b"cut off")
    with pytest.raises(UserError, match="is missing or damaged"):
        store.load("blocks.0", item)
    with pytest.raises(UserError, match="is missing or damaged"):
        BlockStore(store.folder).load("blocks.0", item)


@pytest.mark.parametrize("boundary", [0.1, 0.3, 0.6, 0.8, 0.9])
def test_a_level_at_a_boundary_is_in_the_lower_segment(denoiser: nn.Module, tmp_path: Path, boundary: float) -> None:
    inputs = BlockInputs(denoiser, BLOCKS, tmp_path, 2**20)
    run_batch(denoiser, inputs, [1], [round(1000 * boundary)])
    (item, *_) = inputs.store.present(BLOCKS[0])
    assert boundary - 1e-6 < item.noise_level <= boundary
    assert interval_of([0.0, boundary, 1.0], item.noise_level) == 0


@pytest.mark.parametrize("budget", [30_000, 2**20])
@pytest.mark.parametrize("what", ["all", "one file", "half a file"])
def test_inputs_that_went_missing_are_told(denoiser: nn.Module, tmp_path: Path, budget: int, what: str) -> None:
    """Between the parts of an interrupted calibration, and between its end and the index."""
    inputs = BlockInputs(denoiser, BLOCKS, tmp_path, budget)
    for seeds in ([0, 1], [2, 3]):
        run_batch(denoiser, inputs, seeds)
    state, file = inputs.state(), inputs.store.path(BLOCKS[1])
    BlockInputs(denoiser, BLOCKS, tmp_path, budget).load_state(state)  # nothing to say
    if what == "all":
        shutil.rmtree(tmp_path)
    elif what == "one file":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"inputs of block blocks\.\d that an unfinished calibration has kept"):
        BlockInputs(denoiser, BLOCKS, tmp_path, budget).load_state(state)
    with pytest.raises(UserError, match=r"inputs of block blocks\.\d that an unfinished calibration has kept"):
        finish(inputs.store, budget, state, 20)


def test_another_way_to_take_a_call_apart_is_checked_too(denoiser: nn.Module, tmp_path: Path) -> None:
    """A table as long as one batch is taken for one entry an element there, and would be cut."""
    table = torch.randn(4, 32)
    forward = denoiser.blocks[0].forward
    denoiser.blocks[0].forward = lambda x, *args, table, **kwargs: forward(x + table.sum(), *args, **kwargs)
    first = denoiser.blocks[0]
    first.register_forward_pre_hook(lambda m, args, kwargs: (args, {**kwargs, "table": table}), with_kwargs=True)
    inputs = BlockInputs(denoiser, BLOCKS, tmp_path, 2**20)
    run_batch(denoiser, inputs, [0, 1, 2])  # six elements of two frames
    with pytest.raises(UserError, match=r"blocks\.0 does not give for one element"):
        run_batch(denoiser, inputs, [3])  # two of two


def test_killed_after_a_larger_input_than_the_saved_state_knows(denoiser: nn.Module, tmp_path: Path) -> None:
    """Longer captions leave room for fewer inputs; states are not saved after every batch."""
    budget = 60_000

    def longer(inputs: BlockInputs) -> None:
        with inputs, torch.no_grad():
            inputs.set_sample_seeds([9])
            x = torch.randn(1, NUM_FRAMES, NUM_TOKENS, 8, generator=torch.Generator().manual_seed(9))
            denoiser(torch.cat([x, x]), torch.full((2,), 500), torch.ones(2, 60, WIDTH).cumsum(1))

    def whole(folder: Path, killed: bool) -> dict[str, Any]:
        inputs = BlockInputs(denoiser, BLOCKS, folder, budget)
        run_batch(denoiser, inputs, [1, 2, 3, 4])
        state, before = inputs.state(), len(inputs.store.present(BLOCKS[0]))
        longer(inputs)
        assert len(inputs.store.present(BLOCKS[0])) < before
        if killed:
            inputs = BlockInputs(denoiser, BLOCKS, folder, budget)
            inputs.load_state(state)
            longer(inputs)
        finish(inputs.store, budget, inputs.state(), NUM_BUCKETS)
        return kept(folder)

    assert whole(tmp_path / "killed", True) == whole(tmp_path / "undisturbed", False)

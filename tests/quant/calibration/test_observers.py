import pytest
import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant import CalibrationStats
from viditq.quant.calibration.noise_level import bucket_edges, interval_of
from viditq.quant.calibration.observer_bank import ObserverBank
from viditq.quant.calibration.summary import summary_of


def update(bank: ObserverBank, bucket: int, x_LNC: Tensor, seed: int) -> None:
    num_rows = x_LNC.shape[0] * x_LNC.shape[1]
    keys = torch.randint(2**60, (num_rows,), generator=torch.Generator().manual_seed(seed))
    assert bank.update({("layer", bucket): summary_of(x_LNC, torch.arange(num_rows), keys, (bucket + 0.5) / 4)})


def observe(parts: list[int], data: list[Tensor], device: str = "cpu") -> CalibrationStats:
    bank = ObserverBank(["layer"], 4, 6, 5, device)
    for i in parts:
        update(bank, i % 4, data[i], seed=i)
    return CalibrationStats(bank.observers)


@pytest.fixture
def data() -> list[Tensor]:
    return [torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(12)]


def test_statistics_are_those_of_all_data(data):
    stats = observe(list(range(12)), data)
    mine = torch.cat([data[i] for i in (1, 5, 9)])
    segment = stats.segment("layer", 0.25, 0.5)
    assert torch.equal(segment.minimum, mine.amin((0, 1)))
    assert torch.equal(segment.maximum, mine.amax((0, 1)))
    torch.testing.assert_close(segment.amax("ema"), mine.abs().amax(1).mean(0))
    assert torch.equal(segment.amax("max"), mine.abs().amax((0, 1)))
    everything = {tuple(row) for row in mine.flatten(0, 1).tolist()}
    assert len(segment.rows) == 5
    assert all(tuple(row) in everything for row in segment.rows.tolist())
    torch.testing.assert_close(segment.amax("percentile", 100), segment.rows.abs().amax(0))


def test_ema_runs_from_high_noise_to_low(data):
    stats = observe(list(range(12)), data)
    buckets = [torch.cat([data[i] for i in (k, k + 4, k + 8)]).abs().amax(1).mean(0) for k in range(4)]
    want = buckets[3]
    for k in (2, 1, 0):
        want = 0.95 * want + 0.05 * buckets[k]
    torch.testing.assert_close(stats.segment("layer", 0, 1).amax(), want)


def test_merge_does_not_depend_on_order(data):
    whole = observe(list(range(12)), data).to_tensors()
    for split in ([[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11]], [[11, 3, 7], [0, 10, 2, 9, 4], [1, 5, 6, 8]]):
        parts = [observe(part, data) for part in split]
        for order in ((0, 1, 2), (2, 0, 1)):
            merged = CalibrationStats.from_tensors(parts[order[0]].to_tensors())
            for i in order[1:]:
                merged.merge(parts[i])
            for key, value in merged.to_tensors().items():
                assert torch.equal(value, whole[key]), key


def test_reservoir_keeps_the_lowest_keys_of_everything():
    bank, rows, keys = ObserverBank(["layer"], 1, 2, 4), [], []
    for seed in range(6):
        x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(seed))
        update(bank, 0, x, seed)
        rows.append(x.flatten(0, 1))
        keys.append(torch.randint(2**60, (6,), generator=torch.Generator().manual_seed(seed)))
    lowest = torch.cat(keys).argsort()[:4]
    assert torch.equal(bank.observers["layer"].rows[0], torch.cat(rows)[lowest])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype(dtype):
    bank, x = ObserverBank(["layer"], 1, 4, 3), torch.randn(2, 3, 4).to(dtype)
    update(bank, 0, x, 0)
    assert torch.equal(bank.observers["layer"].maximum[0], x.amax((0, 1)).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_take_the_bytes_of_their_inputs(dtype, tmp_path):
    narrow, wide = ObserverBank(["layer"], 2, 6, 5, "cpu", dtype), ObserverBank(["layer"], 2, 6, 5)
    inputs = [torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)]
    for i, x in enumerate(inputs):
        update(narrow, i % 2, x, i)
        update(wide, i % 2, x, i)
    assert narrow.observers["layer"].rows.dtype == dtype and wide.observers["layer"].rows.dtype == torch.float32
    stats, same = CalibrationStats(narrow.observers), CalibrationStats(wide.observers)
    stats.save(tmp_path / "stats.safetensors")
    for found in (stats, CalibrationStats.load(tmp_path / "stats.safetensors")):
        one, other = found.segment("layer", 0, 1), same.segment("layer", 0, 1)
        assert one.rows.dtype == torch.float32 and torch.equal(one.rows, other.rows)
        assert torch.equal(one.rows_like(lambda level: 1 - level), other.rows_like(lambda level: 1 - level))
        assert torch.equal(one.amax("percentile", 90), other.amax("percentile", 90))


def test_a_wider_input_loses_nothing():
    """As under autocast; what was kept before stays as it was."""
    bank, wide = ObserverBank(["a", "b"], 1, 6, 8, "cpu", torch.bfloat16), ObserverBank(["a", "b"], 1, 6, 8)
    for name, dtype in (("a", torch.bfloat16), ("b", torch.float32), ("a", torch.float16), ("b", torch.float64)):
        x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(len(name))).to(dtype)
        for each in (bank, wide):
            each.update({(name, 0): summary_of(x, torch.arange(4), torch.arange(4) + 10 * x.element_size(), 0.5)})
    for name in ("a", "b"):
        assert bank.observers[name].rows.dtype == torch.float32
        assert torch.equal(bank.observers[name].rows, wide.observers[name].rows)


def test_layers_added_at_once_are_as_if_added_one_by_one(data: list[Tensor]) -> None:
    names = ["a", "b", "c"]
    together, alone = ObserverBank(names, 4, 6, 5), {name: ObserverBank([name], 4, 6, 5) for name in names}
    for step, of_step in enumerate((["a", "b", "c"], ["c"], ["b", "a"], ["c", "a", "b"])):
        keys = torch.randint(2**60, (21,), generator=torch.Generator().manual_seed(step))
        of = {name: summary_of(data[3 * step + i], torch.arange(21), keys, step / 4) for i, name in enumerate(of_step)}
        seen = {(name, step % 2): summary for name, summary in of.items()}
        together.update(seen)
        for (name, bucket), summary in seen.items():
            alone[name].update({(name, bucket): summary})
    mine = CalibrationStats(together.observers).to_tensors()
    theirs = CalibrationStats({name: alone[name].observers[name] for name in names}).to_tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_input_adds_nothing(bad: float) -> None:
    bank, good = ObserverBank(["a", "b"], 1, 4, 3), torch.ones(2, 3, 4)
    spoilt = good.clone()
    spoilt[1, 2, 3] = bad
    seen = {(n, 0): summary_of(x, torch.arange(3), torch.arange(3), 0.0) for n, x in (("a", good), ("b", spoilt))}
    assert not bank.update(seen)
    assert bank.observers["a"].count.tolist() == [0]


def test_an_empty_segment_says_what_to_do(data):
    stats = observe([0, 1], data)
    with pytest.raises(UserError, match=r"no calibration data for layer at noise levels 0.5 to 1.*more sampling steps"):
        stats.segment("layer", 0.5, 1)
    with pytest.raises(UserError, match="the statistics lack the layer layr"):
        stats.segment("layr", 0, 1)


def test_save_and_load(data, tmp_path):
    stats = observe(list(range(12)), data)
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
    for key, value in CalibrationStats.load(path).to_tensors().items():
        assert torch.equal(value, stats.to_tensors()[key])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read the statistics"):
        CalibrationStats.load(path)
    with pytest.raises(UserError, match="cannot read the statistics"):
        CalibrationStats.load(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot write the statistics"):
        stats.save(tmp_path / "no" / "folder")


def test_intervals_hold_their_upper_edge():
    assert [interval_of((0, 0.5, 1), level) for level in (0, 0.2, 0.5, 0.501, 1)] == [0, 0, 0, 1, 1]
    edges = bucket_edges(20)
    assert [interval_of(edges, i / 20) for i in range(1, 21)] == list(range(20))


def seen_at(*levels: float, num_buckets: int = 4) -> CalibrationStats:
    bank, edges = ObserverBank(["layer"], num_buckets, 2, 3), bucket_edges(num_buckets)
    for level in levels:
        x = torch.full((1, 3, 2), level)
        bank.update({("layer", interval_of(edges, level)): summary_of(x, torch.arange(1), torch.arange(1), level)})
    return CalibrationStats(bank.observers)


@pytest.mark.parametrize("edge", [0.25, 0.3, 0.4, 0.4999])
def test_a_bucket_belongs_to_the_segment_of_its_steps(edge: float) -> None:
    stats = seen_at(0.0, 0.1, 0.25, 0.5, 0.9)
    low, high = stats.segment("layer", 0, edge), stats.segment("layer", edge, 1)
    assert float(low.maximum[0]) == 0.25 and float(low.minimum[0]) == 0.0
    assert float(high.minimum[0]) == 0.5 and float(high.maximum[0]) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("levels", "segment", "message"),
    [
        (
            (0.3, 0.45),
            (0.4, 1),
            r"parts sampling steps \(0\.3 to 0\.45\) .*move it to 0\.25 or 0\.5.*num_buckets, now 4",
        ),
        ((0.3, 0.45), (0, 0.4), "parts sampling steps"),
        ((0.8, 1.0), (0.999999, 1), r"move it to 0\.75 or 1,"),
        ((0.26, 0.5), (0.3, 0.4), "parts sampling steps"),  # perhaps none of them lies in it
    ],
)
def test_a_bucket_with_steps_of_two_segments_is_refused(
    levels: tuple[float, ...], segment: tuple[float, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        seen_at(*levels).segment("layer", *segment)
    assert seen_at(*levels, num_buckets=40).layers["layer"].within(0, 1)


def test_a_segment_beside_the_steps_of_its_bucket_is_empty() -> None:
    with pytest.raises(UserError, match=r"no calibration data for layer at noise levels 0\.999999 to 1"):
        seen_at(0.3, 0.999).segment("layer", 0.999999, 1)
    stats = seen_at(0.3)
    stats.merge(seen_at(0.45))
    assert stats.layers["layer"].within(0.25, 0.5) == [1]
    with pytest.raises(UserError, match="parts sampling steps"):
        stats.segment("layer", 0, 0.4)

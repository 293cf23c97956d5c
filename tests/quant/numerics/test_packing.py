import pytest
import torch

from viditq.quant.numerics.packing import pack, packed_size, unpack


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("num", [1, 7, 8, 9, 63, 64, 1152])
def test_round_trip_is_exact_and_small(bits, num):
    codes = torch.randint(0, 2**bits, (5, 3, num), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, 3, -(-num * bits // 8)) == (5, 3, packed_size(num, bits))
    assert torch.equal(unpack(packed, bits, num), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_lie_where_the_docstring_says(bits):
    codes = torch.randint(0, 2**bits, (13,), dtype=torch.uint8)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert pack(codes, bits).tolist() == list(stream.to_bytes(packed_size(13, bits), "little"))


def test_four_bits_halve_the_bytes():
    assert pack(torch.zeros(192, 768, dtype=torch.uint8), 4).numel() == 192 * 768 // 2


def test_extremes_survive():
    for bits in range(2, 9):
        codes = torch.tensor([[0, 2**bits - 1] * 8], dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, 16), codes)

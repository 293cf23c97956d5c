"""WIDTHS are those of PixArt, DiT, Latte, STDiT, Wan, Flux, SD3.5, CogVideoX, Sana, HunyuanVideo and LTX."""

import pytest
import torch

from viditq.quant.numerics import hadamard

WIDTHS = [144, 192, 256, 768, 1024, 1152, 1280, 1536, 1920, 2048, 2240, 2304, 2432, 2560, 3072, 3584, 3840, 4096, 4608]
WIDTHS += [5120, 5600, 6144, 7680, 8960, 9728, 10240, 12288, 13824, 14336, 15360, 18432]


@pytest.mark.parametrize("order", [*range(1, 33), 36, 48, 60, 72, 96, 120, 140, 240, 320, *WIDTHS])
def test_it_is_a_rotation(order):
    a, b = hadamard.factor_orders(order)
    for size in (a, b):
        factor = hadamard._signs_matrix(size)
        assert torch.equal(factor @ factor.T, size * torch.eye(size, dtype=torch.float64))
        assert torch.equal(factor.abs(), torch.ones_like(factor))
    x = torch.randn(2, 3, order, dtype=torch.float64, generator=torch.Generator().manual_seed(order))
    kept, signs = x.clone(), hadamard.random_signs(order, 0)
    y = hadamard.rotate(x, signs)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[0] @ y[1].T, x[0] @ x[1].T)
    assert torch.equal(x, kept) and y.shape == x.shape


@pytest.mark.parametrize("order", [*WIDTHS, 2, 4, 12, 20, 24, 28, 36, 44, 72])
def test_a_full_rotation_spreads_one_channel_evenly(order):
    x = torch.zeros(1, order)
    x[0, order // 3] = 1
    y = hadamard.rotate(x, hadamard.random_signs(order, 1))
    torch.testing.assert_close(y.abs(), torch.full((1, order), order**-0.5))


@pytest.mark.parametrize(("order", "block"), [(6, 2), (7, 1), (10, 2), (18, 2), (184, 8), (30, 2)])
def test_where_no_hadamard_matrix_is_known_it_is_block_diagonal(order, block):
    assert hadamard.factor_orders(order) == (1, block)
    assert int((hadamard.matrix(order) != 0).sum()) == order * block


@pytest.mark.parametrize("order", [8, 48, 192, 256, 768, 1152, 30 * 64, 184, 9 * 23 * 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_product_is_the_dense_one(order, dtype):
    x, signs = torch.randn(5, order, dtype=dtype), hadamard.random_signs(order, 7)
    want = (x.double() * signs) @ hadamard.matrix(order)
    torch.testing.assert_close(hadamard.rotate(x, signs).double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [4, 16, 64])
def test_powers_of_two_are_sylvesters(order):
    index = torch.arange(order)
    parity = sum(((index[:, None] & index[None]) >> bit) & 1 for bit in range(8)) % 2
    assert torch.equal(hadamard.matrix(order) * order**0.5, 1.0 - 2.0 * parity.double())


def test_signs_depend_on_seed_and_width_alone():
    torch.manual_seed(0)
    first = hadamard.random_signs(1152, 0)
    torch.manual_seed(1)
    assert torch.equal(hadamard.random_signs(1152, 0), first)
    assert not torch.equal(hadamard.random_signs(1152, 1), first)
    assert abs(int(first.sum())) < 150 and set(first.tolist()) == {-1, 1}


def test_signs_keep_the_mean_of_all_channels_out_of_the_first_column():
    """Rows with a common offset, as behind a LayerNorm's bias: a plain Hadamard gathers it in one channel."""
    x = torch.randn(64, 1152) + 2
    plain = hadamard.rotate(x, torch.ones(1152, dtype=torch.int8))
    random = hadamard.rotate(x, hadamard.random_signs(1152, 0))
    assert float(plain.abs().amax()) > 50 > 15 > float(random.abs().amax())


def test_it_works_in_and_out_of_inference_mode():
    with torch.inference_mode():
        hadamard.rotate(torch.ones(1, 1408), hadamard.random_signs(1408, 0))
    x = torch.ones(1, 1408, requires_grad=True)
    hadamard.rotate(x, hadamard.random_signs(1408, 0)).sum().backward()
    assert x.grad is not None


def test_factors_carry_the_mark_of_a_constant_that_torch_sets():
    marked = vars(torch.compiler.assume_constant_result(lambda: None))
    for function in (hadamard._factor, hadamard._dense):
        assert marked.items() <= vars(function.__wrapped__).items()

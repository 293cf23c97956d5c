"""Randomised Hadamard rotations of any width, as a product of two small orthogonal factors.

An order n = m 2^k (m odd) gets H = (A kron B) / sqrt(n), with A, B of entries +-1, A A^T = a I, B B^T = b I, a b = n.
The order of A is the smallest m 2^i of which there is a matrix of Paley (12, 20, 28, 36, 60, 76, 108, 140, ...),
doubled until A and B are about equal in size; A is Paley's of that order where there is one (4608 = 72 x 64, and 72 =
71 + 1), else a smaller one of Paley doubled; B is Sylvester's. Where there is none for m 2^i (widths such as 6 or 10;
none is known among diffusion transformers), H is block-diagonal, of Hadamard blocks of the largest power of two that
divides n: channels of different blocks do not mix, and an odd width only gets its signs.

Construction: Paley, J. Math. Phys. 12 (1933) 311; use in quantization: QuaRot (arXiv 2404.00456).

Legend: n = a b order; x [..., n].
"""

from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

DENSE_UP_TO = 192  # one product with a dense matrix is faster below (benchmarks/quantize_speed.py)
CONSTANT = "_dynamo_marked_constant"  # the mark that torch.compile looks for
T = TypeVar("T")


def random_signs(order: int, seed: int) -> Tensor:
    """int8 [order] of +-1 that depend on (order, seed) alone: inputs shared by several Linears share their rotation."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + order)
    return torch.randint(0, 2, (order,), generator=generator, dtype=torch.int8) * 2 - 1


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """x diag(signs) H, [..., n] -> a new tensor [..., n], in the floating type of `x`."""
    order = x.shape[-1]
    a, b = factor_orders(order)
    y = x * signs.to(x.dtype)
    if order <= DENSE_UP_TO:
        return y @ _dense(order, x.dtype, x.device)
    y = y.reshape(-1, b) @ _factor(b, order, x.dtype, x.device)
    if a * b == order and a > 1:
        y = torch.matmul(_factor(a, 1, x.dtype, x.device).T, y.view(-1, a, b))
    return y.view(x.shape)


def matrix(order: int) -> Tensor:
    """H as float64 [n, n]: what `rotate` multiplies with after the signs."""
    a, b = factor_orders(order)
    if a * b == order:
        return torch.kron(_signs_matrix(a), _signs_matrix(b)) / order**0.5
    return torch.block_diag(*[_signs_matrix(b) / b**0.5] * (order // b))


@lru_cache(maxsize=4096)
def factor_orders(order: int) -> tuple[int, int]:
    """(a, b) with a b = order, as equal as the construction allows; (1, 2^k) where only blocks of 2^k are possible."""
    if order < 1:
        raise ValueError(f"order={order} must be at least 1")
    power = order & -order
    a: int | None = 1
    if order != power:
        odd = order // power
        sizes = (odd * 2**i for i in range(2, power.bit_length()))
        a = next((size for size in sizes if _paley_prime(size) is not None), None)
    if a is None:
        return 1, power
    while 2 * a * a < order and order // a % 2 == 0:
        a *= 2
    return a, order // a


def _paley_prime(order: int) -> int | None:
    """The prime that gives a Paley matrix of this order: order - 1 (3 mod 4) or order / 2 - 1 (1 mod 4)."""
    for prime, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and prime % 4 == residue and _is_prime(prime):
            return prime
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


@lru_cache(maxsize=64)
def _signs_matrix(order: int) -> Tensor:
    """Hadamard matrix of entries +-1, float64: Paley where the order has an odd part, doubled as in Sylvester's."""
    with torch.inference_mode(False):
        if order == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        prime = _paley_prime(order) if order & (order - 1) else None
        if prime is None:
            half = _signs_matrix(order // 2)
            return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
        return _paley_one(prime) if prime == order - 1 else _paley_two(prime)


def _jacobsthal(prime: int) -> Tensor:
    """Q_ij = 1 where i - j is a nonzero square modulo the prime, -1 where it is none, 0 on the diagonal."""
    character = torch.full((prime,), -1, dtype=torch.float64)
    character[torch.arange(1, prime) ** 2 % prime] = 1
    character[0] = 0
    index = torch.arange(prime)
    return character[(index[:, None] - index[None]) % prime]


def _bordered(core: Tensor, corner: tuple[int, int]) -> Tensor:
    """`core` with a row of ones on top and a column of `corner[1]` at the left; corner[0] where they meet."""
    size = len(core) + 1
    out = core.new_ones(size, size)
    out[1:, 1:], out[1:, 0], out[0, 0] = core, corner[1], corner[0]
    return out


def _paley_one(prime: int) -> Tensor:
    return _bordered(_jacobsthal(prime), (0, -1)) + torch.eye(prime + 1, dtype=torch.float64)


def _paley_two(prime: int) -> Tensor:
    core, eye = _bordered(_jacobsthal(prime), (0, 1)), torch.eye(prime + 1, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(eye, diagonal)


def constant(function: T) -> T:
    """`torch.compiler.assume_constant_result` without its import of the compiler, which takes longer than torch's.

    torch.compile looks behind lru_cache and would build a factor at every call.
    """
    setattr(function, CONSTANT, True)
    return function


@lru_cache(maxsize=64)
@constant
def _factor(order: int, whole: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A factor as used; the one that comes first carries the norm 1 / sqrt(n) (its own where H is block-diagonal)."""
    with torch.inference_mode(False):
        a, b = factor_orders(whole)
        scale = 1.0 if whole == 1 else (whole if a * b == whole else order) ** -0.5
        return (_signs_matrix(order) * scale).to(device, dtype)


@lru_cache(maxsize=64)
@constant
def _dense(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return matrix(order).to(device, dtype)

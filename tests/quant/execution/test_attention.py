"""Attention in 8 bits, emulated: near torch's, exactly on its grids, and only where a denoiser was told so."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.execution import attention as module
from viditq.quant.execution.attention import (
    GRANULARITIES,
    KINDS,
    Shares,
    attention,
    check_attention,
    emulate_attention,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def difference(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def inputs(*shape: int, keys: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    """Keys have channels that are far off, as real ones have."""
    batch, heads, _, dim = shape
    k = torch.randn(batch, heads, keys, dim) + 8 * torch.randn(1, heads, 1, dim)
    return torch.randn(shape), k, torch.randn(batch, heads, keys, dim)


@pytest.mark.parametrize("fp8_pv", KINDS.values())
def test_it_is_near_torch_s(fp8_pv: bool) -> None:
    q, k, v = inputs(2, 3, 40, 24)
    expected = F.scaled_dot_product_attention(q, k, v)
    error = difference(attention(q, k, v, fp8_pv=fp8_pv), expected)
    assert 1e-4 < error < (0.05 if fp8_pv else 0.02)
    # without the mean taken off, int8 keeps little of such keys
    plain = F.scaled_dot_product_attention(*(module._rounded(part, Shares(1)) for part in (q, k)), v)
    assert difference(plain, expected) > 3 * difference(attention(q, k, v), expected)


def test_products_are_those_of_codes() -> None:
    """Written out: int8 codes, scales of tokens, e4m3 probabilities and values."""
    q, k, v = inputs(1, 1, 5, 8, keys=7)
    codes, scales = [], []
    for part in (q / 8**0.5, k - k.mean(-2, keepdim=True)):
        scales.append(part.abs().amax(-1, keepdim=True) / 127)
        codes.append((part / scales[-1]).round().double())
    scores = codes[0] @ codes[1].mT * scales[0] * scales[1].mT
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    expected = (p / p.sum(-1, keepdim=True)) @ v.double()
    torch.testing.assert_close(attention(q, k, v).double(), expected, rtol=1e-5, atol=1e-6)
    step = v.abs().amax(-2, keepdim=True) / 448
    narrow = (p * 448).float().to(torch.float8_e4m3fn).double() / 448
    expected = narrow @ ((v / step).to(torch.float8_e4m3fn).double() * step) / p.sum(-1, keepdim=True)
    torch.testing.assert_close(attention(q, k, v, fp8_pv=True).double(), expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("name", "span", "keys"), [("thread", 32, 64), ("thread_sm90", 16, 128)])
def test_a_thread_s_tokens_are_those_that_its_instructions_hold(name: str, span: int, keys: int) -> None:
    """Of 8 threads each the queries 8 apart, of 4 threads each the pairs of keys 8 apart."""
    tokens = torch.arange(2 * keys)
    of_queries, of_keys = (shares.group(tokens) for shares in GRANULARITIES[name])
    rows = [tokens[block + lane : block + span : 8] for block in range(0, 2 * keys, span) for lane in range(8)]
    assert [of_queries[row].unique().tolist() for row in rows] == [[i] for i in range(len(rows))]
    pairs = [
        torch.cat([tokens[block + 2 * lane + i : block + keys : 8] for i in (0, 1)])
        for block in range(0, 2 * keys, keys)
        for lane in range(4)
    ]
    assert [of_keys[pair].unique().tolist() for pair in pairs] == [[i] for i in range(len(pairs))]


@pytest.mark.parametrize("name", GRANULARITIES)
def test_tokens_that_share_a_scale_are_on_one_grid(name: str) -> None:
    """The last group may be a part of one; heads and samples are apart."""
    x = torch.randn(2, 3, 150, 16) * torch.logspace(-2, 2, 150)[:, None]
    for shares in GRANULARITIES[name]:
        out, groups = module._rounded(x, shares), shares.group(torch.arange(150))
        expected = torch.empty_like(x)
        for group in groups.unique():
            mine = x[:, :, groups == group]
            step = mine.abs().amax((2, 3), keepdim=True) / 127
            expected[:, :, groups == group] = (mine / step).round() * step
        assert torch.equal(out, expected)


def test_the_more_tokens_share_a_scale_the_further_from_torch_s() -> None:
    q, k, v = inputs(1, 2, 256, 32, keys=256)
    q, k = (part * torch.rand(256, 1).add(0.1).pow(2) for part in (q, k))
    expected = F.scaled_dot_product_attention(q, k, v)
    errors = [difference(attention(q, k, v, granularity=name), expected) for name in GRANULARITIES]
    assert errors[0] < errors[1] < errors[3] < errors[4] and errors[0] < errors[2] < errors[4]


@pytest.mark.parametrize(
    "given",
    [
        {"attn_mask": torch.rand(40, 33) > 0.3},
        {"attn_mask": torch.rand(2, 1, 1, 33) > 0.3},
        {"attn_mask": torch.randn(2, 3, 40, 33)},
        {"is_causal": True},
        {"scale": 0.7},
    ],
)
def test_masks_and_scales_are_torch_s(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(2, 3, 40, 24)
    expected = F.scaled_dot_product_attention(q, k, v, **given)
    whole = attention(q, k, v, **given)
    assert difference(whole, expected) < 0.03
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 2 * 3 * 33 * 7)  # 7 queries at a time
    torch.testing.assert_close(attention(q, k, v, **given), whole)


def test_heads_that_share_keys_rows_without_any_and_half_precision() -> None:
    q, k, v = inputs(2, 4, 6, 8)
    shared = attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    torch.testing.assert_close(shared, attention(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1)))
    nothing = attention(q, k, v, torch.zeros(6, 33, dtype=torch.bool))
    assert not nothing.isnan().any()
    assert attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(UserError, match="drops out"):
        attention(q, k, v, dropout_p=0.1)


class Attends(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, fails: bool = False) -> Tensor:
        if fails:
            raise ValueError("broken")
        return F.scaled_dot_product_attention(q, k, v)


class Otherwise(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v


def test_only_the_denoiser_that_was_told_computes_so() -> None:
    q, k, v = inputs(2, 3, 40, 24)
    told, other = Attends(), Attends()
    emulate_attention(told, "int8_qk")
    with pytest.raises(ValueError, match="broken"):
        told(q, k, v, fails=True)
    assert torch.equal(told(q, k, v), attention(q, k, v))
    assert torch.equal(other(q, k, v), F.scaled_dot_product_attention(q, k, v))
    parts = nn.ModuleDict({"high": Attends(), "low": Attends()})
    emulate_attention(parts, "int8_qk_fp8_pv", "block")
    assert torch.equal(parts["low"](q, k, v), attention(q, k, v, fp8_pv=True, granularity="block"))


def test_where_it_would_change_nothing_it_is_refused() -> None:
    denoiser = Otherwise()
    emulate_attention(denoiser, "int8_qk")
    with pytest.raises(UserError, match=r"Otherwise computes its attention by other means"):
        denoiser(*inputs(1, 1, 4, 8))
    with pytest.raises(UserError, match=r"quant\.attention='int4_qk': choose null or one of int8_qk, int8_qk_fp8_pv"):
        check_attention("int4_qk")
    with pytest.raises(UserError, match="choose one of token, thread, thread_sm90, warp, block"):
        check_attention("int8_qk", "head")
    with pytest.raises(UserError, match="attention_granularity=warp goes with an attention that is emulated"):
        check_attention(None, "warp")

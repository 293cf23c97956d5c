"""Library operations alone: where their product is not exact."""

import pytest
import torch
from agreement import variant_of

from viditq.quant import QuantSpec
from viditq.quant.execution.backends import PortableBackend, Unavailable, portable

TOKEN, CHANNEL = QuantSpec(8, False, "token", None, True), QuantSpec(8, False, "channel")


def test_steps_aside_where_the_product_saturates(monkeypatch):
    """What CPUs without VNNI do: pairs of products are added up in 16 bits."""

    def saturating(codes, weight):
        products = codes.to(torch.int32)[..., None] * weight.to(torch.int32)
        pairs = (products[:, 0::2] + products[:, 1::2]).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(1, dtype=torch.int32)

    portable.exact_product.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    variant = variant_of(CHANNEL, TOKEN, torch.randn(4, 64), torch.randn(50, 64))
    with pytest.raises(Unavailable, match="not exact") as raised:
        PortableBackend().prepare(variant)
    with pytest.raises(Unavailable):
        PortableBackend().check_available()
    assert raised.value.reason
    assert variant.qweight is not None, "nothing was changed"
    portable.exact_product.cache_clear()

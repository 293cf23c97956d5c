"""backend=auto: the fastest that is exact, and one line per kind of layer that says so."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from viditq.quant import LayerScheme, QuantSpec, get_backend
from viditq.quant.execution.backends import Unavailable, auto
from viditq.quant.execution.backends.native.backend import NativeBackend
from viditq.quant.execution.backends.portable import PortableBackend

W4A8 = LayerScheme(QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True))
W4 = LayerScheme(QuantSpec(4, granularity="channel"), None)


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    for remembered in (auto.first_that_takes, auto._tell):
        remembered.cache_clear()
    yield
    for remembered in (auto.first_that_takes, auto._tell):
        remembered.cache_clear()


def refuse(backend: str, reason: str | None) -> None:
    if reason is not None:
        raise Unavailable(backend, reason)


@pytest.mark.parametrize(
    ("native", "portable", "taken", "told"),
    [
        (None, None, "native", "W4 channel, A8 token: native"),
        ("no compiler", None, "portable", "W4 channel, A8 token: portable (not native: no compiler)"),
        ("no VNNI", "inexact", "fake", "W4 channel, A8 token: fake (not native: no VNNI; not portable: inexact)"),
    ],
)
def test_it_takes_the_fastest_there_is(
    native: str | None, portable: str | None, taken: str, told: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    for cls, reason in ((NativeBackend, native), (PortableBackend, portable)):
        monkeypatch.setattr(cls, "check_available", lambda self, reason=reason: refuse(self.name, reason))
    with caplog.at_level(logging.INFO, logger="viditq"):
        assert {get_backend("auto").resolve(W4A8).name for _ in range(3)} == {taken}
    assert caplog.messages == [told]


def test_what_no_integer_backend_takes_and_the_field_are_told(caplog: Any) -> None:
    a4 = LayerScheme(None, QuantSpec(4, granularity="token", dynamic=True))
    with caplog.at_level(logging.INFO, logger="viditq"):
        assert [get_backend("auto").resolve(scheme).name for scheme in (W4, a4)] == ["weight_only", "fake"]
    assert caplog.messages == [
        "W4 channel, A float: weight_only (not native: it does not take activation; not portable: it does not take "
        "activation)",
        "W float, A4 token: fake (not native: it does not take weight; not portable: it does not take weight)",
    ]


def test_a_segment_in_float_is_nothing_to_tell(caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="viditq"):
        assert get_backend("auto").resolve(LayerScheme(None, None)).name == "fake"
    assert not caplog.messages


def test_the_full_range_of_symmetric_activations_is_emulated() -> None:
    """The integer kernels have the largest value over 127."""
    scheme = LayerScheme(QuantSpec(8, True, "channel"), QuantSpec(8, True, "token", dynamic=True, full_range=True))
    for name in ("native", "portable"):
        assert get_backend(name).unsupported_field(scheme) == "activation.full_range"
    assert get_backend("auto").resolve(scheme).name == "fake"

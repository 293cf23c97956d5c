"""Quantized text encoders, in words: bits and bytes, apart from the denoiser and with it, and what embeddings lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from viditq.report.wording import num_bytes, percent, three_digits


@dataclass(frozen=True)
class TextEncoderView:
    """sizes: rows of part, weight bits, bytes on disk, bytes in 16 bits. errors: rows of embedding, relative L2 error
    (mean and worst over prompts), cosine (mean and worst).
    """

    sizes: tuple[tuple[str, str, str, str], ...]
    errors: tuple[tuple[str, str, str, str, str], ...]


def text_encoder_view(metrics: Mapping[str, Any]) -> TextEncoderView | None:
    """metrics: the content of metrics.json; None where text encoders are in float."""
    found = metrics.get("text_encoder")
    if not found:
        return None
    sizes = {"denoiser": metrics, **found["parts"], "together": found["together"]}
    return TextEncoderView(
        tuple(_size(name.replace("_", " "), size) for name, size in sizes.items()),
        tuple(
            (
                name,
                percent(error["relative_l2"]),
                percent(error["worst_relative_l2"]),
                f"{error['cosine']:.5f}",
                f"{error['worst_cosine']:.5f}",
            )
            for name, error in found["errors"].items()
        ),
    )


def _size(name: str, size: Mapping[str, Any]) -> tuple[str, str, str, str]:
    bits = three_digits(size["average_weight_bits"])
    return name, bits, num_bytes(size["size_bytes"]), num_bytes(size["float_size_bytes"])


def text_encoder_lines(metrics: Mapping[str, Any]) -> list[str]:
    """The same as lines for the terminal."""
    view = text_encoder_view(metrics)
    if view is None:
        return []
    lines = [
        f"{name}: W{bits}, {size} on disk, {whole} in fp16"
        for name, bits, size, whole in view.sizes
        if name != "denoiser"
    ]
    return lines + [
        f"{name}: relative L2 error {mean} (worst {worst}), cosine {cosine} (worst {least})"
        for name, mean, worst, cosine, least in view.errors
    ]

"""Fused blocks give what the plain blocks give, and step aside with a line where they do not know what to do."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import images, videos

from viditq.fusion import install
from viditq.fusion.block import FusedBlock
from viditq.models.stdit import STDiT
from viditq.quant import LayerScheme, QuantPlan, QuantSpec, linear_names, quantize_denoiser
from viditq.quant.execution.backends.fake import FakeBackend

FLOAT = ("*norm1*.linear", "*norm.linear", "proj_out", "*embed*", "adaln*", "caption*", "time*", "x_embedder", "norm_out*")
PIPELINES = {  # name -> builder, arguments of the call, fused blocks by class
    "pixart": (images.pixart_alpha, {}, {"BasicTransformerBlock": 2}),
    "latte": (videos.latte, {"video_length": 4}, {"BasicTransformerBlock": 4}),
    "wan": (videos.wan21, {"num_frames": 5}, {"WanTransformerBlock": 2}),
    "wan_5b": (videos.wan22_5b, {"num_frames": 5}, {"WanTransformerBlock": 2}),
    "flux": (images.flux_dev, {}, {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2}),
}

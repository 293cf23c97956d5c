"""Calls that a search makes again: as they were, though pipelines and denoisers write into what was given."""

from typing import Any

import torch
from torch import Tensor, nn

from viditq.quant.calibration.context import StepContext
from viditq.quant.diagnosis.arguments import unshared
from viditq.quant.search.recorded import recorded


class Caching(nn.Module):
    """Its last call only writes into the cache, as AnyFlow-FAR's after each chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor, cache: dict[str, list[Tensor]], predict: bool) -> Any:
        out = self.fc(x) + sum(cache["keys"])
        cache["keys"].append(x.mean(1, keepdim=True))
        return (out if predict else None, cache)


def test_calls_are_kept_as_they_were_and_those_that_predict_nothing_left_out() -> None:
    torch.manual_seed(0)
    denoiser, context = Caching(), StepContext((0, 0.5, 1))
    cache: dict[str, list[Tensor]] = {"keys": [torch.zeros(1, 1, 4)]}
    x, outputs = torch.randn(1, 3, 4), []
    attachment = context.attach(denoiser)
    with torch.no_grad(), recorded({"": denoiser}, context) as steps:
        for step in (900, 700, 200, 0):
            out = denoiser(x, timestep=torch.full((1,), step), cache=cache, predict=step > 0)[0]
            if out is not None:
                outputs.append(out)
                x -= 0.1 * out  # in place, as pipelines may
    attachment.remove()
    assert [level for level, _ in steps["", 1]] == [0.9, 0.7] and [level for level, _ in steps["", 0]] == [0.2]
    calls = [call for _, call in (*steps["", 1], *steps["", 0])]
    with torch.no_grad():
        for _ in range(2):  # what is kept stays, however often it is used
            for (args, kwargs), expected in zip(calls, outputs, strict=True):
                args, kwargs = unshared(args, kwargs)
                assert torch.equal(denoiser(*args, **kwargs)[0], expected)

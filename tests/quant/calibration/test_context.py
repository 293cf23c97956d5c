import subprocess
import sys

import pytest
import torch
from torch import nn

from viditq.errors import UserError
from viditq.quant import QuantSpec, StepContext, quantize_denoiser
from viditq.quant.calibration.context import TimestepScale
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme


class Spy(nn.Module):
    def __init__(self, context: StepContext) -> None:
        super().__init__()
        self.context = context

    def forward(self, x, encoder_hidden_states=None, timestep=None):
        if x is None:
            raise RuntimeError("inside")
        return self.context.noise_level, self.context.segment


@pytest.fixture
def spy() -> Spy:
    spy = Spy(StepContext((0, 0.5, 1)))
    spy.context.attach(spy)
    return spy


def test_reads_the_timestep_wherever_it_is_given(spy):
    assert spy(0, None, torch.tensor([999.0, 999.0])) == (0.999, 1)
    assert spy(0, timestep=torch.tensor(500)) == (0.5, 0)
    assert spy(0, timestep=0) == (0.0, 0)
    assert spy(0, timestep=torch.full((2, 3), 501.0, dtype=torch.bfloat16))[1] in (0, 1)


def test_forgets_it_afterwards_even_after_an_error(spy):
    spy(0, timestep=1)
    assert spy.context.segment is None and spy.context.noise_level is None
    with pytest.raises(RuntimeError, match="inside"):
        spy(None, timestep=1)
    assert spy.context.segment is None


def test_scale_of_the_timestep():
    spy = Spy(StepContext((0, 0.25, 0.5, 1), timestep_scale=1.0))
    handle = spy.context.attach(spy)
    assert spy(0, timestep=torch.tensor([0.3])) == (pytest.approx(0.3), 1)
    handle.remove()
    assert spy(0, timestep=torch.tensor([0.3])) == (None, None)


@pytest.mark.parametrize(
    ("timestep", "message"),
    [
        (None, "without a timestep"),
        (torch.tensor([1.0, 2.0]), "different timesteps"),
        (1001, r"timestep 1001 lies outside \[0, 1000\]; set timestep_scale"),
        (-1, "lies outside"),
        (float("nan"), "lies outside"),
    ],
)
def test_bad_timesteps(spy, timestep, message):
    with pytest.raises(UserError, match=message):
        spy(0, timestep=timestep)


def test_a_model_without_timestep_is_refused():
    with pytest.raises(UserError, match=r"Linear.forward takes no argument 'timestep' \(it takes: input\)"):
        StepContext((0, 1)).attach(nn.Linear(1, 1))


def test_a_single_segment_reads_no_timestep_until_it_is_asked():
    spy = Spy(StepContext((0, 1)))
    spy.context.attach(spy)
    different = torch.tensor([1.0, 2.0])
    with pytest.raises(UserError, match="different timesteps"):
        spy(0, timestep=different)  # it asks for the noise level
    spy.forward = lambda x, timestep: spy.context.segment
    assert spy(0, timestep=different) == 0
    with pytest.raises(UserError, match="without a timestep"):
        spy(0, timestep=None)
    assert spy.context.noise_level is None and spy.context.segment is None


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x, timestep):
        return self.linear(x) + timestep.mean()


def compiled_and_plain(segments, fullgraph):
    """Number of graphs traced while a compiled denoiser gives what it gives uncompiled."""
    traced = []

    def keep(graph, _):
        traced.append(graph)
        return graph

    token = QuantSpec(8, granularity="token", dynamic=True)
    schemes = {str(bits): LayerScheme(QuantSpec(bits, granularity="channel"), token) for bits in (8, 4)}
    denoiser, plan = Small(), QuantPlan(segments, schemes, {"linear": ["8", "4"][: len(segments) - 1]})
    quantize_denoiser(denoiser, plan, None, "auto", 1000.0)
    compiled = torch.compile(denoiser, backend=keep, fullgraph=fullgraph)
    x = torch.randn(32, 64)
    for level in (900.0, 100.0, 901.0, 101.0):
        timestep = torch.full((2,), level)
        assert torch.equal(compiled(x, timestep), denoiser(x, timestep))
    return len(traced)


def test_a_denoiser_of_one_segment_compiles_into_one_graph(caplog):
    assert compiled_and_plain((0, 1), fullgraph=True) == 1
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_with_several_segments_the_timestep_is_read_between_graphs():
    assert compiled_and_plain((0, 0.5, 1), fullgraph=False) > 1


def test_quantizing_does_not_import_the_compiler():
    """Which takes as long as torch itself; a decorator of torch.compiler is enough to bring it in."""
    line = "import sys, viditq.quant; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", line], check=True)


@pytest.mark.parametrize(
    ("scale", "timestep", "level"),
    [
        (1000.0, [[0.0, 0.0, 700.0, 700.0], [0.0, 700.0, 700.0, 700.0]], 0.7),  # Wan 2.2 5B: the first frame is given
        ({"at_noise": 0.0, "at_clean": 1.0}, [[1.0, 0.25, 0.25]], 0.75),
        (1.0, [[[[1e-4]], [[0.5]], [[0.5]]]], 0.5),  # Cosmos 2.5: next to clean
    ],
)
def test_tokens_that_are_given_are_told_so(scale, timestep, level):
    found = TimestepScale.of(scale)
    assert found.noise_level(found.of_step(torch.tensor(timestep))) == pytest.approx(level)


def test_tokens_at_noise_levels_of_their_own_are_refused():
    with pytest.raises(UserError, match=r"noise levels of their own \(300 beside 700\)"):
        TimestepScale().of_step(torch.tensor([[0.0, 300.0, 700.0]]))
    with pytest.raises(UserError, match="different timesteps"):
        TimestepScale().of_step(torch.tensor([[0.0, 300.0], [0.0, 700.0]]))

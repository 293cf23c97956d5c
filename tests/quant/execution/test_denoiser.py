"""Copies of quantized denoisers, and models that are none: without a timestep, or fused by torch."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from viditq.errors import UserError
from viditq.quant import (
    Calibrator,
    QuantPlan,
    QuantSpec,
    Recipe,
    SmoothSpec,
    StepContext,
    linear_names,
    load_denoiser,
    quantize_denoiser,
    save_denoiser,
)
from viditq.quant.correction.ptqd import Correction, corrections_of
from viditq.quant.execution.linear import quant_linears

TOKEN = Recipe(QuantSpec(8, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True))
STATIC = Recipe(QuantSpec(8, granularity="channel"), QuantSpec(8, granularity="tensor"))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(x).relu())
        return out


class Timed(Perceptron):
    """Of this module, by whose name it is unpickled."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(hidden_states * (1 + timestep[:, None, None] / 1000))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


def run(denoiser: nn.Module, timestep: int) -> Tensor:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(timestep))
    with torch.no_grad():
        out: Tensor = denoiser(x, torch.full((2,), timestep))
    return out


@pytest.fixture
def by_segment(calibrated) -> nn.Module:
    """Quantized with scales per segment, and corrected."""
    torch.manual_seed(0)
    denoiser = Timed()
    stats = calibrated(denoiser, [0, 1], [100, 900])
    recipe = Recipe(TOKEN.weight, TOKEN.activation, SmoothSpec(per_segment=True), segments=(0, 0.5, 1))
    context = quantize_denoiser(denoiser, recipe.resolve(linear_names(denoiser)), stats)
    slopes, biases = torch.tensor([0.0, 0.5]), torch.tensor([[0.0] * 5, [1.0] * 5])
    Correction(slopes, biases, torch.tensor(1)).attach(denoiser, context)
    return denoiser


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_a_context_of_its_own(by_segment, how):
    expected = {timestep: run(by_segment, timestep) for timestep in (100, 900)}
    other = COPIES[how](by_segment)
    contexts = [{id(layer.context) for layer in quant_linears(model).values()} for model in (by_segment, other)]
    assert len(contexts[0]) == len(contexts[1]) == 1 and not contexts[0] & contexts[1]
    mine = next(iter(quant_linears(by_segment).values())).context
    mine._leave()
    for timestep in (900, 100):
        assert torch.equal(run(other, timestep), expected[timestep])
        assert corrections_of(other)[0].latest == timestep // 500
    assert corrections_of(by_segment)[0].latest == 1  # of its own last forward
    del by_segment
    assert torch.equal(run(COPIES[how](other), 900), expected[900])


def test_hooks_added_to_a_loaded_denoiser_take_no_ones_place(by_segment, monkeypatch):
    """torch counts hooks by process, and a loaded one's number is free there."""
    expected, stored = run(by_segment, 900), pickle.dumps(by_segment)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    loaded, calls = pickle.loads(stored), []
    for _ in range(20):
        loaded.register_forward_pre_hook(lambda *_: calls.append(1))
        loaded.register_forward_hook(lambda *_: None)
    assert torch.equal(run(loaded, 900), expected) and len(calls) == 20


MODELS: dict[str, Callable[[], nn.Module]] = {
    "module": Perceptron,
    "sequential": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)),
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "encoder layer, gelu first": lambda: nn.TransformerEncoderLayer(
        8, 2, 16, activation="gelu", norm_first=True, batch_first=True
    ),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODELS[name]().eval(), torch.randn(3, 5, 8)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_any_module_without_a_timestep(name, grad, tmp_path):
    model, x = built(name)
    model.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        exact = model(x)
        plan = TOKEN.resolve(linear_names(model))
        quantize_denoiser(model, plan, None)
        calls = []
        for layer in quant_linears(model).values():
            layer.forward = lambda x, forward=layer.forward: calls.append(1) or forward(x)
        quantized = model(x)
    assert len(calls) == len(plan.layers) and 0 < (quantized - exact).norm() < 0.03 * exact.norm()
    save_denoiser(tmp_path / "artifact", model, plan, {})
    again = load_denoiser(tmp_path / "artifact", lambda: built(name)[0])[0]
    with torch.set_grad_enabled(grad):
        assert torch.equal(again(x), quantized)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_a_module_without_a_timestep(name):
    model, x = built(name)
    names = linear_names(model)
    with pytest.raises(UserError, match="timestep_scale=None"), Calibrator(model, names):
        pass
    with torch.no_grad(), Calibrator(model, names, timestep_scale=None) as calibrator:
        calibrator.set_sample_seeds([0, 1, 2])
        exact = model(x)
    plan = STATIC.resolve(names)
    quantize_denoiser(model, plan, calibrator.stats, timestep_scale=None)
    with torch.no_grad():
        assert 0 < (model(x) - exact).norm() < 0.05 * exact.norm()


def test_an_encoder_given_a_padding_mask():
    """It packs its input for the fused layers, and reads the first one's weights for that."""
    model, x = built("encoder")
    padding = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    with torch.no_grad():
        exact = model(x, src_key_padding_mask=padding)
        quantize_denoiser(model, TOKEN.resolve(linear_names(model)), None)
        out = model(x, src_key_padding_mask=padding)
    kept = ~padding
    assert 0 < (out - exact)[kept].norm() < 0.03 * exact[kept].norm()


def test_several_segments_need_a_timestep():
    plan = QuantPlan((0, 0.5, 1), {}, {})
    with pytest.raises(UserError, match=r"Perceptron\.forward takes no argument 'timestep'"):
        quantize_denoiser(Perceptron(), plan, None)
    with pytest.raises(UserError, match="2 segments"):
        quantize_denoiser(Perceptron(), plan, None, timestep_scale=None)
    with pytest.raises(UserError, match="2 segments"):
        StepContext((0, 0.5, 1), None)


def test_saving_as_a_float_model_is_refused(tmp_path):
    from diffusers import PixArtTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "cross_attention_dim": 16}
    model = PixArtTransformer2DModel(**sizes, sample_size=4, caption_channels=8)
    quantize_denoiser(model, TOKEN.resolve(["transformer_blocks.0.ff.net.2"]), None)
    for each in (model, copy.deepcopy(model), saved(model)):
        with pytest.raises(UserError, match="save_denoiser"):
            each.save_pretrained(tmp_path / "float")
    assert not any(tmp_path.iterdir())

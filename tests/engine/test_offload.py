"""Offloaded pipelines give what others give; the CPU plays the GPU, and the meta device shows where tensors lie."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from viditq.engine.offload import Visit, check_offload, offload_layers, offload_pipeline
from viditq.engine.sampling import Calibration, Correcting, Diagnosing, Generation, run_batches
from viditq.errors import UserError
from viditq.experiment import build
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import generate
from viditq.quant import QuantSpec, Recipe
from viditq.quant.calibration.calibrator import Calibrator
from viditq.quant.calibration.observer_bank import ObserverBank
from viditq.quant.calibration.summary import summary_of
from viditq.quant.convert import quantize_denoiser
from viditq.quant.correction.ptqd import CorrectionFit, attach_corrections
from viditq.quant.diagnosis.diagnosis import Diagnosis
from viditq.quant.execution.linear import quant_linears
from viditq.quant.execution.model_linears import linear_names

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapter(configure: Callable[..., Any]) -> ModelAdapter:
    made: ModelAdapter = instantiate(configure("model=tiny_image", "model.num_steps=3").model, _convert_="all")
    return made


@pytest.fixture(scope="module")
def embeds(adapter: ModelAdapter) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(1, adapter.max_tokens or 0, dtype=torch.int64)
    values = {f"{n}prompt_embeds": torch.randn(1, 16, 96, generator=generator) for n in ("", "negative_")}
    return {**values, "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone()}


@pytest.fixture(scope="module")
def plan(adapter: ModelAdapter, configure: Callable[..., Any]) -> Any:
    setting = instantiate(configure("quant=w4a8", "quant/smoothing=timestep_aware").quant, _convert_="all")
    return setting.plan(linear_names(adapter.build_denoiser()), adapter.keep_float)


@pytest.fixture(scope="module")
def stats(adapter: ModelAdapter, embeds: dict[str, Tensor]) -> Any:
    pipeline = adapter.load()
    calibrator = Calibrator(pipeline.transformer, linear_names(pipeline.transformer))
    calibrator.set_sample_seeds([0])
    with calibrator:
        generate(adapter, pipeline, [embeds], [0], 0)
    return calibrator.stats


def loaded(adapter: ModelAdapter, plan: Any, stats: Any) -> Any:
    pipeline = adapter.load()
    if plan is not None:
        quantize_denoiser(pipeline.transformer, plan, stats)
    return pipeline


# Slow: the float model; the quantized one has float layers too.
@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("quantized", [pytest.param(False, marks=pytest.mark.slow), True])
def test_samples_are_the_same(
    offload: str, quantized: bool, adapter: ModelAdapter, embeds: dict[str, Tensor], plan: Any, stats: Any
) -> None:
    plan = plan if quantized else None
    expected = generate(adapter, loaded(adapter, plan, stats), [embeds, embeds], [0, 1], 0)
    pipeline = loaded(adapter, plan, stats)
    offload_pipeline(pipeline, offload, CPU)
    assert torch.equal(generate(adapter, pipeline, [embeds, embeds], [0, 1], 0), expected)


def test_between_calls_weights_are_away(adapter: ModelAdapter, plan: Any, stats: Any) -> None:
    denoiser = loaded(adapter, plan, stats).transformer
    biases = {f"{name}.bias" for name in quant_linears(denoiser)}
    offload_layers(denoiser, CPU)
    assert {p.device.type for n, p in denoiser.named_parameters() if n not in biases} == {"meta"}
    assert quant_linears(denoiser).keys() == set(plan.layers)


def test_tensors_of_the_current_variant_alone_go_to_the_device(adapter: ModelAdapter, plan: Any, stats: Any) -> None:
    """Computing on meta: only there does a device differ from the CPU on this machine."""
    denoiser = loaded(adapter, plan, stats).transformer
    layer = next(iter(quant_linears(denoiser).values()))
    offload_layers(denoiser, torch.device("meta"))
    layer.context.set_timestep(900)
    seen: list[tuple[str, str]] = []

    def linear(variant: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        current, other = layer.current_variant(), next(v for v in layer.variants if v is not layer.current_variant())
        seen.append((current.dense_weight.device.type, other.dense_weight.device.type))
        return x

    layer.backends = [SimpleNamespace(linear=linear)] * len(layer.variants)
    assert layer(torch.zeros(1, layer.in_features)).is_meta
    assert seen == [("meta", "cpu")]
    assert {v.dense_weight.device.type for v in layer.variants} == {"cpu"}


@pytest.mark.parametrize("offload", ["sequential", pytest.param("model", marks=pytest.mark.slow)])  # slow: the coarser
def test_lightning_moves_nothing_and_the_stages_agree(
    offload: str, adapter: ModelAdapter, embeds: dict[str, Tensor], plan: Any, stats: Any, configure: Callable[..., Any]
) -> None:
    """Generation, calibration and diagnosis, through the trainer."""

    def run(offload: str | None) -> tuple[Tensor, Any, Any]:
        trainer = instantiate(configure("trainer=cpu").trainer, _convert_="all")
        trainer.offload = offload  # as on a GPU: the constructor refuses it here
        arguments = (adapter, loaded(adapter, None, None), lambda i: embeds, 0)
        clips: list[Tensor] = []

        def sink(index: int, clip: Tensor) -> None:
            assert (len(list(module.parameters())) == 0) == (offload is not None)
            clips.append(clip)

        module = Generation(*arguments, sink=sink)
        run_batches(trainer, module, [[0]])
        assert module.pipeline is None and not len(module.parts)  # nothing stays in Lightning's ring
        partials = SimpleNamespace(load=lambda rank: SimpleNamespace(done=frozenset(), state={}), save=lambda *_: None)
        pipeline = loaded(adapter, None, None)
        calibrator = Calibrator(pipeline.transformer, linear_names(pipeline.transformer))
        arguments = (adapter, pipeline, lambda i: embeds, 0)
        run_batches(trainer, Calibration(*arguments, accumulator=calibrator, partials=partials, rank=0), [(0, [0])])
        pipeline, quantized = loaded(adapter, None, None), loaded(adapter, plan, stats).transformer
        diagnosis = Diagnosis(pipeline.transformer, quantized, plan)
        arguments = (adapter, pipeline, lambda i: embeds, 0)
        diagnosing = Diagnosing(*arguments, accumulator=diagnosis, quantized=quantized, partials=partials, rank=0)
        run_batches(trainer, diagnosing, [(0, [0])])
        return clips[0], calibrator.state(), diagnosis.state()

    (clip, observed, errors), (clip_0, observed_0, errors_0) = run(offload), run(None)
    assert torch.equal(clip, clip_0)
    for mine, theirs in ((observed, observed_0), (errors, errors_0)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_statistics_follow_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, moved = ObserverBank(["layer"], 2, 4, 3, "meta"), []
    observer, real = bank.observers["layer"], ObserverBank.to

    def to(self: ObserverBank, device: torch.device) -> None:
        moved.append(device)
        self._state = ObserverBank(["layer"], 2, 4, 3)._state  # meta tensors cannot be copied
        real(self, device)

    monkeypatch.setattr(ObserverBank, "to", to)
    seen = {("layer", 0): summary_of(torch.ones(1, 5, 4), torch.tensor([0, 1]), torch.tensor([0, 1]), 0.3)}
    bank.update(seen)
    bank.update(seen)
    assert moved == [CPU]
    assert bank.observers["layer"] is observer and observer.count.tolist() == [2, 0] and observer.minimum[0].eq(1).all()


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_there_is_nothing_to_spare_without_a_gpu(offload: str, configure: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=rf"trainer.offload={offload} spares .* trainer=gpu"):
        build(configure("experiment=smoke", f"trainer.offload={offload}"))
    check_offload(offload, torch.device("cuda", 0))
    check_offload(None, CPU)


def test_unknown_offloads_are_refused(configure: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="offload='attic' is unknown; choose null or one of model, sequential, disk"):
        build(configure("experiment=smoke", "trainer.offload=attic"))
    with pytest.raises(UserError, match="'much' is no number of bytes"):
        build(configure("experiment=smoke", "trainer.offload=disk", "trainer.memory_budget=much"))
    assert build(configure("experiment=smoke", "trainer.offload=disk")).memory_budget == 10**9


@pytest.mark.parametrize("offload", ["sequential", pytest.param("model", marks=pytest.mark.slow)])  # slow: the coarser
def test_a_corrected_denoiser_and_the_fit_of_its_correction(
    offload: str, adapter: ModelAdapter, embeds: dict[str, Tensor], plan: Any, stats: Any, configure: Callable[..., Any]
) -> None:
    """The correction is no layer of its own that offloading could bring when it is called."""

    def run(offload: str | None) -> tuple[dict[str, Tensor], Tensor]:
        trainer = instantiate(configure("trainer=cpu").trainer, _convert_="all")
        trainer.offload = offload
        pipeline, quantized = loaded(adapter, None, None), loaded(adapter, plan, stats).transformer
        fit = CorrectionFit(pipeline.transformer, quantized, scheduler=pipeline.scheduler)
        partials = SimpleNamespace(load=lambda rank: SimpleNamespace(done=frozenset(), state={}), save=lambda *_: None)
        arguments = (adapter, pipeline, lambda i: embeds, 0)
        correcting = Correcting(*arguments, accumulator=fit, quantized=quantized, partials=partials, rank=0)
        run_batches(trainer, correcting, [(0, [0])])
        corrected = loaded(adapter, None, None)
        context = quantize_denoiser(corrected.transformer, plan, stats)
        attach_corrections(corrected.transformer, fit.state(), context)
        clips: list[Tensor] = []
        sink = Generation(adapter, corrected, lambda i: embeds, 0, sink=lambda i, clip: clips.append(clip))
        run_batches(trainer, sink, [[0]])
        return fit.state(), clips[0]

    (sums, clip), (sums_0, clip_0) = run(offload), run(None)
    torch.testing.assert_close(sums, sums_0, rtol=1e-12, atol=1e-12)  # LAPACK varies by an ulp of float64
    torch.testing.assert_close(clip, clip_0, rtol=0, atol=1e-6)


def test_what_a_backend_holds_comes_along_and_goes_again() -> None:
    """Codes in a backend's own layout are no buffers; so are those of integers on a GPU."""
    spec, token = QuantSpec(8, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
    model = nn.Sequential(nn.Linear(64, 32))
    plan = Recipe(spec, token).resolve(["0"])
    quantize_denoiser(model, plan, None, "portable", 1000.0)
    layer, visit = quant_linears(model)["0"], Visit(torch.device("meta"))
    held = layer.current_variant().held
    assert held is not None
    visit.pre_forward(layer, torch.ones(1, 64))
    moved = layer.current_variant().held
    assert moved is not None and all(t.device.type == "meta" for t in moved if isinstance(t, Tensor))
    visit.post_forward(layer, None)
    assert layer.current_variant().held is held

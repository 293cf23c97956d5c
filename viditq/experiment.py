"""The objects of one run, built from the configuration and checked before any slow work starts."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torchmetrics import Metric

from viditq.byte_numbers import num_bytes
from viditq.checks import OF_LOGGERS, Checked, check
from viditq.data.prompts import PromptData
from viditq.errors import UserError
from viditq.export.folding import only_foldable
from viditq.external.denoisers import check_source
from viditq.external.policy import ExternalQuantization
from viditq.files import digest_of
from viditq.gate import Gate
from viditq.models.adapter import ModelAdapter
from viditq.models.attention import check_device
from viditq.models.checks import GUESSED
from viditq.models.compiling import check_compiler
from viditq.models.contents import check_contents
from viditq.models.roles import FLOAT, USUAL
from viditq.models.sampler_noise import check_shrinkable
from viditq.models.schedule import noise_levels
from viditq.models.schedulers import make_scheduler
from viditq.models.text import check_encodes
from viditq.models.text_encoders import build_encoder, encoder_names
from viditq.nulls import check_nulls
from viditq.quant.calibration.noise_level import bucket_edges, interval_of, mixed_bucket
from viditq.quant.convert import linear_names, shapes_of
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.policy import StoredArtifact
from viditq.quant.execution.backends import check_supported, get_backend
from viditq.quant.search.policy import SensitivitySearch
from viditq.quant.setting import QuantSetting
from viditq.quant.text_encoder import text_encoder_plan
from viditq.run_dir import fingerprint

# Keys that change neither samples nor numbers, so that a run may be continued with others.
UNTRACKED = ("stages", "trainer", "logger", "debug", "estimate", "fit", "cache_dir", "batch_size", "gate", "benchmark")
NO_INFERENCE_MODE = {"inference_mode": False}  # in which quanto cannot unpack its weights; no_grad computes the same
MOST_BUCKETS = 1000  # as many as there are timesteps


@dataclass(frozen=True)
class Experiment:
    """Everything a stage needs.

    roles: every Linear of the denoisers -> its role. weights: fingerprint of the model's files. tracked: what decides
    the results: the configuration and fingerprints of the files it names.
    """

    name: str
    seed: int
    batch_size: int
    num_buckets: int
    rows_per_bucket: int
    block_input_bytes: int
    moment_bytes: int
    floor_prompts: int
    diagnosis_prompts: int
    benchmark_rounds: int
    benchmark_seconds: float | None
    gate: Gate
    backend: str
    stages: tuple[str, ...]
    cache_dir: Path
    adapter: ModelAdapter
    quant: QuantSetting
    plan: QuantPlan
    roles: Mapping[str, str]
    weights: str
    data: PromptData
    make_metrics: Callable[[], dict[str, Metric]]
    make_trainer: Callable[[], L.Trainer]
    make_logger: Callable[..., Any] | None
    logger_name: str
    tracked: Mapping[str, Any]
    encoder_plans: Mapping[str, QuantPlan] = field(default_factory=dict)
    offload: str | None = None
    memory_budget: int | None = None

    @property
    def floor_seed(self) -> int:
        """The other seed of the noise floor; the next one, whose samples a sweep over seeds shares."""
        return self.seed + 1

    @property
    def floor_size(self) -> int:
        """Number of prompts of the noise floor, the first ones; 0 = there is none."""
        return min(self.floor_prompts, len(self.data.prompts))

    @property
    def floor_dtype(self) -> str:
        """The other dtype of the noise floor."""
        return "float32" if self.adapter.dtype == "bfloat16" else "bfloat16"


def build(cfg: DictConfig, checked: Checked | None = None) -> Experiment:
    """Instantiate the configuration; raises UserError (or Hydra's own message) for anything that cannot work.

    checked: what `checks.check` has returned for it, where that was called before.
    """
    checked = check(cfg) if checked is None else checked
    quant, data = checked.quant, checked.data
    tracked = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tracked, dict)
    check_nulls(cfg.model, "model", but=GUESSED)  # told by check_values, which knows what is guessed
    adapter: ModelAdapter = instantiate(cfg.model, _convert_="all")
    _check_model(adapter, data, lenient=cfg.estimate == "meta" or cfg.fit is not None)
    (plan, roles), weights = _plan(adapter, quant), adapter.weights_fingerprint()
    if data.ready_digest is not None:  # all that is cached depends on these embeddings
        weights = fingerprint({"weights": weights, "embeds": data.ready_digest})
    stored = quant.policy if isinstance(quant.policy, StoredArtifact) else None
    if stored is None:
        _check_segments(adapter, plan, cfg.calibration.num_buckets)
    else:
        stored.check_model(adapter.to_dict())
    if quant.shrinks_noise:
        check_shrinkable(make_scheduler(adapter), adapter.call)
    if not adapter.compile:  # younger than what folders of runs hold
        tracked["model"].pop("compile", None)
    tracked["calibration"].pop("moment_bytes")  # how often the prompts are sampled, not what comes of it
    encoder_plans = _encoder_plans(adapter, quant, data)
    if quant.text_encoder is None:  # likewise
        tracked["quant"].pop("text_encoder", None)
    prompts = fingerprint({"evaluation": data.prompts, "calibration": data.calibration_prompts})
    inputs: dict[str, Any] = {"weights": weights, "prompts": prompts, "plan": fingerprint({"json": plan.to_json()})}
    inputs |= {} if stored is None else {"artifact": stored.digest}
    external = quant.policy if isinstance(quant.policy, ExternalQuantization) else None
    if external is not None:
        check_source(adapter, external)
        inputs["external"] = {**external.versions, "files": digest_of(external.files)}
    experiment = Experiment(
        name=cfg.name,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        num_buckets=cfg.calibration.num_buckets,
        rows_per_bucket=cfg.calibration.rows_per_bucket,
        block_input_bytes=cfg.calibration.block_input_bytes,
        moment_bytes=cfg.calibration.moment_bytes,
        floor_prompts=cfg.noise_floor.num_prompts,
        diagnosis_prompts=cfg.diagnosis.num_prompts,
        benchmark_rounds=cfg.benchmark.rounds,
        benchmark_seconds=cfg.benchmark.max_seconds,
        gate=checked.gate,
        backend=cfg.backend,
        stages=checked.stages,
        cache_dir=checked.cache_dir,
        adapter=adapter,
        quant=quant,
        plan=plan,
        roles=roles,
        weights=weights,
        encoder_plans=encoder_plans,
        data=data,
        make_metrics=lambda: instantiate(cfg.metric, _convert_="all"),
        make_trainer=lambda: _trainer(cfg.trainer, NO_INFERENCE_MODE if external is not None else {}),
        make_logger=_make_logger(cfg.logger) if cfg.logger else None,
        logger_name=str(cfg.logger["_target_"]) if cfg.logger else "none",
        tracked={str(k): v for k, v in tracked.items() if k not in UNTRACKED} | {"inputs": inputs},
    )
    trainer = experiment.make_trainer()
    device = trainer.strategy.root_device
    check_device(adapter.attention, device.type)
    if external is not None:
        external.check_device(device.type)
    if adapter.compile:
        check_compiler(device, getattr(trainer, "offload", None))
    backend = _backend(cfg.backend, device.type, plan)
    budget = num_bytes(getattr(trainer, "memory_budget", None))
    return replace(experiment, backend=backend, offload=getattr(trainer, "offload", None), memory_budget=budget)


def _backend(name: str, device: str, plan: QuantPlan) -> str:
    """The backend that runs on this kind of device; on a GPU, for which there is no integer one yet, auto is emulation.

    Builds its kernels where that is still to be done, and says what each kind of layer gets. Raises UserError where it
    cannot run here, or cannot take a layer.
    """
    if name == "native" and device != "cpu":
        raise UserError(
            f"backend=native multiplies on a CPU, and this run on {device}. Leave backend=auto, or choose trainer=cpu."
        )
    name = "fake" if name == "auto" and device != "cpu" else name
    backend = get_backend(name)
    if plan.layers:
        backend.check_available()
    for layer in plan.layers:
        for segment in range(plan.num_segments):
            if (scheme := plan.scheme(layer, segment)) is not None:
                check_supported(backend, layer, scheme)
                backend.resolve(scheme)
    return name


def _check_model(adapter: ModelAdapter, data: PromptData, lenient: bool) -> None:
    """Raises UserError unless the model's files hold all that the run needs of them; weights of the hub come later."""
    to_encode = [p for p in (*data.prompts, *data.calibration_prompts) if p not in data.ready_embeds]
    if to_encode:
        check_encodes(adapter, to_encode)
    check_contents(adapter, without=() if to_encode else adapter.text_parts, lenient=lenient or adapter.of_hub)


def _plan(adapter: ModelAdapter, quant: QuantSetting) -> tuple[QuantPlan, dict[str, str]]:
    """The plan for this model and its Linears' roles.

    Refused here: unknown layers, Linears without a role, a search that has nothing to find, and smoothing that could be
    folded away nowhere.
    """
    denoiser = adapter.build_denoiser()
    names = linear_names(denoiser)
    roles = adapter.linear_roles(names)
    plan = only_foldable(quant.plan(names, [name for name, role in roles.items() if role == FLOAT]), denoiser)
    if isinstance(quant.policy, SensitivitySearch):
        quant.policy.check(plan, roles, shapes_of(denoiser), USUAL, adapter.left_in_float_bytes())
    return plan, roles


def _encoder_plans(adapter: ModelAdapter, quant: QuantSetting, data: PromptData) -> dict[str, QuantPlan]:
    """Text encoder -> its plan; raises UserError where none can be quantized, or none would be used."""
    if quant.text_encoder is None:
        return {}
    names = encoder_names(adapter)
    if data.ready_embeds:
        raise UserError(
            "quant/text_encoder: data.embeds stands in for the text encoder, so that what it costs could not be "
            "measured. Leave data.embeds out, or give quant/text_encoder=none."
        )
    return {name: text_encoder_plan(build_encoder(adapter, name), quant.text_encoder, name) for name in names}


def _check_segments(adapter: ModelAdapter, plan: QuantPlan, num_buckets: int) -> None:
    """Raises UserError for a segment that needs statistics and has no step, or shares a bucket of them with another."""
    levels = noise_levels(adapter) if plan.needs_stats or plan.bits_vary else None
    if levels is None:
        return
    segments = [interval_of(plan.edges, level) for level in levels]
    for segment, (lo, hi) in enumerate(pairwise(plan.edges)):
        schemes = [plan.scheme(layer, segment) for layer in plan.layers]
        needed = any(scheme is not None and scheme.needs_stats for scheme in schemes)
        if needed and segment not in segments:
            raise UserError(
                f"No sampling step falls into the segment of noise levels {lo:g} to {hi:g}: the steps "
                f"lie at {', '.join(f'{level:.3g}' for level in levels)}. Calibrate with more sampling steps, or use "
                "wider segments (quant.segments)."
            )
    _check_buckets(dict(zip(levels, segments, strict=True)), num_buckets)


def _check_buckets(segments: Mapping[float, int], num_buckets: int) -> None:
    """Raises UserError where a bucket of the statistics holds steps of two segments. segments: noise level -> its."""
    mixed = mixed_bucket(segments, num_buckets)
    if mixed is None:
        return
    steps = ", ".join(f"{level:.4g}" for level in segments if interval_of(bucket_edges(num_buckets), level) == mixed)
    enough = [n for n in range(num_buckets + 1, MOST_BUCKETS + 1) if mixed_bucket(segments, n) is None]
    raise UserError(
        f"quant.segments (or a plan file) parts the sampling steps {steps}, which share one of {num_buckets} buckets "
        f"of noise level that statistics are kept in. Move the edge between them to {mixed / num_buckets:g} or "
        f"{(mixed + 1) / num_buckets:g}" + (f", or give calibration.num_buckets={enough[0]}." if enough else ".")
    )


def _make_logger(node: Any) -> Callable[..., Any]:
    """The logger's function with its own settings; it takes (folder, name, group, run_id)."""
    make = instantiate(node, _partial_=True, _convert_="all")
    try:
        inspect.signature(make).bind(*OF_LOGGERS)
    except (TypeError, ValueError) as error:
        given = ", ".join(str(key) for key in node if key != "_target_")
        raise UserError(
            f"The logger does not take the keys it was given ({given}). conf/logger shows the known ones; "
            "logger=csv and logger=none need none."
        ) from error
    return make


def _trainer(node: Any, settings: Mapping[str, Any]) -> L.Trainer:
    try:
        trainer = instantiate(node, **settings, _convert_="all")
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, MisconfigurationException | ValueError | TypeError):
            given = ", ".join(f"trainer.{key}={value}" for key, value in node.items() if key != "_target_")
            raise UserError(
                f"The trainer cannot be built: {cause} Given: {given}. Use trainer=cpu or trainer=gpu with "
                "trainer.devices=1."
            ) from error
        raise
    strategy = node.get("strategy", "auto")
    if trainer.world_size > 1 and strategy not in ("auto", "ddp"):
        raise UserError(
            f"trainer.strategy={strategy} with trainer.devices={node.devices}: processes share a run by prompts, which "
            "is trainer.strategy=ddp (trainer=ddp_cpu, trainer=ddp)."
        )
    return trainer

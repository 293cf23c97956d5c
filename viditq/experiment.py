"""The objects of one run, built from the configuration and checked before any slow work starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torchmetrics import Metric

from viditq.byte_numbers import num_bytes
from viditq.checks import Checked, check
from viditq.config import NoiseFloorConfig
from viditq.data.prompts import PromptData
from viditq.equipment import backend_for, make_logger, make_trainer
from viditq.errors import UserError
from viditq.external.denoisers import check_source
from viditq.external.policy import ExternalQuantization
from viditq.files import digest_of
from viditq.gate import Gate
from viditq.models.adapter import ModelAdapter
from viditq.models.attention import check_device
from viditq.models.checks import GUESSED
from viditq.models.compiling import check_compiler
from viditq.models.conditions import check_conditions
from viditq.models.contents import check_contents
from viditq.models.sampler_noise import check_shrinkable
from viditq.models.schedulers import make_scheduler
from viditq.models.text import check_encodes
from viditq.nulls import check_nulls
from viditq.plans import check_segments, denoiser_plan, encoder_plans
from viditq.prompt import keys_of
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.policy import StoredArtifact
from viditq.quant.search.treatment_policy import TreatmentSearch
from viditq.quant.setting import QuantSetting
from viditq.run_dir import fingerprint

# Keys that change neither samples nor numbers, so that a run may be continued with others.
UNTRACKED = ("stages", "trainer", "logger", "debug", "estimate", "fit", "cache_dir", "batch_size", "gate", "benchmark")
NO_INFERENCE_MODE = {"inference_mode": False}  # in which quanto cannot unpack its weights; no_grad computes the same


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
    floor_latents: float
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

    @cached_property
    def device(self) -> torch.device:
        """What the run computes on. Kept: for each trainer Lightning looks through all installed packages (30 ms)."""
        return self.make_trainer().strategy.root_device

    @property
    def observed_prompts(self) -> list[str]:
        """The calibration prompts that are calibrated on."""
        prompts = self.data.calibration_prompts
        return prompts[: len(prompts) - _held_out(self.quant)]

    @property
    def held_out_prompts(self) -> list[str]:
        """The others, which a search of treatments keeps to itself."""
        return self.data.calibration_prompts[len(self.observed_prompts) :]

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
    (plan, roles), weights = denoiser_plan(adapter, quant), adapter.weights_fingerprint()
    if data.ready_digest is not None:  # all that is cached depends on these embeddings
        weights = fingerprint({"weights": weights, "embeds": data.ready_digest})
    stored = quant.policy if isinstance(quant.policy, StoredArtifact) else None
    if stored is None:
        check_segments(adapter, plan, cfg.calibration.num_buckets)
    else:
        stored.check_model(adapter.to_dict())
    if quant.shrinks_noise:
        check_shrinkable(make_scheduler(adapter), adapter.call)
    if not adapter.compile:  # younger than what folders of runs hold
        tracked["model"].pop("compile", None)
    tracked["calibration"].pop("moment_bytes")  # how often the prompts are sampled, not what comes of it
    if quant.text_encoder is None:  # likewise
        tracked["quant"].pop("text_encoder", None)
    if quant.attention is None:
        tracked["quant"].pop("attention", None)
    else:
        _check_emulated(adapter, quant.attention)
    if quant.attention_granularity == "token":
        tracked["quant"].pop("attention_granularity", None)
    if tracked["noise_floor"]["latents"] == NoiseFloorConfig.latents:
        tracked["noise_floor"].pop("latents")  # runs from before there was any are as they were
    if not tracked["data"].get("images"):
        tracked["data"].pop("images", None)
    tracked["data"].pop("first_frames", None)  # a place: what lies there is among the prompts
    prompts = fingerprint({"evaluation": keys_of(data.prompts), "calibration": keys_of(data.calibration_prompts)})
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
        floor_latents=cfg.noise_floor.latents,
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
        encoder_plans=encoder_plans(adapter, quant, data),
        data=data,
        make_metrics=lambda: instantiate(cfg.metric, _convert_="all"),
        make_trainer=lambda: make_trainer(cfg.trainer, NO_INFERENCE_MODE if external is not None else {}),
        make_logger=make_logger(cfg.logger) if cfg.logger else None,
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
    backend = backend_for(cfg.backend, device.type, plan)
    budget = num_bytes(getattr(trainer, "memory_budget", None))
    return replace(experiment, backend=backend, offload=getattr(trainer, "offload", None), memory_budget=budget)


def _check_emulated(adapter: ModelAdapter, attention: str) -> None:
    """Raises UserError where the model's attention is another library's, or part of a compiled graph."""
    for key, value in (("attention", adapter.attention), ("compile", adapter.compile or None)):
        if value is not None:
            raise UserError(
                f"model.{key}={value} with quant.attention={attention}: emulation stands in for torch's attention, "
                "which is not called there. Leave one of them out."
            )


def _held_out(quant: QuantSetting) -> int:
    """Number of calibration prompts that are not calibrated on, the last ones."""
    return quant.policy.held_out if isinstance(quant.policy, TreatmentSearch) else 0


def _check_model(adapter: ModelAdapter, data: PromptData, lenient: bool) -> None:
    """Raises UserError unless the model's files hold all that the run needs of them; weights of the hub come later."""
    check_conditions(adapter, [*data.prompts, *data.calibration_prompts])
    to_encode = [p for p in (*data.prompts, *data.calibration_prompts) if p not in data.ready_embeds]
    if to_encode:
        check_encodes(adapter, to_encode)
    check_contents(adapter, without=() if to_encode else adapter.text_parts, lenient=lenient or adapter.of_hub)

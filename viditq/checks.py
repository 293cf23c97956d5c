"""What of a configuration can be refused before diffusers and Lightning are imported, which takes many seconds."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from viditq.assets import check_pipeline, is_hub_id, resolve
from viditq.byte_numbers import num_bytes
from viditq.config import (
    ALL_KEYS,
    STAGES,
    BenchmarkConfig,
    CalibrationConfig,
    DiagnosisConfig,
    NoiseFloorConfig,
    RootConfig,
    check_overrides,
    only_estimates,
)
from viditq.engine.logger_packages import check_package
from viditq.engine.wandb_settings import check_wandb
from viditq.errors import UserError
from viditq.external.refusals import check_external
from viditq.gate import Gate
from viditq.models.checks import check_values
from viditq.models.outline import check_outline
from viditq.nulls import check_nulls
from viditq.run_dir import check_folder
from viditq.run_name import check_name
from viditq.signatures import REQUIRED, arguments_of, unknown_key

if TYPE_CHECKING:
    from viditq.data.prompts import PromptData
    from viditq.quant.setting import QuantSetting

MOST_NUDGE = 0.01  # of latents; beyond, it is another picture that is asked for
# Key -> lowest and highest value. The noise of sample i is seeded by 1,000,003 seed + i, which has to fit 64 bits; more
# buckets than a sampler has steps, or rows than a prompt has tokens, only cost memory.
NUMBERS: Mapping[str, tuple[int, int | None]] = {
    "seed": (0, 10**12),
    "batch_size": (1, None),
    "calibration.num_buckets": (1, 1000),
    "calibration.rows_per_bucket": (1, 10_000),
    "calibration.block_input_bytes": (1, None),
    "calibration.moment_bytes": (1, None),
    "noise_floor.num_prompts": (0, None),
    "diagnosis.num_prompts": (0, None),
    "benchmark.rounds": (5, None),  # engine.timing.MIN_ROUNDS
}
BYTES = ("calibration.block_input_bytes", "calibration.moment_bytes")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
# Of quant.execution.backends, which imports torch.
BACKENDS = ("auto", "cuda", "fake", "native", "portable", "scaled_mm", "triton", "weight_only")
OF_LOGGERS = ("folder", "name", "group", "run_id")  # what a run tells its logger; the rest are settings


@dataclass(frozen=True)
class Alone:
    """What the checks that import nothing have made of the configuration; since: before any file was read, in ns."""

    since: int
    stages: tuple[str, ...]
    cache_dir: Path
    gate: Gate


@dataclass(frozen=True)
class Checked(Alone):
    """The same, and what takes torch, so that nothing is made twice."""

    quant: "QuantSetting"
    data: "PromptData"


def check(cfg: DictConfig, alone: Alone | None = None) -> Checked:
    """Raises UserError (or Hydra's own message) for every value that is wrong whatever the model's files hold.

    alone: what `check_values_alone` has returned for it, where that was called before.
    """
    alone = check_values_alone(cfg) if alone is None else alone
    # From here on torch is needed, which takes a second.
    check_nulls(cfg.quant, "quant")
    quant = instantiate(cfg.quant, _convert_="all")
    data = instantiate(cfg.data, _convert_="all")
    _check_held_out(cfg.quant, len(data.calibration_prompts))  # a file may hold fewer than it is asked for
    return Checked(**vars(alone), quant=quant, data=data)


def check_values_alone(cfg: DictConfig) -> Alone:
    """Keys, numbers, names, places and the gate: what nothing is imported for."""
    since = time.time_ns()
    _check_keys(cfg)
    check_mode(cfg.estimate)
    if num_bytes(cfg.fit, "fit=") is not None and cfg.estimate:
        raise UserError(f"fit={cfg.fit} and estimate={cfg.estimate} each tell something else. Leave one of them out.")
    if HydraConfig.initialized():
        check_overrides(cfg.quant.policy._target_, HydraConfig.get().overrides.task)
    check_external(cfg)
    stages = _stages(cfg.stages)
    for key in BYTES:  # as numbers from here on: what is tracked must not depend on how it was written
        if isinstance(value := OmegaConf.select(cfg, key), str):
            OmegaConf.update(cfg, key, num_bytes(value, f"{key}="))
    for key, (lowest, highest) in NUMBERS.items():
        _check_number(key, OmegaConf.select(cfg, key), lowest, highest)
    if cfg.noise_floor.num_prompts == 1:
        raise UserError("noise_floor.num_prompts=1: one prompt has no spread. Give 0 (no noise floor), or 2 or more.")
    if not 0 <= cfg.noise_floor.latents <= MOST_NUDGE:
        raise UserError(
            f"noise_floor.latents={cfg.noise_floor.latents} must be a number from 0 (not measured) to {MOST_NUDGE}: "
            "the standard deviation of noise that is too small to mean anything, beside latents of about 1."
        )
    if cfg.benchmark.max_seconds is not None and not cfg.benchmark.max_seconds >= 0:
        raise UserError(f"benchmark.max_seconds={cfg.benchmark.max_seconds} must be null or a number of at least 0.")
    check_name("name", cfg.name)
    check_name("model.name", cfg.model.name)
    cache_dir = check_folder(cfg.cache_dir, "cache_dir=FOLDER")
    if cfg.backend not in BACKENDS:
        raise UserError(f"unknown backend {cfg.backend!r}; known names: {', '.join(BACKENDS)}")
    _check_held_out(cfg.quant, cfg.data.get("num_calibration_prompts"))
    _check_devices(cfg.trainer)
    _check_metrics(cfg.metric)
    if cfg.logger and not only_estimates(cfg):
        _check_logger(cfg.logger)
    conditions: Any = OmegaConf.to_container(cfg.gate) if OmegaConf.is_config(cfg.gate) else cfg.gate
    check_model(cfg.model, _rules(cfg.quant))
    return Alone(since, stages, cache_dir, Gate.parse(conditions, [str(name) for name in cfg.metric]))


def _check_keys(cfg: DictConfig) -> None:
    """`+key=value` passes Hydra's check of the root; what lies below it is held against the constructors."""
    for prefix, given, schema in (
        ("", cfg, RootConfig),
        ("calibration.", cfg.calibration, CalibrationConfig),
        ("noise_floor.", cfg.noise_floor, NoiseFloorConfig),
        ("diagnosis.", cfg.diagnosis, DiagnosisConfig),
        ("benchmark.", cfg.benchmark, BenchmarkConfig),
    ):
        allowed = [field.name for field in fields(schema)]
        for key in given:
            if key not in allowed:
                raise UserError(f"Unknown key {prefix}{key!s}. Known here are {', '.join(allowed)}.")
    if found := unknown_key(OmegaConf.to_container(cfg)):
        key, known = found
        settings = [name for name in known if not (key.startswith("logger.") and name in OF_LOGGERS)]
        raise UserError(f"Unknown key {key}. Known here are {', '.join(settings) or 'none'}. {ALL_KEYS}")


def _check_number(name: str, value: int, lowest: int, highest: int | None) -> None:
    if value < lowest or (highest is not None and value > highest):
        most = "" if highest is None else f" and at most {highest}"
        raise UserError(f"{name}={value} must be a whole number of at least {lowest}{most}.")


def _check_held_out(quant: DictConfig, count: Any) -> None:
    """count: of calibration prompts, where it is a number; what else it may be is refused by the data's class."""
    held_out = OmegaConf.select(quant, "policy.held_out")
    if isinstance(held_out, int) and isinstance(count, int) and held_out >= count > 0:
        raise UserError(
            f"quant.policy.held_out={held_out} leaves none of {count} calibration prompts to calibrate on: give more "
            "(data.num_calibration_prompts), or hold fewer out."
        )


def check_mode(mode: Any) -> None:
    """Raises UserError for a value of the key `estimate` that means nothing."""
    if mode not in (False, True, "meta"):
        raise UserError(
            f"estimate={mode!r} is unknown: true loads the model and times a step, meta takes its configuration alone "
            "(no durations), false runs."
        )


def _stages(wanted: Any) -> tuple[str, ...]:
    if not wanted:
        raise UserError(f"stages=[] does nothing. Stages are {', '.join(STAGES)}.")
    for stage in wanted:
        if stage not in STAGES:
            raise UserError(f"Unknown stage {stage!r}. Stages are {', '.join(STAGES)}.")
    return tuple(stage for stage in STAGES if stage in wanted)


def _check_metrics(metrics: Any) -> None:
    if not OmegaConf.is_dict(metrics):
        raise UserError(f"metric={metrics} measures nothing. Name the metrics that you want: metric=[psnr,ssim].")
    for name, metric in metrics.items():
        if not OmegaConf.is_dict(metric):
            others = ",".join(str(other) for other in metrics if other != name)
            given = "null" if metric is None else metric
            raise UserError(
                f"metric.{name}={given} measures nothing. Name the metrics that you want: metric=[{others}]."
            )


def _check_logger(logger: Any) -> None:
    """What its service or package would refuse only at the end."""
    function = str(logger.get("_target_")).rpartition(".")[2]
    check_package(function)
    if function == "wandb_logger":
        check_wandb(logger.get("project"), logger.get("entity"))


def _check_devices(trainer: Any) -> None:
    """What Lightning would refuse only once it is imported, which takes seven seconds."""
    accelerator = trainer.get("accelerator", "auto")
    if accelerator not in ACCELERATORS:
        raise UserError(
            f"trainer.accelerator={accelerator} is unknown. Use trainer=cpu or trainer=gpu; known are "
            f"{', '.join(ACCELERATORS)}."
        )
    devices = trainer.get("devices", 1)
    if isinstance(devices, str) and not re.fullmatch(r"auto|-1|\d+(\s*,\s*\d*)*", devices):
        raise UserError(f"trainer.devices={devices} must be how many, or which ones, such as [0,2], or auto.")
    for key in ("devices", "num_nodes"):
        value = trainer.get(key)
        all_gpus = key == "devices" and value == -1 and trainer.get("accelerator") != "cpu"
        if isinstance(value, int) and value < 1 and not all_gpus:
            raise UserError(
                f"trainer.{key}={value} must be a whole number > 0. Use trainer=cpu or trainer=gpu with "
                f"trainer.{key}=1."
            )


def _rules(quant: DictConfig) -> list[str]:
    """The patterns of quant.rules, where they are read and written as they should be."""
    rules: Any = OmegaConf.to_container(quant.rules, resolve=True) if OmegaConf.is_list(quant.get("rules")) else []
    policy = quant.get("policy")
    if not OmegaConf.is_dict(policy) or str(policy.get("_target_")).endswith((".PlanFile", ".StoredArtifact")):
        return []
    return [str(rule["pattern"]) for rule in rules if isinstance(rule, Mapping) and rule.get("pattern")]


def check_model(node: DictConfig, rules: Sequence[str]) -> None:
    """Values and folder of a ModelAdapter; another class checks its own. rules: patterns of its Linears."""
    given = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(given, dict)
    values = arguments_of(str(given["_target_"])) if str(given["_target_"]).endswith(".ModelAdapter") else None
    if values is None:
        return
    values = {**values, **{str(key): value for key, value in given.items()}}
    for key, value in values.items():
        if value is REQUIRED:
            raise UserError(f"model.{key} has no value. Give one: model.{key}=...")
    check_values(SimpleNamespace(**values))
    path = values["path"]
    if isinstance(path, str) and not is_hub_id(path):
        folder = resolve(path)
        check_pipeline(folder)
        check_outline(SimpleNamespace(**values, folder=folder), folder, rules)

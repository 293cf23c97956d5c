"""The root schema of the configuration: unknown or mistyped top-level keys fail when the config is composed."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from viditq import checkpoints
from viditq.errors import UserError
from viditq.run_name import check_name, run_name
from viditq.shown_config import shown_config

STAGES = (
    "prompts",
    "reference",
    "noise_floor",
    "calibrate",
    "search",
    "quantize",
    "generate",
    "diagnose",
    "benchmark",
    "evaluate",
    "report",
)
ALL_KEYS = "The same command with `--cfg job` shows every key, `--help` the choices of each group."
OUTPUTS = "outputs"  # where runs lie unless told: outputs/<model>/<run>
COMMANDS = ("export", "import", "judge", "verify", "which", "layers", "describe")  # of `viditq`, beside runs
RANKS = {"TORCHELASTIC_RUN_ID": "RANK", "SLURM_NTASKS": "SLURM_PROCID"}  # variable of a launcher -> where its rank is
NO_RECIPE = {"PlanFile": "plan_file", "StoredArtifact": "artifact"}  # class of a policy -> its yaml
PROGRAM_VARIABLE = "VIDITQ_PROGRAM"  # `viditq` where that was started instead of run.py
COMMAND_VARIABLE = "VIDITQ_COMMAND"  # the command line; launchers hand it on to processes with an argv of their own


@dataclass
class CalibrationConfig:
    """Buckets of noise level, input rows kept per bucket for choosing alpha, bytes of the inputs of blocks, bytes of
    second moments held at once (numbers, or such as 2GB)."""

    num_buckets: int = 20
    rows_per_bucket: int = 16
    block_input_bytes: int | str = 2**30
    moment_bytes: int | str = 2**31


@dataclass
class NoiseFloorConfig:
    """Number of prompts, the first ones, on which the float model is set against itself; 0 = not at all.

    latents: standard deviation of noise on the latents, which shows how chaotic sampling is; 0 = not measured.
    """

    num_prompts: int = 32
    latents: float = 1e-6


@dataclass
class DiagnosisConfig:
    """Number of prompts, the first ones, on which errors are measured by layer and noise level; 0 = not at all."""

    num_prompts: int = 4


@dataclass
class BenchmarkConfig:
    """Rounds that each candidate is timed in; seconds that they may take together, null = as many as it needs."""

    rounds: int = 10
    max_seconds: float | None = 20.0


@dataclass
class RootConfig:
    """Everything one run needs; below the nodes typed Any, every object's constructor refuses unknown keys."""

    name: str = MISSING
    seed: int = 0
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    batch_size: int = 8
    cache_dir: str = "outputs/_cache"
    debug: bool = False
    estimate: Any = False
    fit: Any = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    noise_floor: NoiseFloorConfig = field(default_factory=NoiseFloorConfig)
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    gate: Any = None
    model: Any = MISSING
    quant: Any = MISSING
    data: Any = MISSING
    metric: Any = MISSING
    backend: str = "auto"
    trainer: Any = MISSING
    logger: Any = None


def program() -> list[str]:
    """The words that start a run: `viditq`, or `python run.py` in a clone."""
    return os.environ.get(PROGRAM_VARIABLE, "python run.py").split()


def check_overrides(policy: str, overrides: Sequence[str]) -> None:
    """Raises UserError where the command line changes a recipe that the run does not read, or is called by one: the
    schemes of a plan file, or of an artifact, hold.

    policy: `_target_` of quant.policy. overrides: the words of the command line.
    """
    name = NO_RECIPE.get(policy.rpartition(".")[2])
    if name is None:
        return
    also = r"|[./]text_encoder.*|\.float_dtype|\.correction" if name == "plan_file" else ""
    read = re.compile(rf"quant([./]policy.*|\.attention{also})?$")
    keys = [word.partition("=")[0].lstrip("+~") for word in overrides]
    unread = [key for key in keys if key == "bits" or (re.match(r"quant([./@]|$)", key) and not read.match(key))]
    if unread:
        raise UserError(
            f"{', '.join(unread)}: quant/policy={name} takes formats, bits, smoothing, rounding and segments from "
            "the plan, so this would change nothing. Leave it out, search a plan (experiment=w4a8_mp_search), or "
            "choose quant/policy=uniform."
        )
    if {"experiment", "quant/policy"} <= {*keys} and "name" not in keys:
        raise UserError(
            f"quant/policy={name} takes the recipe from the plan, so this is not the experiment that its name tells. "
            "Name the run, such as name=my_plan, or leave experiment= out."
        )


def local_processes(default: int | str) -> int | str:
    """Processes per node as torchrun or srun says, else `default`."""
    for variable in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        if variable in os.environ:
            return int(os.environ[variable])
    return default


def first_process() -> bool:
    """Whether this is the only process of a run, or the first of those that torchrun or srun has started."""
    return all(os.environ.get(rank, "0") == "0" for launched, rank in RANKS.items() if launched in os.environ)


def nodes() -> int:
    """Nodes as torchrun or srun says, else 1."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ.get("SLURM_NNODES", 1))


def unless(estimate: Any, fit: Any, value: Any) -> Any:
    """`value`, or nothing where the run is only estimated."""
    return None if estimate or fit is not None else value


def only_estimates(cfg: DictConfig) -> bool:
    """Whether nothing is run, and nothing written."""
    return bool(cfg.estimate) or cfg.fit is not None


def register() -> None:
    """Make the schema, the models' other checkpoints and the resolvers known to Hydra."""
    checkpoints.register()
    ConfigStore.instance().store(name="schema", node=RootConfig)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("model_folder", partial(check_name, "model.name"), replace=True)
    OmegaConf.register_new_resolver("local_processes", local_processes, replace=True)
    OmegaConf.register_new_resolver("unless", unless, replace=True)
    OmegaConf.register_new_resolver("nodes", nodes, replace=True)
    OmegaConf.register_new_resolver("shown_config", shown_config, replace=True)
    OmegaConf.register_new_resolver("program", lambda: " ".join(program()), replace=True)

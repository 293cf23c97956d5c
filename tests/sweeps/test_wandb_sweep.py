"""scripts/sweep.yaml, as W&B's agent reads it: its trials are commands that compose, its metric one that runs send."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from viditq.engine.logged_run import numbers

FILE = Path(__file__).parents[2] / "scripts/sweep.yaml"
MEASURED: dict[str, Any] = {
    **{"metrics": {"psnr": 30.0}, "standard_errors": {}, "float_metrics": {}, "seconds": {}},
    **dict.fromkeys(("average_weight_bits", "average_activation_bits", "size_bytes", "float_size_bytes"), 1.0),
}


@pytest.fixture(scope="module")
def sweep() -> dict[str, Any]:
    from wandb.sdk.launch.sweeps.utils import load_sweep_config  # takes two seconds, which not every worker needs

    found = load_sweep_config(str(FILE))
    assert found is not None
    return found


def words_of(sweep: dict[str, Any], trial: dict[str, Any]) -> list[str]:
    """What the agent starts, as `Agent._command_run` makes it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    given = {"args": {key: {"value": value} for key, value in trial.items()}}
    filled: dict[str, Any] = create_sweep_command_args(given)
    filled |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    words: list[str] = []
    for word in create_sweep_command([*sweep["command"]]):
        words += filled[word[2:-1]] if word.startswith("${") else [word]
    return words


def ends(parameter: dict[str, Any]) -> list[Any]:
    """The values of a parameter, or its lowest and highest."""
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def test_the_trials_are_commands_that_compose(sweep: dict[str, Any], configure: Callable[..., DictConfig]) -> None:
    for pick in (0, -1):
        trial = {key: ends(parameter)[pick] for key, parameter in sweep["parameters"].items()}
        env, python, program, *words = words_of(sweep, trial)
        assert (env, python, program) == ("/usr/bin/env", "python", "run.py") and (FILE.parents[1] / program).is_file()
        cfg = configure(*words)
        smoothing = cfg.quant.smoothing
        assert (smoothing.alpha, smoothing.aggregate) == tuple(trial.values())
        assert cfg.logger._target_.endswith(".wandb_logger") and cfg.seed == 100 and shlex.join(words).count("'") == 0


def test_what_it_goes_by_is_what_a_run_sends(sweep: dict[str, Any], configure: Callable[..., DictConfig]) -> None:
    metric = sweep["metric"]["name"]
    assert metric in numbers(MEASURED) and sweep["metric"]["goal"] == "maximize"
    assert metric.partition("/")[0] in configure("experiment=smoothquant", "model=tiny_image").metric

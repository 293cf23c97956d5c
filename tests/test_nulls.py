"""Nulls in model.* and quant.*: refused by key where a value is needed, taken where they mean something."""

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from viditq.cli import user_message
from viditq.experiment import build

Configure = Callable[..., DictConfig]
NEEDED = [
    *("model.name", "model.path", "model.pipeline", "model.dtype", "model.num_steps", "model.timestep_scale"),
    *("model.encode", "model.call", "model.roles", "model.roles.mlp", "model.keep_float", "model.denoisers"),
    *("model.encode_outputs", "model._target_"),
    *("quant.policy", "quant.policy._target_", "quant.segments", "quant.rules", "quant.ranges", "quant.rounding"),
    *("quant.weight.bits", "quant.activation.dynamic", "quant.activation._target_"),
]
OF_SEARCH = [
    *("budget", "curve", "metrics", "solver", "num_prompts", "metrics.default", "metrics.cross_attention.clip.model"),
]
MEANT = ["model.guidance_scale", "model.height", "model.max_tokens", "quant.activation", "quant.smoothing"]


@pytest.fixture
def outcome(configure: Configure, shrunk: list[str]) -> Callable[..., str | None]:
    """(key, *overrides) -> what is said of null there; None where it is taken."""

    def outcome(key: str, *overrides: str) -> str | None:
        cfg = configure(*shrunk, *overrides)
        OmegaConf.set_struct(cfg, False)
        OmegaConf.update(cfg, key, None, merge=False)
        try:
            build(cfg)
        except Exception as error:
            message = user_message(error)
            assert message is not None, error
            return message
        return None

    return outcome


def says_key(message: str | None, key: str) -> bool:
    """Whether a message names the key, or its last part with the value."""
    return message is not None and "TypeError" not in message and "Error in call" not in message and key in message


@pytest.mark.parametrize("key", NEEDED)
def test_a_value_is_needed(key: str, outcome: Callable[..., str | None]) -> None:
    message = outcome(key)
    assert says_key(message, key), message


@pytest.mark.parametrize("key", OF_SEARCH)
def test_a_value_is_needed_by_a_search(key: str, outcome: Callable[..., str | None]) -> None:
    message = outcome(f"quant.policy.{key}", "quant/policy=sensitivity")
    assert says_key(message, f"quant.policy.{key}"), message


def test_a_plan_file_needs_a_path(outcome: Callable[..., str | None]) -> None:
    plan = ["quant/policy=plan_file", "quant.policy.path=shipped:tiny_image/w4a8"]
    message = outcome("quant.policy.path", *plan)
    assert says_key(message, "quant.policy.path=null: a value is needed"), message


@pytest.mark.parametrize("key", MEANT)
def test_null_that_means_something(key: str, outcome: Callable[..., str | None]) -> None:
    assert outcome(key) is None


@pytest.mark.parametrize("value", ["proj_out", [1], [None], {"a": 1}])
def test_patterns_of_another_kind(value: Any, configure: Configure, shrunk: list[str]) -> None:
    for key in ("model.keep_float", "model.roles.mlp"):
        cfg = configure(*shrunk)
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        with pytest.raises(Exception) as error:
            build(cfg)
        assert f"{key}=" in (user_message(error.value) or "") and "list of patterns" in str(user_message(error.value))

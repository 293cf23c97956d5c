"""Metrics and gate before anything is sampled: every metric scores a made-up pair, every condition can have a value."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from viditq.errors import UserError
from viditq.experiment import Experiment
from viditq.gate import Condition, Gate
from viditq.metrics.batch import EvalBatch, Sound
from viditq.metrics.bootstrap import MIN_PROMPTS
from viditq.metrics.frechet import FeatureDistance
from viditq.metrics.streaming import PerSampleMetric, StreamingMetric
from viditq.prompt import conditions_of

FRAMES, SIDE = 16, 128  # of the made-up pair, where the pipeline alone knows the size of what it makes
RATE = 16_000  # of its sound, which lasts a second


def try_metrics(experiment: Experiment) -> None:
    """Raises UserError for a metric that cannot be built, cannot score what this model makes, or wants more prompts
    than there are, and for a condition of the gate that can never hold.
    """
    metrics, pair = experiment.make_metrics(), made_up_pair(experiment)
    numbers = [n for n in (len(experiment.data.prompts), experiment.floor_size) if n]
    for name, metric in metrics.items():
        try:
            if isinstance(metric, StreamingMetric):
                metric.check_prompts(experiment.data.prompts)
            metric.update(pair)
        except UserError as error:
            raise UserError(f"metric.{name}: {error}") from error
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise UserError(
                f"metric.{name} cannot score clips of {' x '.join(map(str, pair.samples.shape[1:]))} (frames, channels,"
                f" height, width): {error}. Change its settings (metric.{name}...), or leave it out of metric=[...]."
            ) from error
        if isinstance(metric, FeatureDistance) and min(numbers) < metric.least:
            raise UserError(
                f"metric.{name} needs at least {metric.least} prompts, and there are {min(numbers)} (data.num_prompts, "
                f"noise_floor.num_prompts). Raise the number, or leave it out of metric=[...]."
            )
    check_gate(experiment.gate, metrics, *numbers)


def made_up_pair(experiment: Experiment) -> EvalBatch:
    """Noise in the size of the model's clips: to score it takes what one prompt takes in the stage evaluate."""
    adapter, generator = experiment.adapter, torch.Generator().manual_seed(0)
    frames = 1 if adapter.modality == "image" else adapter.num_frames or FRAMES
    shape = (1, frames, 3, adapter.height or SIDE, adapter.width or SIDE)

    def clip() -> Tensor:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    data, prompts = experiment.data.real_clips([0]), experiment.data.prompts[:1]
    pictured = all("image" in conditions_of(prompt) for prompt in experiment.data.prompts)
    given = [clip()[0, 0]] if pictured else None
    return EvalBatch(clip(), clip(), prompts, torch.tensor([0]), data, given, _sound() if adapter.makes_sound else None)


def _sound() -> Sound:
    first, second = torch.randint(-1000, 1000, (2, 1, 2, RATE), generator=torch.Generator().manual_seed(0))
    return Sound(first.short(), second.short(), RATE)


def check_gate(gate: Gate, metrics: Mapping[str, Metric], num_prompts: int, floor_size: int = 0) -> None:
    """Raises UserError for a condition on a number that this run will not have."""
    for condition in gate.conditions:
        if condition.name in metrics:
            for why in _impossible(condition, metrics[condition.name], num_prompts, floor_size):
                raise UserError(
                    f"gate.{condition.key} can never hold: {why}. Bound {condition.name} itself, or change that."
                )


def _impossible(condition: Condition, metric: Metric, num_prompts: int, floor_size: int) -> Iterator[str]:
    per_prompt, own = isinstance(metric, PerSampleMetric), getattr(metric, "has_float_value", False)
    name, what = condition.name, condition.what
    if what == "drop" and not own:
        yield f"{name} has no value of the float model to drop from"
    if what in ("low", "high") and per_prompt and num_prompts < MIN_PROMPTS:
        yield f"an interval takes {MIN_PROMPTS} prompts, and data.num_prompts is {num_prompts}"
    judged = num_prompts if own else min(num_prompts, floor_size)
    if what == "verdict" and judged < MIN_PROMPTS:
        setting = "data.num_prompts" if own else "noise_floor.num_prompts, which it is judged by,"
        yield f"a verdict takes {MIN_PROMPTS} prompts, and {setting} is {judged}"

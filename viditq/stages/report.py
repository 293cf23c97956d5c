"""Stage `report`: pictures of the pairs, worst first, and the page."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import yaml
from torch import Tensor

from viditq import provenance
from viditq.data.samples import load_sample, sample_path, sound_path, sounds_alike
from viditq.errors import UserError
from viditq.files import is_whole, read_json
from viditq.job import Job
from viditq.prompt import Prompt
from viditq.report.content import MAX_PAIRS, PageContent, Pair
from viditq.report.incoherence_picture import incoherence_picture
from viditq.report.page import write_page
from viditq.report.pictures import comparison_gif, comparison_picture
from viditq.report.plan_view import summarize_plan
from viditq.report.ranking import Ranking, rank_pairs
from viditq.report.stage_seconds import FLOAT, UNKNOWN
from viditq.run_dir import RunDir
from viditq.seconds import read_conditions
from viditq.stages.card import update_card
from viditq.stages.external import plan_of


def report(job: Job) -> str:
    """Draw and write, on the first process."""
    run_dir = job.run_dir
    if job.processes.first_does(lambda: all(map(is_whole, (run_dir.picture, run_dir.page))) and _has_drawn(run_dir)):
        update_card(job)
        return f"already done ({run_dir.page})"
    with job.timed(run_dir.path, "report"):
        line = job.processes.first_does(lambda: _report(job))
    update_card(job)
    return line


def _has_drawn(run_dir: RunDir) -> bool:
    """Whether the layers' incoherence is drawn, or not there."""
    return is_whole(run_dir.incoherence_picture) or not is_whole(run_dir.incoherence)


def _report(job: Job) -> str:
    run_dir = job.run_dir
    if not run_dir.per_prompt.is_file():
        raise UserError(f"{run_dir.per_prompt} is missing. Run the stage evaluate before report.")
    metrics, per_prompt = read_json(run_dir.metrics), read_json(run_dir.per_prompt)
    ranking = rank_pairs(per_prompt, metrics["labels"])
    _draw(job, ranking, metrics["labels"][ranking.metric])
    if is_whole(run_dir.incoherence):
        e, found = job.experiment, read_json(run_dir.incoherence)
        incoherence_picture(found, run_dir.incoherence_picture, f"{e.name} on {e.adapter.name}, seed {e.seed}")
    write_page(_content(job, ranking, metrics, per_prompt), run_dir.page)
    return f"picture and page ({run_dir.page})"


def _clips(job: Job, index: int) -> tuple[Tensor, Tensor]:
    """The float and the quantized clip of a prompt, uint8 [F, C, H, W]."""
    modality = job.experiment.adapter.modality
    folders = (job.reference.path, job.run_dir.samples)
    float_clip, quantized_clip = (load_sample(sample_path(folder, index, modality)) for folder in folders)
    return float_clip, quantized_clip


def _sounds(job: Job, index: int) -> tuple[Tensor, Tensor, int]:
    """The float and the quantized sound of a prompt, int16 [A, T], and their rate."""
    folders = (job.reference.path, job.run_dir.samples)
    (reference, sample), rate = sounds_alike([sound_path(folder, index) for folder in folders])
    return reference, sample, rate


def _conditions(prompt: str) -> dict[str, Tensor]:
    pixels = prompt.pixels() if isinstance(prompt, Prompt) else {}
    clips = {name: torch.from_numpy(value) for name, value in pixels.items()}
    return {name: (clip if clip.ndim == 4 else clip[None]).movedim(-1, 1) for name, clip in clips.items()}


def _measured_on(job: Job) -> dict[str, list[str]]:
    """Stage -> what its seconds in metrics.json were measured on."""
    places = (job.reference.path, job.stats.path, job.run_dir.path)
    found = {stage: on for place in places for stage, on in read_conditions(place).items()}
    floors = [on for entry in job.floors.values() for on in read_conditions(entry.path).get(FLOAT, [UNKNOWN])]
    return {**found, "noise_floor": list(dict.fromkeys(floors))}


def _draw(job: Job, ranking: Ranking, label: Mapping[str, Any]) -> None:
    e, path = job.experiment, job.run_dir.picture
    worst = ranking.indices[:MAX_PAIRS]
    references, samples = (torch.stack(clips) for clips in zip(*(_clips(job, i) for i in worst), strict=True))
    ranks = torch.arange(len(worst))
    scores = torch.tensor([ranking.scores[i] for i in worst])
    if e.adapter.modality == "video":
        comparison_gif(samples, references, ranks, path.with_suffix(".gif"))
    comparison_picture(
        samples,
        references,
        [e.data.prompts[i] for i in worst],
        scores,
        path,
        title=f"{e.name} on {e.adapter.name}, seed {e.seed}",
        score_name=label["label"],
        unit=label["unit"],
        higher_is_better=label["higher_is_better"] is not False,
        num_pairs=job.num_prompts,
    )


def _content(job: Job, ranking: Ranking, metrics: Mapping[str, Any], per_prompt: Mapping[str, Any]) -> PageContent:
    e, run_dir = job.experiment, job.run_dir
    values = {name: column for name, column in per_prompt["metrics"].items() if name in metrics["labels"]}
    plan = plan_of(job)
    return PageContent(
        title=f"{e.name} on {e.adapter.name}",
        experiment=e.name,
        model=e.adapter.name,
        seed=e.seed,
        command=provenance.command(),
        versions=provenance.versions(),
        machine=provenance.machine(),
        metrics=metrics,
        per_prompt=per_prompt,
        errors=read_json(run_dir.errors) if is_whole(run_dir.errors) else None,
        segments=plan["edges"],
        frames_per_second=float(e.adapter.fps),
        plan=summarize_plan(plan, dict(e.roles)),
        configuration=yaml.safe_dump(dict(e.tracked), sort_keys=False),
        pairs=[
            Pair(
                index=i,
                prompt=e.data.prompts[i],
                clips=partial(_clips, job, i),
                scores={name: column[i] for name, column in values.items()},
                conditions=_conditions(e.data.prompts[i]),
                sounds=partial(_sounds, job, i) if e.adapter.makes_sound else None,
            )
            for i in ranking.indices[:MAX_PAIRS]
        ],
        sorted_by=ranking.metric,
        search=read_json(run_dir.search) if is_whole(run_dir.search) else None,
        heat_map=run_dir.heat_map if is_whole(run_dir.heat_map) else None,
        incoherence=read_json(run_dir.incoherence) if is_whole(run_dir.incoherence) else None,
        speed=read_json(run_dir.speed) if is_whole(run_dir.speed) else None,
        conditions=_measured_on(job),
        budget_curve=run_dir.budget_curve if is_whole(run_dir.budget_curve) else None,
        treatments=read_json(run_dir.treatments) if is_whole(run_dir.treatments) else None,
        treatments_picture=run_dir.treatments_picture if is_whole(run_dir.treatments_picture) else None,
    )

"""Stage `prompts`: every prompt is encoded once; the text encoder is freed before the denoiser is loaded."""

from viditq.job import Job
from viditq.models.stored_embeds import are_stored, write_embeds
from viditq.models.text import check_prompts, encode_prompt, in_model_dtype


def prompts(job: Job) -> str:
    """Encode what is not in the cache yet, on the first process."""
    data = job.experiment.data
    wanted = list(dict.fromkeys([*data.prompts, *data.calibration_prompts]))

    def missing() -> list[str]:
        return [p for p in wanted if not are_stored(job.embeds_path(p))]

    if not job.processes.first_does(missing):
        job.sweep_up(job.embeds)
        return f"{len(wanted)} prompts already encoded"
    with job.holding(job.embeds), job.timed(job.run_dir.path, "prompts"):
        count = job.processes.first_does(lambda: _encode(job, missing()))
    return f"{count} of {len(wanted)} prompts encoded"


def _encode(job: Job, missing: list[str]) -> int:
    adapter, ready = job.experiment.adapter, job.experiment.data.ready_embeds
    to_encode = [prompt for prompt in missing if prompt not in ready]
    for prompt in (prompt for prompt in missing if prompt in ready):
        write_embeds(job.embeds_path(prompt), in_model_dtype(adapter, ready[prompt]))
    if to_encode:
        pipeline = job.load_text()
        check_prompts(adapter, pipeline, to_encode)
        for prompt in to_encode:
            write_embeds(job.embeds_path(prompt), encode_prompt(adapter, pipeline, prompt))
    return len(missing)

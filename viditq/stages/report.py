"""Stage `report`: pictures of the pairs, worst first."""

import torch

from viditq.data.samples import load_sample, sample_path
from viditq.errors import UserError
from viditq.files import is_whole, read_json
from viditq.job import Job
from viditq.report.pictures import comparison_gif, comparison_picture
from viditq.summary import worst_first


def report(job: Job) -> str:
    """Draw the float model above and the quantized below, on the first process."""
    path = job.run_dir.picture
    if job.processes.first_does(lambda: is_whole(path)):
        return f"already done ({path})"
    with job.timed(job.run_dir.path, "report"):
        return job.processes.first_does(lambda: _report(job))


def _report(job: Job) -> str:
    e, run_dir, count = job.experiment, job.run_dir, job.num_prompts
    if not run_dir.per_prompt.is_file():
        raise UserError(f"{run_dir.per_prompt} is missing. Run the stage evaluate before report.")
    per_prompt = read_json(run_dir.per_prompt)["metrics"]
    scores, name = worst_first(per_prompt, read_json(run_dir.metrics)["labels"])
    folders = (run_dir.samples, job.reference.path)
    paths = [[sample_path(folder, i, e.adapter.modality) for i in range(count)] for folder in folders]
    samples, references = (torch.stack([load_sample(p) for p in group]) for group in paths)
    title = f"{e.name} on {e.adapter.name}, seed {e.seed}"
    if e.adapter.modality == "video":
        gif = run_dir.picture.with_suffix(".gif")
        comparison_gif(samples, references, scores, gif, name["higher_is_better"])
    comparison_picture(samples, references, e.data.prompts, scores, run_dir.picture, title, **name)
    return f"picture drawn ({run_dir.picture})"

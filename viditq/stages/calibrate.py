"""Stage `calibrate`: the float model samples the calibration prompts with observers attached."""

import gc

from viditq.engine.partials import PARTIAL, Partials, State
from viditq.engine.sampling import Calibration, batches_of, run_batches
from viditq.files import is_whole
from viditq.job import Job
from viditq.quant.calibration import Calibrator
from viditq.quant.convert import linear_names
from viditq.quant.observers import CalibrationStats


def calibrate(job: Job) -> str:
    """Observe the float model; resumes after the last finished batches."""
    if not job.needs_stats:
        return "not needed: this recipe takes no statistics"
    already = job.processes.first_does(lambda: is_whole(job.stats_file))
    observe(job)
    what = "already done" if already else f"{len(job.experiment.data.calibration_prompts)} prompts observed"
    return f"{what} ({job.stats_file})"


def observe(job: Job) -> None:
    """Leave the calibration statistics on disk."""
    if job.processes.first_does(lambda: is_whole(job.stats_file)):
        job.sweep_up(job.stats, leftovers=PARTIAL)
        return
    with job.holding(job.stats):
        if job.processes.first_does(lambda: is_whole(job.stats_file)):
            return  # by the run that this one has waited for
        with job.timed(job.stats.path, "calibrate"):
            _observe(job, Partials(job.stats.path, merge_states))


def merge_states(mine: State, theirs: State) -> State:
    """The statistics of two processes as one."""
    stats = CalibrationStats.from_tensors(mine)
    stats.merge(CalibrationStats.from_tensors(theirs))
    return stats.to_tensors()


def _observe(job: Job, partials: Partials) -> None:
    _sample(job, partials)
    gc.collect()  # the model and the observers go, which Lightning's modules and trainers hold in a ring
    job.processes.wait()
    if job.processes.first:
        whole = partials.only()
        if whole is not None:  # one process did everything: statistics can be gigabytes, to read and write again
            whole.rename(job.stats_file)
        else:
            CalibrationStats.from_tensors(partials.gathered().state).save(job.stats_file)
        partials.remove()


def _sample(job: Job, partials: Partials) -> None:
    e, processes = job.experiment, job.processes
    prompts = e.data.calibration_prompts
    done = processes.first_does(partials.compact)
    batches = list(enumerate(batches_of(len(prompts), e.batch_size)))
    pipeline = e.adapter.load()
    denoiser = e.adapter.denoiser_of(pipeline)
    names = linear_names(denoiser)
    sizes = (e.num_buckets, e.rows_per_bucket)
    calibrator = Calibrator(denoiser, names, e.adapter.timestep_scale, *sizes, e.plan.moment_layers)
    if processes.first:
        job.say(f"      statistics take at most {calibrator.max_bytes / 1e6:,.0f} MB")
    module = Calibration(
        *(e.adapter, pipeline, job.load_embeds(prompts), e.seed),
        accumulator=calibrator,
        partials=partials,
        rank=processes.rank,
    )
    run_batches(e.make_trainer(), module, processes.share([b for b in batches if b[0] not in done]))

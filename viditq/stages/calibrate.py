"""Stage `calibrate`: the float model samples the calibration prompts with observers attached."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn

from viditq.engine.partials import PARTIAL, Partials, State
from viditq.engine.sampling import Calibration, batches_of, run_batches
from viditq.job import Job
from viditq.memory import give_back
from viditq.quant.calibration.calibrator import Calibrator
from viditq.quant.calibration.moment_passes import MomentPass
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.execution.model_linears import linear_names
from viditq.quant.reconstruction.collect import BlockInputs, finish, joined_states
from viditq.quant.reconstruction.joint_calibrator import JointCalibrator, divided
from viditq.quant.reconstruction.store import BlockStore
from viditq.run_dir import Entry
from viditq.stages.calibration_passes import INPUTS, MOMENTS, STATS, Pass, entries, left, next_pass
from viditq.stages.external import skipped


def calibrate(job: Job) -> str:
    """Observe the float model; resumes after the last finished batches."""
    if why := skipped(job, "calibrate"):
        return why
    if not job.needs_stats:
        return "not needed: this recipe takes no statistics"
    already = not missing(job)
    observe(job)
    what = "already done" if already else f"{len(job.experiment.observed_prompts)} prompts observed"
    return f"{what} ({job.stats_file})"


def observe(job: Job) -> None:
    """Leave the calibration statistics on disk, and the inputs of blocks where the plan asks for them."""
    if not missing(job):
        for entry in entries(job).values():
            job.sweep_up(entry, leftovers=f"**/{PARTIAL}")  # also of passes that wanted more than this entry
        return
    with _holding(job, [*entries(job).values()]):
        while (this := job.processes.first_does(partial(next_pass, job))) is not None:
            with job.timed(job.stats.path, "calibrate"):
                _observe(job, this, Partials(this.folder, merge_states))


def missing(job: Job) -> list[str]:
    """What of STATS, INPUTS and MOMENTS has yet to be made."""
    return job.processes.first_does(partial(left, job))


@contextmanager
def _holding(job: Job, entries: list[Entry]) -> Iterator[None]:
    with ExitStack() as stack:
        for entry in entries:  # always in this order, so that two runs never wait for each other
            stack.enter_context(job.holding(entry))
        yield


def merge_states(mine: State, theirs: State) -> State:
    """What two processes have gathered as one."""
    (stats, inputs), (other_stats, other_inputs) = divided(mine), divided(theirs)
    merged: State = joined_states(inputs, other_inputs)
    if stats:
        whole = CalibrationStats.from_tensors(stats)
        whole.merge(CalibrationStats.from_tensors(other_stats))
        merged |= whole.to_tensors()
    return merged


def _observe(job: Job, this: Pass, partials: Partials) -> None:
    _sample(job, this, partials)
    give_back()  # the model and the observers go, which Lightning's modules and trainers hold in a ring
    job.processes.wait()
    if not job.processes.first:
        return
    whole = partials.only()
    if INPUTS not in this.wanted and whole is not None:
        whole.rename(this.file)  # one process did everything: statistics can be gigabytes, to read and write again
    else:
        _finish(job, this, partials.gathered().state)
    partials.remove()
    if partials.folder not in (job.stats.path, job.block_inputs.path):
        shutil.rmtree(partials.folder)


def _finish(job: Job, this: Pass, state: State) -> None:
    stats, inputs = divided(state)
    if INPUTS in this.wanted:
        e = job.experiment
        index = finish(BlockStore(job.block_inputs.path), e.block_input_bytes, inputs, e.num_buckets)
        counts = sorted({len(names) for names in index["blocks"].values()})
        each = " to ".join(str(count) for count in (counts[0], counts[-1])[: len(counts)])
        job.say(f"      {each} inputs of each block kept, {index['bytes'] / 1e6:,.1f} MB ({job.block_inputs.path})")
    if this.wanted != [INPUTS]:
        CalibrationStats.from_tensors(stats).save(this.file)


def _sample(job: Job, this: Pass, partials: Partials) -> None:
    e, processes = job.experiment, job.processes
    prompts = e.observed_prompts
    done = processes.first_does(partials.compact)
    batches = list(enumerate(batches_of(len(prompts), e.adapter.calibration_batch_size)))
    pipeline = job.load_float()
    accumulator = _accumulator(job, e.adapter.denoiser_of(pipeline), this)
    processes.wait()  # all have seen which inputs of blocks are there, before any of them goes on
    module = Calibration(
        *(e.adapter, pipeline, job.load_embeds(prompts), e.seed),
        accumulator=accumulator,
        partials=partials,
        rank=processes.rank,
    )
    run_batches(e.make_trainer(), module, processes.share([b for b in batches if b[0] not in done]))


def _accumulator(job: Job, denoiser: nn.Module, this: Pass) -> Calibrator | MomentPass | BlockInputs | JointCalibrator:
    """What is wanted, and a line that says how much it can take."""
    e, names, told = job.experiment, linear_names(denoiser), [*this.remarks]
    scale = e.adapter.timestep_scale
    calibrator = inputs = None
    if MOMENTS in this.wanted:
        moments = MomentPass(denoiser, this.layers, scale, e.rows_per_bucket)
        told.append(f"second moments take {moments.max_bytes / 1e6:,.0f} MB")
        _tell(job, told)
        return moments
    if STATS in this.wanted:
        sizes = e.num_buckets, e.rows_per_bucket
        calibrator = Calibrator(denoiser, names, scale, *sizes, e.plan.moment_layers, this.layers)
        told.append(f"statistics take at most {calibrator.max_bytes / 1e6:,.0f} MB")
    if INPUTS in this.wanted:
        blocks = [*e.plan.learned_blocks]
        inputs = BlockInputs(
            denoiser,
            blocks,
            job.block_inputs.path,
            e.block_input_bytes,
            scale,
            e.num_buckets,
            job.processes.rank,
        )
        told.append(f"inputs of {len(blocks)} blocks at most {e.block_input_bytes / 1e6:,.0f} MB on disk")
    _tell(job, told)
    if calibrator is not None and inputs is not None:
        return JointCalibrator(calibrator, inputs)
    found = calibrator or inputs
    assert found is not None
    return found


def _tell(job: Job, told: list[str]) -> None:
    if job.processes.first:
        job.say(f"      {', '.join(told)}")

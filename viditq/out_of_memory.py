"""What is said where memory does not suffice: torch's own account, what was expected, and what needs less."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from viditq.job import Job

CPU_MEMORY = "DefaultCPUAllocator: "  # begins torch's message where main memory is used up


def is_about_memory(error: BaseException) -> bool:
    """Whether this is torch's error of a GPU's memory, or of the machine's; torch need not be imported."""
    return type(error).__name__ == "OutOfMemoryError" or CPU_MEMORY in str(error)


def memory_message(text: str, expected: str = "") -> str:
    """torch's own account of what was asked for and what there is, and what asks for less.

    text: of its error. expected: what an estimate says to it.
    """
    told = [
        sentence for sentence in re.split(r"(?<=\.)\s", text) if sentence.startswith(("Tried to", "GPU ", "Of the"))
    ]
    total = re.search(r"total capacity of ([\d.]+) GiB", text)
    room = f"fit={int(float(total[1]) * 2**30 / 10**9)}GB" if total else "fit=MEMORY, such as fit=16GB,"
    place = "of the GPU " if total else ""
    return (
        f"The memory {place}does not suffice. {' '.join(told) or text.splitlines()[0]}\n{expected}Finished work is "
        "kept: the same command goes on from there with less. Lower batch_size, down to 1; trainer.offload=model, then "
        "sequential, keeps what does not compute in main memory (on a CPU trainer.offload=disk in its files, and "
        "trainer.workers=0 samples in one process). Other "
        "results come of model.dtype=bfloat16, quant.float_dtype=bfloat16, fewer bits, and smaller (model.height, "
        "model.width) or shorter samples (model.num_frames); backend=auto holds codes where fake holds whole weights. "
        f"With estimate=true the same command says what each stage needs, with {room} which settings fit."
    )


def expected(job: Job, stage: str) -> str:
    """A line of what `stage` was to take, as configured and with what needs less, from the configuration alone.

    Nothing for a stage that is not estimated; where no estimate can be made the line says why.
    """
    from viditq.errors import UserError
    from viditq.estimate import Known, estimate
    from viditq.estimate.fit import asked
    from viditq.estimate.table import size

    e = job.experiment
    try:
        known = Known.of(e.adapter)
        first = estimate(job, "meta", known)
        if stage not in first.peaks:
            return ""
        gpu = first.peaks[stage].vram is not None
        lower = {"batch_size=1": replace(e, batch_size=1)} if first.batch_size > 1 else {}
        if gpu:
            places = [place for place in ("model", "sequential") if place != e.offload]
            lower |= {f"trainer.offload={place}": replace(e, offload=place) for place in places}
        needs = [f"{size(asked(first.peaks[stage]) + (0 if gpu else first.base))} as configured"]
        for setting, less in lower.items():
            found = estimate(replace(job, experiment=less), "meta", known)
            needs.append(f"{size(asked(found.peaks[stage]) + (0 if gpu else found.base))} with {setting}")
    except UserError as error:
        return f"What {stage} needs cannot be estimated: {error}\n"
    return f"Estimated for {stage} from the configuration alone: {', '.join(needs)}.\n"

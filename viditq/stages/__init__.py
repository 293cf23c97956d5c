"""The stages of a run; each does only what is missing on disk and leaves a file for the next."""

from collections.abc import Callable, Mapping

from viditq.config import STAGES
from viditq.job import Job
from viditq.stages import benchmark, calibrate, diagnose, evaluate, prompts, quantize, report, samples, search

FUNCTIONS: Mapping[str, Callable[[Job], str]] = {
    "prompts": prompts.prompts,
    "reference": samples.reference,
    "noise_floor": samples.noise_floor,
    "calibrate": calibrate.calibrate,
    "search": search.search,
    "quantize": quantize.quantize,
    "generate": samples.generate,
    "diagnose": diagnose.diagnose,
    "benchmark": benchmark.benchmark,
    "evaluate": evaluate.evaluate,
    "report": report.report,
}
"""Name -> function, in order; each returns a line that says what it did."""

assert tuple(FUNCTIONS) == STAGES

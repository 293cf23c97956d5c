"""How many prompts a run may have."""

from viditq.errors import UserError

MOST = 1_000_000  # the noise of calibration is drawn by indices from here on (engine/sampling.py)


def check_counts(num_prompts: int, num_calibration_prompts: int) -> None:
    """Raises UserError for numbers of prompts that are none."""
    for name, count in (("num_prompts", num_prompts), ("num_calibration_prompts", num_calibration_prompts)):
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST:
            raise UserError(f"data.{name}={count!r} must be a whole number of at least 1 and at most {MOST}.")

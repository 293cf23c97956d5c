"""The jackknife: exact for means, the textbook formula for equal groups."""

import numpy as np
import pytest
import torch

from viditq.metrics.jackknife import group_jackknife

VALUES = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_leaving_out_one_at_a_time_gives_the_error_of_a_mean():
    value, error = group_jackknife(lambda rows: VALUES[rows].mean()[None], 60, 100)
    assert value.item() == pytest.approx(VALUES.mean().item())
    assert error.item() == pytest.approx(VALUES.std().item() / 60**0.5, rel=1e-9)


def test_equal_groups_by_the_textbook():
    _, error = group_jackknife(lambda rows: torch.stack([VALUES[rows].var(), VALUES[rows].median()]), 60, 20)
    values = VALUES.numpy()
    left_out = [np.delete(values, np.arange(j, 60, 20)) for j in range(20)]
    for column, statistic in enumerate((lambda x: x.var(ddof=1), lambda x: np.sort(x)[(len(x) - 1) // 2])):
        parts = np.array([statistic(x) for x in left_out])
        assert error[column].item() == pytest.approx(np.sqrt(19 / 20 * np.square(parts - parts.mean()).sum()), rel=1e-9)


def test_unequal_groups_are_weighted_right():
    """The error of a mean of n = 30 in 20 groups, which have one or two rows, over many draws."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(400, 30, generator=generator, dtype=torch.float64)
    errors = torch.cat([group_jackknife(lambda rows, x=x: x[rows].mean()[None], 30, 20)[1] for x in draws])
    assert errors.square().mean().sqrt().item() == pytest.approx(30**-0.5, rel=0.05)

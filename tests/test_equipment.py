"""What a run computes with is refused before any slow work where it is not there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from viditq.equipment import make_trainer
from viditq.errors import UserError
from viditq.models.attention import check_device


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("trainer", ["gpu", "ddp", "slurm"])
def test_without_a_gpu_its_trainers_are_refused_with_what_goes(trainer: str, configure: Callable[..., Any]) -> None:
    with pytest.raises(UserError) as raised:
        make_trainer(configure(f"trainer={trainer}").trainer, {})
    for words in ("trainer.accelerator=gpu", torch.__version__, "trainer=cpu", "CUDA_VISIBLE_DEVICES"):
        assert words in str(raised.value)


@pytest.mark.parametrize("attention", ["xformers", "flash", "sage"])
def test_attention_of_gpus_is_refused_on_a_cpu(attention: str) -> None:
    with pytest.raises(UserError, match=rf"model\.attention={attention} computes on a GPU, and this run on a CPU"):
        check_device(attention, "cpu")
    check_device(attention, "cuda")

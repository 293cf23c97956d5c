"""model=diffusers: pipelines without a yaml, by what is guessed and measured of them; real classes, random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from zoo import videos
from zoo.saving import save

from viditq.models.adapter import ModelAdapter
from viditq.models.generate import _call, noise_generator
from viditq.models.text import encode_prompt
from viditq.quant import linear_names

SHRUNK = ["name=x", "model=diffusers", "model.num_steps=4", "model.height=32", "model.width=32"]


@pytest.mark.parametrize(
    ("build", "own", "roles"),
    [(videos.sana_video, ["model.num_frames=5"], {"self_attention": 8, "cross_attention": 8, "float": 6})],
)
def test_samples_are_those_of_the_pipelines_own_call(
    build: Callable[[], Any],
    own: list[str],
    roles: dict[str, int],
    configure: Callable[..., Any],
    tmp_path: Path,
) -> None:
    save(build, tmp_path / "model")
    cfg = configure(*SHRUNK, *own, f"model.path='{tmp_path / 'model'}'").model
    adapter: ModelAdapter = instantiate(cfg, _convert_="all")
    found = [*adapter.linear_roles(linear_names(adapter.build_denoiser())).values()]
    assert {role: found.count(role) for role in dict.fromkeys(found)} == roles
    prompt, pipeline = "a small red circle", adapter.load_complete()
    embeds = encode_prompt(adapter, adapter.load_text_part(), prompt)
    ours = _call(adapter, adapter.load(), [embeds], [3], 0, "pt")
    settings = {
        "num_inference_steps": 4,
        "height": 32,
        "width": 32,
        "frames": 5,
        "output_type": "pt",
        "return_dict": False,
    }
    given = {**adapter.encode, **adapter.call, **settings}
    theirs = torch.as_tensor(pipeline(prompt, generator=noise_generator(0, 3), **given)[0])
    assert ours.shape == (1, 5, 3, 32, 32)
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=0, atol=1e-5)
    assert adapter.timestep_scale == 1000.0

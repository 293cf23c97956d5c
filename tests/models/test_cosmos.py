"""Cosmos 1 and 2 through model=diffusers: real classes, random weights, a stand-in for their checker."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import load_image
from hydra.utils import instantiate
from zoo import cosmos
from zoo.pictures import draw_noise

from viditq.models.adapter import ModelAdapter
from viditq.models.generate import _as_tensor, _call, noise_generator, with_settings
from viditq.models.schedulers import make_scheduler
from viditq.models.text import encode_prompt
from viditq.models.timestep_scale import levels_of
from viditq.models.trial import try_out
from viditq.prompt import Prompt
from viditq.quant import linear_names

SHRUNK = ["name=x", "model=diffusers", "model.num_steps=4", "model.height=32", "model.width=32"]
TEXT = "a small red circle"
OF_SIGMA = ["model.timestep_scale=1"]  # sigma / (sigma + 1)
OF_LOG = ["+model.timestep_scale={at_noise: 1.0955067, at_clean: -1.5536521}"]  # log(sigma) / 4, of 80 and 0.002
# name -> builder, overrides, what is given, frames
CASES: dict[str, tuple[Callable[[], Any], list[str], str, int]] = {
    "cosmos25_transfer": (cosmos.cosmos25_transfer, ["+model.call.num_frames_per_chunk=5"], "controls", 5),
    "cosmos2": (cosmos.cosmos2, OF_SIGMA, "", 1),
    "cosmos2_video2world": (cosmos.cosmos2_video2world, OF_SIGMA, "image", 5),
    "cosmos2_video2world+clip": (cosmos.cosmos2_video2world, OF_SIGMA, "video", 9),
    "cosmos1": (cosmos.cosmos1, OF_LOG, "", 9),
    "cosmos1_video2world": (cosmos.cosmos1_video2world, OF_LOG, "image", 9),
    "cosmos1_video2world+clip": (cosmos.cosmos1_video2world, OF_LOG, "video", 17),
}


@pytest.mark.slow  # the kind of check is test_conditions.py's; these are the classes that want torchvision
@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_the_pipelines_own_call(
    case: str, configure: Any, folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision", reason="the denoiser of Cosmos resizes with it")
    cosmos.guarded(monkeypatch)
    build, own, given, frames = CASES[case]
    length = [f"model.num_frames={frames}"] if frames > 1 else []
    cfg = configure(*SHRUNK, *own, *length, f"model.path='{folder_of(build)}'").model
    adapter: ModelAdapter = instantiate(cfg, _convert_="all")
    found = [*adapter.linear_roles(linear_names(adapter.build_denoiser())).values()]
    roles = {role: found.count(role) for role in dict.fromkeys(found)}
    kept = 19 if build is cosmos.cosmos25_transfer else 18
    assert roles == {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": kept}
    draw_noise(tmp_path, [(f"clip/{i:02d}", 32, 32) for i in range(9)])
    clip = given in ("video", "controls")
    path = tmp_path / "clip" if clip else tmp_path / "clip" / "00.png"
    prompt: str = Prompt(TEXT, {given: path}) if given else TEXT
    embeds = encode_prompt(adapter, adapter.load_text_part(), prompt)
    ours = _call(adapter, adapter.load(), [embeds], [3], 0, "pt")
    whole = with_settings(adapter, adapter.load_complete())
    files = sorted((tmp_path / "clip").iterdir())
    pictures = [load_image(str(file)) for file in files]
    arguments = {given: pictures if clip else pictures[0]} if given else {}
    settings = {"generator": noise_generator(0, 3), "output_type": "pt", "return_dict": False}
    theirs = _as_tensor(whole(prompt=TEXT, **arguments, **settings)[0])
    assert ours.std() > 0.01
    torch.testing.assert_close(ours.float(), theirs.reshape(ours.shape).float(), rtol=0, atol=1e-5)
    levels = levels_of(try_out(adapter, make_scheduler(adapter)), adapter.timestep_scale)
    assert 0.98 < levels[0] <= 1 and levels == sorted(levels, reverse=True) and 0 <= levels[-1] < 0.6

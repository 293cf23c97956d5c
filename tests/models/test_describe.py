"""`viditq describe`: what was guessed and measured, as a yaml that drives the model in the same way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from zoo import conditioned, guided, images
from zoo.saving import save

from viditq.models.adapter import ModelAdapter
from viditq.program import main
from viditq.quant import linear_names

SIZES = ["height=32", "width=32", "num_steps=4"]


@pytest.mark.parametrize(
    ("build", "own", "told"),
    [
        (
            conditioned.wan22_i2v,
            ["num_frames=5"],
            [
                "# transformer: 2 of 4 steps, 2 calls a step, timestep 999, 900",
                "# transformer_2: 2 of 4 steps, 2 calls",
                "# text 0: prompt_embeds (measured) -> encoder_hidden_states",
                "# text 1: negative_prompt_embeds (measured) -> encoder_hidden_states",
            ],
        ),
        (
            guided.krea2,
            [],
            [
                "# transformer: 4 of 4 steps, 2 calls a step, timestep 1, 0.8",
                "# text 0: prompt_embeds (measured, prompts along axis 0) -> encoder_hidden_states",
            ],
        ),
        (
            images.pixart_alpha,
            [],
            [
                "# text 0: prompt_embeds (measured, prompts along axis 0) -> encoder_hidden_states",
                "# text 3: negative_prompt_attention_mask (measured, prompts along axis 0)",
            ],
        ),
    ],
    ids=["wan22_i2v", "krea2", "pixart"],
)
def test_the_yaml_drives_the_model_in_the_same_way(
    build: Callable[[], Any],
    own: list[str],
    told: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(build, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    words = [word for setting in [*SIZES, *own] for word in ("--set", f"model.{setting}")]
    capsys.readouterr()
    assert main(["describe", "model", "--name", "mine", *words]) == 0
    text = capsys.readouterr().out
    assert all(line in text for line in told)
    values = yaml.safe_load(text)
    assert values.pop("defaults") and values.pop("_target_") == "viditq.models.adapter.ModelAdapter"
    assert values["path"] == str(tmp_path / "model"), "as it is from anywhere"
    assert values["name"] == "mine" and "guess" not in values and {"dtype", "attention", "call"} <= values.keys()
    mine = ModelAdapter(**values)
    shrunk = {key: values.get(key) for key in ("height", "width", "num_steps", "num_frames", "path")}
    guessed = ModelAdapter(
        **shrunk,
        **{"name": "guessed", "guess": True, "guidance_scale": None, "max_tokens": None, "timestep_scale": None},
        **dict.fromkeys(("pipeline", "modality", "encode_outputs", "denoisers")),
    )
    of_text = {"name", "guess", "roles", "keep_float"}
    plain, other = mine.to_dict(), guessed.to_dict()
    assert {k: v for k, v in plain.items() if k not in of_text} == {k: v for k, v in other.items() if k not in of_text}
    names = linear_names(mine.build_denoiser())
    assert mine.linear_roles(names) == guessed.linear_roles(names)

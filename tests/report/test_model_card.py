"""README.md of a quantized model: the hub can read it, it says what was measured, and tells changed ones apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard as HubCard
from huggingface_hub.utils import validate_repo_id

from viditq.report.model_card import ModelCard, mark_of, marked, recipe_words

W4 = {"bits": 4, "symmetric": False, "granularity": "group", "group_size": 64, "dynamic": False}
A8 = {"bits": 8, "symmetric": True, "granularity": "token", "group_size": None, "dynamic": True}
SMOOTH = {"name": "smooth", "alpha": 0.5, "per_segment": True}
SCHEME: dict[str, Any] = {"weight": W4, "activation": A8, "transforms": [], "rounding": {"name": "nearest"}}
SCHEME["low_rank"] = None
PLAN = {
    "edges": [0.0, 0.5, 1.0],
    "schemes": {"a": SCHEME, "b": {**SCHEME, "transforms": [SMOOTH], "rounding": {"name": "gptq"}, "low_rank": 8}},
    "layers": {"x": ["a", "a"], "y": ["a", "a"], "z": ["b", "b"], "w": ["a", None]},
}
METRICS = {
    "metrics": {"psnr": 31.25, "fid": 4.5},
    "labels": {
        "psnr": {"label": "PSNR", "unit": "dB", "higher_is_better": True},
        "fid": {"label": "FID", "unit": "", "higher_is_better": False},
    },
    "prompts": 64,
    "verdict": {
        "psnr": {
            **{"kind": "fidelity", "value": 31.25, "interval": [30.5, 32.0], "difference": -6.5},
            **{"difference_interval": [-7.25, -5.75], "noise": 0.5, "verdict": "differs"},
        },
        "fid": {"kind": "distribution", "value": 4.5, "verdict": None, "reason": "too few prompts"},
    },
}
CARD = ModelCard(
    base="somebody/model-1.0",
    of_hub=True,
    pipeline="PixArtAlphaPipeline",
    modality="image",
    by_class=False,
    dtype="bfloat16",
    plan=PLAN,
    meta={
        **{"average_weight_bits": 4.456, "average_activation_bits": 8.0, "float_size_bytes": 2_000_000},
        "float_dtype": None,
    },
    settings={"num_inference_steps": 20, "guidance_scale": 4.5},
    size=612_000,
    metrics=METRICS,
    pictures=["comparison.png"],
    command="python run.py experiment=w4a8 model=x --multirun",
)


def test_the_hub_reads_its_metadata() -> None:
    found = HubCard(CARD.text()).data.to_dict()
    validate_repo_id(found["base_model"])
    expected = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "base_model": "somebody/model-1.0"}
    expected |= {"base_model_relation": "quantized"}
    assert found == {**expected, "tags": ["viditq", "quantized", "4-bit"]}


@pytest.mark.parametrize(
    ("change", "absent"),
    [({"of_hub": False, "base": "tiny_image"}, "base_model"), ({"by_class": True}, "pipeline_tag")],
)
def test_what_is_not_known_is_left_out_of_the_metadata(change: dict[str, Any], absent: str) -> None:
    found = HubCard(replace(CARD, **change).text()).data.to_dict()
    assert absent not in found and found["library_name"] == "diffusers"


def test_numbers_are_those_of_the_files() -> None:
    text = CARD.text()
    assert "| average bits of a weight | 4.46 |" in text and "| denoiser | 612 kB, of 2 MB in 16 bits |" in text
    assert "**Quality was not measured" in text and "beyond rounding to bfloat16: PSNR." in text
    row = "| PSNR, higher is better | 31.25 dB (30.50 to 32.00) | – | −6.50 dB (−7.25 to −5.75) | 0.50 dB | differs |"
    assert row in text and "| not judged |" in text and "- too few prompts" in text
    assert "(comparison.png)" in text and "\npython run.py experiment=w4a8 model=x --multirun\n" in text
    assert 'viditq.load_quantized("FOLDER")' in text


def test_before_anything_is_measured() -> None:
    text = replace(CARD, metrics=None, pictures=[], command=None).text()
    assert "Not measured yet" in text and "![" not in text and "## Made by" not in text


def test_an_export_says_how_its_program_loads_it() -> None:
    text = replace(CARD, target="diffusers", exported_size=5_000_000).text()
    assert "import viditq  # lets diffusers know the method" in text and "dtype=torch.bfloat16" in text
    assert 'pipeline("a prompt", num_inference_steps=20, guidance_scale=4.5).images[0]' in text
    assert "| all of this export | 5 MB |" in text and "viditq export RUN --to diffusers" in text
    assert "pipeline(207," in replace(CARD, target="diffusers", by_class=True).text()
    assert "frames[0]" in replace(CARD, target="diffusers", modality="video").text()
    assert '"a prompt").video' in replace(CARD, modality="video", pipeline="Cosmos3OmniPipeline").text()


def test_an_export_that_was_changed_says_so_before_the_verdict() -> None:
    text = replace(CARD, target="sdnq", exported_size=5_000_000, changed="quantized again: 40 Linears").text()
    assert "| for this program | quantized again: 40 Linears |" in text
    assert 0 < text.index("Measured on the artifact, before it was changed") < text.index("**Quality was not measured")
    assert "viditq export RUN --to sdnq --requantize\n" in text
    as_it_is = replace(CARD, target="sdnq", exported_size=5_000_000, changed="").text()
    assert "for this program" not in as_it_is and "Measured on" not in as_it_is and "--requantize" not in as_it_is


def test_parts_of_other_types() -> None:
    text = replace(CARD, target="torchao", component_dtypes={"vae": "float32"}).text()
    assert 'dtype={"default": torch.bfloat16, "vae": torch.float32})' in text and "import viditq" not in text
    assert "models/diffusion_models" in replace(CARD, target="comfyui").text()


def test_recipes_in_words() -> None:
    assert recipe_words(PLAN) == [
        "W4 group 64, A8 token symmetric: 2 layers",
        "W4 group 64, A8 token symmetric, smooth, rounded by gptq, low-rank branch of 8, for each of 2 ranges of noise "
        "levels: 1 layers",
        "W4 group 64, A8 token symmetric at noise levels 0 to 0.5; float at noise levels 0.5 to 1: 1 layers",
    ]


def test_a_changed_card_is_told_from_ours() -> None:
    text = CARD.text()
    mark = mark_of(text)
    assert mark is not None and mark["ours"] and mark["command"] == CARD.command
    assert "--" not in text.splitlines()[-1].removeprefix("<!--").removesuffix("-->")
    for changed in (text.replace("Quality", "quality"), f"{text}\nmore", f"my words\n{text}"):
        found = mark_of(changed)
        assert found is None or not found["ours"]
    assert mark_of("# mine\n") is None and mark_of("x\n<!-- viditq nothing -->\n") is None
    assert mark_of(marked("", None)) == {**(mark_of(marked("", None)) or {}), "ours": True, "command": None}

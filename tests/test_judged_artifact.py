"""quant/policy=artifact: a run that judges codes made before, by another run or another program."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parent / name) for name in ("models", "export")]
from test_comfyui import W8A8, artifact_of, tiny_adapter

from viditq.config import check_overrides
from viditq.errors import UserError
from viditq.program import main
from viditq.quant.artifact import read_meta, verify
from viditq.quant.description.policy import StoredArtifact

Run = Callable[..., Any]


def samples(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "samples").glob("*.png"))]


def of(path: Path) -> list[str]:
    return ["quant/policy=artifact", f"quant.policy.path='{path}'"]


def test_a_run_s_own_artifact_gives_its_samples_and_numbers(
    run: Run, finished_run: Path, shared_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Timestep-aware, with statistics that this run does not make."""
    metrics = run(tmp_path / "judged", shared_cache, *of(finished_run))
    assert f"as they are in {finished_run / 'quantized'}" in capsys.readouterr().out.replace("\n", "")
    assert samples(tmp_path / "judged") == samples(finished_run) != []
    before = json.loads((finished_run / "metrics.json").read_text())
    for key in ("verdict", "average_weight_bits", "average_activation_bits", "size_bytes"):
        assert (
            metrics[key] == pytest.approx(before[key], rel=0.01) if key == "size_bytes" else metrics[key] == before[key]
        )
    verify(tmp_path / "judged" / "quantized")
    assert (tmp_path / "judged" / "report.html").is_file()


def test_an_imported_file_is_judged_like_what_it_was_made_from(run: Run, shared_cache: Path, tmp_path: Path) -> None:
    artifact, file = artifact_of(tiny_adapter(), W8A8, tmp_path / "quantized"), tmp_path / "out.safetensors"
    assert main(["export", str(artifact), "--to", "comfyui", "--out", str(file)]) == 0
    assert main(["import", str(file), "--model", "tiny_image", "--out", f"{tmp_path}/back"]) == 0
    for name in ("quantized", "back"):
        run(
            tmp_path / f"run_{name}",
            shared_cache,
            *of(tmp_path / name),
            "diagnosis.num_prompts=0",
            "stages=[prompts,quantize,generate]",
        )
    assert samples(tmp_path / "run_quantized") == samples(tmp_path / "run_back") != []
    card = (tmp_path / "run_back" / "quantized" / "README.md").read_text()
    assert "quantized elsewhere (comfyui: out.safetensors)" in card
    assert read_meta(tmp_path / "run_back" / "quantized")["weights"] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2"),
        ({"text_encoders": ["text_encoder"]}, "has quantized text encoders"),
    ],
)
def test_artifacts_that_cannot_be_taken_as_they_are(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "meta.json").write_text(json.dumps({"format_version": 3, "sha256": {}} | change))
    with pytest.raises(UserError, match=message):
        StoredArtifact(str(tmp_path))


def test_what_is_no_artifact_or_of_another_model_is_refused(
    run: Run, finished_run: Path, shared_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"plan.json is missing.*viditq import"):
        StoredArtifact(str(tmp_path))
    with pytest.raises(UserError, match="which is no Linear of this model"):
        StoredArtifact(str(finished_run)).plan(None, ["other"], [])  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"quant.correction=ptqd: quant/policy=artifact takes"):  # wrapped by Hydra
        run(tmp_path / "x", shared_cache, *of(finished_run), "quant.correction=ptqd")
    with pytest.raises(UserError, match=r"made with model.dtype=float32, and this run has bfloat16"):
        run(tmp_path / "x", shared_cache, *of(finished_run), "model.dtype=bfloat16")
    policy = "viditq.quant.description.policy.StoredArtifact"
    with pytest.raises(UserError, match="quant/policy=artifact takes formats"):
        check_overrides(policy, ["quant/smoothing=rotate", "quant/policy=artifact"])
    with pytest.raises(UserError, match=r"quant.float_dtype: quant/policy=artifact"):
        check_overrides(policy, ["quant.float_dtype=bfloat16"])

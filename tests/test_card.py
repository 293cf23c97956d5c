"""README.md beside artifacts and exports: when it is written, and when it is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard as HubCard
from hydra.utils import instantiate

from viditq.card import Card, artifact_card, export_card
from viditq.program import main
from viditq.quant import QuantSpec, Recipe, linear_names, quantize_denoiser, save_denoiser
from viditq.report.model_card import mark_of


def test_a_run_writes_it_and_says_the_verdict(finished_run: Path) -> None:
    folder = finished_run / "quantized"
    text = (folder / "README.md").read_text()
    assert "W4 channel, A8 token, smooth, for each of 2 ranges of noise levels: 40 layers" in text
    assert "| PSNR, higher is better |" in text and "(comparison.png)" in text
    assert (folder / "comparison.png").read_bytes() == (finished_run / "comparison.png").read_bytes()
    assert HubCard.load(folder / "README.md").data.library_name == "diffusers"
    assert "base_model" not in HubCard.load(folder / "README.md").data.to_dict()  # shipped with the package


def test_the_verdict_comes_later_and_changes_by_hand_stay(
    run: Callable[..., Any], run_copy: Path, shared_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = run_copy / "quantized" / "README.md"
    before = card.read_text()
    for path in (card, run_copy / "metrics.json", run_copy / "comparison.png"):
        path.unlink()
    (run_copy / "quantized" / "comparison.png").unlink()
    run(run_copy, shared_cache, "stages=[quantize]")
    assert "Not measured yet" in card.read_text()
    run(run_copy, shared_cache, "stages=[evaluate,report]")
    assert card.read_text().count("\n") == before.count("\n") and "| PSNR" in card.read_text()
    card.write_text("# Mine\n")
    (run_copy / "metrics.json").unlink()
    run(run_copy, shared_cache, "stages=[evaluate,report]")
    assert card.read_text() == "# Mine\n"
    assert "was changed by hand, and stays as it is" in capsys.readouterr().out


def test_an_export_has_one_of_its_own(run_copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(run_copy), "--to", "diffusers", "--out", str(out)]
    assert main(arguments) == 0
    text = (out / "README.md").read_text()
    mark = mark_of(text)
    assert mark is not None and mark["ours"] and mark["command"].startswith("viditq.runner.run")
    assert "DiffusionPipeline.from_pretrained" in text and "num_inference_steps=2" in text
    assert (out / "comparison.png").is_file()
    (out / "README.md").write_text("# Mine\n")
    assert main(arguments) == 0
    assert (out / "README.md").read_text() == "# Mine\n"


def test_beside_a_single_file(finished_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"123")
    card: Card = export_card(finished_run / "quantized", file, "comfyui")
    card.write()
    assert card.path == tmp_path / "model.README.md" and "| all of this export | 3 bytes |" in card.path.read_text()


def test_files_in_one_folder_have_their_own_pictures(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "comparison.png").write_text("mine")
    for name in ("a", "b[1]"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"123")
        card = export_card(finished_run / "quantized", tmp_path / f"{name}.safetensors", "comfyui")
        card.write()
        assert f"({name}.comparison.png)" in card.text and card.is_there()
        assert (tmp_path / f"{name}.comparison.png").stat().st_size > 1000
    assert (tmp_path / "comparison.png").read_text() == "mine"


def test_what_is_not_told_of_an_artifact_is_left_out(tmp_path: Path, configure: Callable[..., Any]) -> None:
    """As `save_denoiser` alone writes one."""
    adapter = instantiate(configure("model=tiny_image", "name=x").model, _convert_="all")
    denoiser = adapter.denoiser_of(adapter.load())
    plan = Recipe(QuantSpec(8, True, "channel"), None).resolve(linear_names(denoiser))
    quantize_denoiser(denoiser, plan, None)
    save_denoiser(tmp_path / "quantized", denoiser, plan, {"model": adapter.to_dict(), "float_dtype": None})
    card = artifact_card(tmp_path / "quantized", "python mine.py", adapter)
    card.write()
    text = card.path.read_text()
    assert "| denoiser | " in text and "average bits" not in text and "in 16 bits" not in text

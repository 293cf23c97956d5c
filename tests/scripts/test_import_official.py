"""scripts/import_official.py: from an official checkpoint and the other parts to a folder that loads."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from official_files import GOLDEN, stored, tiny_stdit, write_tiny_opensora
from safetensors.torch import load_file
from test_scripts import load

from viditq.assets import SHIPPED
from viditq.models.opensora_pipeline import OpenSoraPipeline


@pytest.fixture
def script() -> ModuleType:
    return load("scripts/import_official.py")


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["import_official.py", *map(str, arguments)])
    script.main()


@pytest.mark.parametrize("options", [[], ["--copy", "--dtype", "float16"]])
def test_opensora(options: list[str], script, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "models" / "opensora"
    arguments = ["--parts", SHIPPED / "tiny_video", "--num-heads", 4, "--position-scale", 1, "--out", out, *options]
    run(script, monkeypatch, "opensora_v1", write_tiny_opensora(tmp_path / "x.pth"), *arguments)
    said = capsys.readouterr().out
    assert "56 tensors of x.pth are STDiT's 70, all of them" in said
    assert f"model=opensora_v1 model.path={out}" in said
    pipeline = OpenSoraPipeline.from_pretrained(out, local_files_only=True)
    dtype = torch.float16 if options else torch.float32
    wanted = tiny_stdit().to(dtype).state_dict()
    loaded = pipeline.transformer.to(dtype).state_dict()
    assert wanted.keys() == loaded.keys() and all(torch.equal(loaded[k], wanted[k]) for k in wanted)
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler" and pipeline.scheduler.config.beta_end == 0.02
    stored_dtypes = {t.dtype for t in load_file(out / "transformer" / "diffusion_pytorch_model.safetensors").values()}
    assert stored_dtypes == {dtype}
    assert (out / "vae" / "config.json").is_symlink() != bool(options)
    assert [*out.parent.glob(".*")] == []


def test_pixart_sigma(script, tmp_path: Path, monkeypatch, capsys) -> None:
    """The denoiser's numbers are in tests/models/test_official.py; here the folder."""
    torch.save(stored("pixart"), tmp_path / "x.pth")
    out = tmp_path / "sigma"
    arguments = ["--parts", SHIPPED / "tiny_image", "--num-heads", 4, "--position-scale", 2, "--out", out]
    run(script, monkeypatch, "pixart_sigma", tmp_path / "x.pth", *arguments)
    pipeline = PixArtSigmaPipeline.from_pretrained(out, local_files_only=True)
    golden = load_file(GOLDEN / "pixart.safetensors")
    added = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        ours = pipeline.transformer(
            golden["io/x"],
            golden["io/y"][:, 0],
            timestep=golden["io/timestep"],
            encoder_attention_mask=golden["io/mask"],
            added_cond_kwargs=added,
        ).sample
    assert (ours - golden["io/sigma_ms/out"]).abs().max() < 1e-4
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"


def test_without_a_text_encoder(script, tmp_path: Path, monkeypatch, capsys) -> None:
    """Embeddings made before need none."""
    parts, out = tmp_path / "parts", tmp_path / "out"
    (parts / "vae").mkdir(parents=True)
    for file in (SHIPPED / "tiny_video" / "vae").iterdir():
        (parts / "vae" / file.name).symlink_to(file)
    arguments = ["--parts", parts, "--num-heads", 4, "--position-scale", 1, "--out", out]
    run(script, monkeypatch, "opensora_v1", write_tiny_opensora(tmp_path / "x.pth"), *arguments)
    assert "without tokenizer and text_encoder: give data.embeds" in capsys.readouterr().out
    pipeline = OpenSoraPipeline.from_pretrained(out, local_files_only=True)
    assert pipeline.text_encoder is None and pipeline.transformer is not None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--out": "."}, "exists already"),
        ({"--parts": "."}, "holds no vae/"),
        ({"--num-heads": 7}, "96 channels do not divide into 7 heads"),
        ({"--position-scale": None}, "pos_embed differs from the table for this size.*--position-scale"),
    ],
)
def test_mistakes_are_refused(changed: dict, said: str, script, tmp_path: Path, monkeypatch) -> None:
    options = {"--parts": SHIPPED / "tiny_video", "--num-heads": 4, "--position-scale": 1, "--out": tmp_path / "out"}
    options |= {k: tmp_path if v == "." else v for k, v in changed.items()}
    flat = [part for key, value in options.items() if value is not None for part in (key, value)]
    checkpoint = write_tiny_opensora(tmp_path / "x.pth")
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        run(script, monkeypatch, "opensora_v1", checkpoint, *flat)
    assert not (tmp_path / "out").exists() and [*tmp_path.glob(".*")] == []

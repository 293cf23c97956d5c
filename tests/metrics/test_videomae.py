"""VideoMAE features against direct calls of transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from viditq.errors import UserError
from viditq.metrics.frechet import FrechetDistance, frechet_distance
from viditq.metrics.videomae import load_videomae


def pixels_of(folder, clips: Tensor) -> Tensor:
    """By transformers' own processor, [B, F, C, H, W]."""
    processor = VideoMAEImageProcessorPil.from_pretrained(folder)
    videos = [[frame.permute(1, 2, 0).numpy() for frame in clip] for clip in clips]
    return processor(videos, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(("size", "tolerance"), [(16, 1e-5), (40, 0.05)])  # PIL rounds what it resizes to 8 bits
def test_pretrained_models(size, tolerance, pairs, videomae_folder):
    clips = pairs(6, frames=4, size=size).samples
    found = load_videomae(str(videomae_folder)).features(clips / 255)
    with torch.no_grad():
        tokens = VideoMAEModel.from_pretrained(videomae_folder)(pixels_of(videomae_folder, clips)).last_hidden_state
    assert found.shape == (6, 16)
    torch.testing.assert_close(found, tokens.mean(1), rtol=0, atol=tolerance)
    assert found.std(0).mean() > 0.05


def test_fine_tuned_models_end_before_the_classifier(pairs, videomae_folder, tmp_path):
    folder = shutil.copytree(videomae_folder, tmp_path / "tuned")
    config = VideoMAEConfig.from_pretrained(folder, use_mean_pooling=True, num_labels=5)
    torch.manual_seed(0)
    whole = VideoMAEForVideoClassification(config).eval()
    torch.nn.init.normal_(whole.fc_norm.weight)
    whole.save_pretrained(folder)
    clips = pairs(3, frames=4, size=16).samples
    with torch.no_grad():
        expected = whole(pixels_of(folder, clips)).logits
        found = whole.classifier(load_videomae(str(folder)).features(clips / 255))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_distance_and_other_lengths(pairs, videomae_folder):
    features, batch = load_videomae(str(videomae_folder)), pairs(8, frames=9, size=16)
    metric = FrechetDistance(features, "reference", "FVD")
    metric.update(batch)
    taken = [1, 3, 5, 7]  # of nine, four evenly spaced
    by_hand = [features.features(getattr(batch, side)[:, taken] / 255) for side in ("samples", "references")]
    assert metric.compute()["value"].item() == pytest.approx(frechet_distance(*by_hand).item(), rel=1e-3)
    with pytest.raises(UserError, match="got images"):
        features.features(batch.samples[:, :1] / 255)


def test_folders_that_do_not_fit_are_refused(videomae_folder, clip_folder, tmp_path):
    with pytest.raises(UserError, match=r"cannot be loaded.*metric=fvd"):
        load_videomae(str(tmp_path))
    half = shutil.copytree(videomae_folder, tmp_path / "half")
    tensors = load_file(half / "model.safetensors")
    left_out = next(name for name in tensors if "layer.1" in name)
    save_file({k: v for k, v in tensors.items() if k != left_out}, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"another model, it lacks .*layer"):
        load_videomae(str(half))
    other = shutil.copytree(videomae_folder, tmp_path / "crop")
    config = json.loads((other / "preprocessor_config.json").read_text()) | {"crop_size": {"height": 8, "width": 8}}
    (other / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="crops 8 px and VideoMAE reads 16 px"):
        load_videomae(str(other))

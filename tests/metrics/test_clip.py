"""CLIP metrics by hand with the same model, preprocessing against transformers, and what must be noticed."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.clip import ClipSim, ClipTemp
from viditq.metrics.clip_encoder import Preprocess, load_clip


def result_of(metric, batch: EvalBatch) -> dict[str, torch.Tensor]:
    metric.update(batch)
    return metric.compute()


def replace(batch: EvalBatch, **changes: object) -> EvalBatch:
    return EvalBatch(**{**batch.__dict__, **changes})


def unit_frames(folder, clips: torch.Tensor) -> np.ndarray:
    """[B, F, D] by transformers' own processor and feature methods."""
    processor, model = CLIPImageProcessorPil.from_pretrained(folder), CLIPModel.from_pretrained(folder).eval()
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clips.flatten(0, 1)]
    with torch.no_grad():
        features = model.get_image_features(**processor(images, return_tensors="pt")).pooler_output.numpy()
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return features.reshape(*clips.shape[:2], -1)


def unit_texts(folder, prompts: list[str]) -> np.ndarray:
    """[B, D], one prompt at a time, so that padding must not matter."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
        features = np.concatenate([model.get_text_features(x).pooler_output.numpy() for x in ids])
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def test_clipsim_and_clip_temp_by_hand(pairs, clip_folder):
    batch = replace(pairs(3, size=24), prompts=["a red circle", "square", "a blue square left"])
    clip, texts = load_clip(str(clip_folder)), unit_texts(clip_folder, batch.prompts)
    order = batch.index.argsort()
    sim, temp = result_of(ClipSim(clip, "sim"), batch), result_of(ClipTemp(clip, "temp"), batch)
    for clips, suffix in ((batch.samples, ""), (batch.references, "_reference")):
        frames = unit_frames(clip_folder, clips)
        by_hand = torch.tensor(100 * np.einsum("bfd,bd->bf", frames, texts).mean(1))[order]
        torch.testing.assert_close(sim[f"per_sample{suffix}"].float(), by_hand, rtol=0, atol=1e-3)
        by_hand = torch.tensor(100 * np.einsum("bfd,bfd->bf", frames[:, 1:], frames[:, :-1]).mean(1))[order]
        torch.testing.assert_close(temp[f"per_sample{suffix}"].float(), by_hand, rtol=0, atol=1e-3)
    assert sim["value"] == pytest.approx(sim["per_sample"].mean().item())
    assert temp["reference_value"] == pytest.approx(temp["per_sample_reference"].mean().item())


@pytest.mark.parametrize("size", [(20, 20), (24, 40), (70, 50)])
def test_preprocessing_is_that_of_transformers(size, clip_folder):
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    # Away from black and white, where PIL clips overshoots after each axis and we once at the end.
    image = torch.randint(64, 192, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    config = json.loads((clip_folder / "preprocessor_config.json").read_text())
    ours = Preprocess.from_config(config)(image[None] / 255)
    step = 1 / 255 / 0.2  # PIL rounds to 8 bits, once per axis
    torch.testing.assert_close(ours, expected, rtol=0, atol=1.6 * step)


def test_shuffled_frames_lower_clip_temp_and_leave_clipsim(pairs, clip_folder):
    clip, batch = load_clip(str(clip_folder)), pairs(4, frames=6, noise=0)
    shuffled = replace(batch, samples=batch.samples[:, [0, 3, 1, 5, 2, 4]])
    temp, sim = result_of(ClipTemp(clip, "temp"), shuffled), result_of(ClipSim(clip, "sim"), shuffled)
    assert temp["value"] < temp["reference_value"] - 1e-3
    assert sim["value"] == pytest.approx(sim["reference_value"].item(), abs=1e-4)
    frozen = replace(batch, samples=batch.samples[:, :1].expand_as(batch.samples))
    assert result_of(ClipTemp(clip, "temp"), frozen)["value"] == pytest.approx(100, abs=1e-4)


def test_another_prompt_changes_clipsim(pairs, clip_folder):
    clip, batch = load_clip(str(clip_folder)), pairs(2, frames=1)
    other = replace(batch, prompts=["a green square right"] * 2)
    difference = result_of(ClipSim(clip, "sim"), batch)["value"] - result_of(ClipSim(clip, "sim"), other)["value"]
    assert abs(difference) > 0.1


def test_images_have_no_clip_temp(pairs, clip_folder):
    with pytest.raises(UserError, match="adjacent frames"):
        ClipTemp(load_clip(str(clip_folder)), "CLIP-temp").update(pairs(2, frames=1))


def test_long_prompts_are_refused_or_cut_as_told(clip_folder):
    words = "a red circle " * 5
    with pytest.raises(UserError, match="17 tokens and CLIP reads 8"):
        load_clip(str(clip_folder)).texts([words])
    cutting = load_clip(str(clip_folder), truncate=True)
    torch.testing.assert_close(cutting.texts([words]), cutting.texts(["a red circle a red circle"]))


def test_a_tokenizer_with_another_end_is_refused(clip_folder):
    clip = load_clip(str(clip_folder))
    for other in (2, 1):
        clip.model.config.text_config.eos_token_id = other
        with pytest.raises(UserError, match="eos_token_id"):
            clip.texts(["a red circle"])


def test_unreadable_folders_are_refused(clip_folder, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_clip(str(tmp_path))
    with pytest.raises(UserError, match="shipped:nothing"):
        load_clip("shipped:nothing")
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    del config["image_mean"]
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="image_mean"):
        load_clip(str(folder))


def test_half_precision_weights_are_used_in_float32(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "half")
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(folder)
    half, full = load_clip(str(folder)), load_clip(str(clip_folder))
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    frames = torch.rand(70, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(half.images(frames), full.images(frames), rtol=0, atol=1e-2)


def test_a_crop_larger_than_the_picture_is_refused():
    config = {"size": 24, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(UserError, match="crops 32 px of 24 px"):
        Preprocess.from_config(config)

"""Preference, quality and beauty against transformers' logits, torchmetrics' formula and the heads by hand."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.functional.multimodal.clip_iqa import _clip_iqa_compute, _clip_iqa_format_prompts
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from viditq.errors import UserError
from viditq.metrics.clip import embed
from viditq.metrics.clip_encoder import load_clip
from viditq.metrics.clip_scores import AestheticScore, ClipIqa, ClipPreference, load_aesthetic


def outputs(folder, frames: torch.Tensor, texts: list[str]):
    """Of transformers, for uint8 frames and texts."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor([frame.permute(1, 2, 0).numpy() for frame in frames], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(
            **AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt"), pixel_values=pixels
        )


def scored(metric, batch):
    metric.update(batch)
    return metric.compute()


def test_preference_is_the_logit_of_transformers(pairs, clip_folder):
    batch = pairs(3, frames=2, size=24)
    result, order = scored(ClipPreference(load_clip(str(clip_folder)), "PickScore"), batch), batch.index.argsort()
    for key, clips in (("per_sample", batch.samples), ("per_sample_reference", batch.references)):
        logits = outputs(clip_folder, clips.flatten(0, 1), batch.prompts).logits_per_image.unflatten(0, (3, 2))
        expected = torch.stack([logits[i, :, i].mean() for i in range(3)])[order]
        torch.testing.assert_close(result[key].float(), expected, rtol=1e-4, atol=1e-3)


def test_quality_is_torchmetrics_formula(pairs, clip_folder):
    batch, texts = pairs(4, frames=3, size=24), ["a red circle", "blue"]
    result = scored(ClipIqa(load_clip(str(clip_folder)), "CLIP-IQA", *texts), batch)
    theirs = outputs(clip_folder, batch.samples.flatten(0, 1), texts)
    probability = _clip_iqa_compute(theirs.image_embeds, theirs.text_embeds, ["pair"]).unflatten(0, (4, 3)).mean(1)
    torch.testing.assert_close(result["per_sample"].float(), probability[batch.index.argsort()], rtol=1e-4, atol=1e-4)
    assert 0 < result["value"] < 1
    metric = ClipIqa(load_clip(str(clip_folder)), "CLIP-IQA")
    assert metric.pair == _clip_iqa_format_prompts(("quality",))[0]


def aesthetic_file(path, width: int = 768) -> dict[str, torch.Tensor]:
    """A checkpoint as the original repository writes it: a Sequential with dropouts called `layers`."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    tensors = {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}
    torch.save(tensors, path)
    return tensors


def test_both_heads_of_laion(tmp_path):
    tensors = {name: x.double().numpy() for name, x in aesthetic_file(tmp_path / "head.pth").items()}
    x = np.random.RandomState(0).standard_normal((5, 768))
    expected = x
    for layer in (0, 2, 4, 6, 7):
        expected = expected @ tensors[f"layers.{layer}.weight"].T + tensors[f"layers.{layer}.bias"]
    head = load_aesthetic(str(tmp_path / "head.pth"))
    np.testing.assert_allclose(head(torch.tensor(x).float()).numpy(), expected, rtol=1e-4, atol=1e-5)
    single = nn.Linear(768, 1)
    torch.save(single.state_dict(), tmp_path / "single.pth")
    torch.testing.assert_close(load_aesthetic(str(tmp_path / "single.pth"))(torch.ones(768)), single(torch.ones(768)))
    torch.save({"layers.0.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="another network"):
        load_aesthetic(str(tmp_path / "other.pth"))


def test_beauty_is_the_head_on_unit_vectors(pairs, clip_folder, head_of):
    batch, clip, head = pairs(3, frames=2), load_clip(str(clip_folder)), head_of(16)
    result = scored(AestheticScore(clip, head, "aesthetic"), batch)
    frames = embed(clip, batch.references)
    torch.testing.assert_close(frames.norm(dim=-1), torch.ones(3, 2))
    expected = torch.stack([head(frame) for frame in frames.flatten(0, 1)]).detach().view(3, 2).mean(1)
    torch.testing.assert_close(result["per_sample_reference"].float(), expected[batch.index.argsort()])
    with pytest.raises(UserError, match=r"reads 768 values and this CLIP gives 16.*vit-large-patch14"):
        AestheticScore(clip, head_of(768), "aesthetic")


def test_encoders_share_weights_and_take_words_from_elsewhere(clip_folder, tmp_path):
    first = load_clip(str(clip_folder))
    assert load_clip(str(clip_folder), truncate=True).model is first.model
    alone = tmp_path / "weights_only"
    CLIPModel.from_pretrained(clip_folder).save_pretrained(alone)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_clip(str(alone))
    other = load_clip(str(alone), processor=str(clip_folder))
    torch.testing.assert_close(other.texts(["a red circle"]), first.texts(["a red circle"]))


def test_half_a_clip_is_refused(clip_folder, tmp_path):
    half = shutil.copytree(clip_folder, tmp_path / "half")
    tensors = load_file(half / "model.safetensors")
    texts = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision")}
    save_file(texts, half / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"another model, it lacks vision_model"):
        load_clip(str(half))

"""ImageReward against BLIP written out in plain torch, with the names of the official file."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from viditq.errors import UserError
from viditq.metrics.image_reward import BlipSize, ImageReward, ImageRewardMetric, build, load_image_reward

SIZE = BlipSize(image=16, patch=8, vision_width=12, vision_layers=2, vision_heads=3, text_width=8, text_layers=2,
                text_heads=2, vocabulary=12)  # fmt: skip


def official(size: BlipSize) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the official code's modules have them."""
    seen, read = size.vision_width, size.text_width
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inside: int, outside: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outside, inside), (outside,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    shapes["blip.visual_encoder.cls_token"] = (1, 1, seen)
    shapes["blip.visual_encoder.pos_embed"] = (1, (size.image // size.patch) ** 2 + 1, seen)
    shapes["blip.visual_encoder.patch_embed.proj.weight"] = (seen, 3, size.patch, size.patch)
    shapes["blip.visual_encoder.patch_embed.proj.bias"] = (seen,)
    for i in range(size.vision_layers):
        block = f"blip.visual_encoder.blocks.{i}"
        norm(f"{block}.norm1", seen), norm(f"{block}.norm2", seen)
        linear(f"{block}.attn.qkv", seen, 3 * seen), linear(f"{block}.attn.proj", seen, seen)
        linear(f"{block}.mlp.fc1", seen, 4 * seen), linear(f"{block}.mlp.fc2", 4 * seen, seen)
    norm("blip.visual_encoder.norm", seen)
    shapes["blip.text_encoder.embeddings.position_ids"] = (1, 512)
    shapes["blip.text_encoder.embeddings.word_embeddings.weight"] = (size.vocabulary, read)
    shapes["blip.text_encoder.embeddings.position_embeddings.weight"] = (512, read)
    norm("blip.text_encoder.embeddings.LayerNorm", read)
    for i in range(size.text_layers):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for name, source in (("attention", read), ("crossattention", seen)):
            linear(f"{layer}.{name}.self.query", read, read)
            linear(f"{layer}.{name}.self.key", source, read), linear(f"{layer}.{name}.self.value", source, read)
            linear(f"{layer}.{name}.output.dense", read, read), norm(f"{layer}.{name}.output.LayerNorm", read)
        linear(f"{layer}.intermediate.dense", read, 4 * read), linear(f"{layer}.output.dense", 4 * read, read)
        norm(f"{layer}.output.LayerNorm", read)
    linear("blip.vision_proj", seen, 256), linear("blip.text_proj", read, 256)
    sizes = (read, 1024, 128, 64, 16, 1)
    for number, inside, outside in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        linear(f"mlp.layers.{number}", inside, outside)
    return shapes


def random_file(size: BlipSize) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in official(size).items():
        scale = 1 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.3
        tensors[name] = scale * torch.randn(shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            tensors[name] += 1
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return tensors


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None].bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def plain_reward(tensors: dict[str, Tensor], size: BlipSize, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(pixels, tensors[f"{see}.patch_embed.proj.weight"], tensors[f"{see}.patch_embed.proj.bias"],
                       stride=size.patch)  # fmt: skip
    x = torch.cat([tensors[f"{see}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + tensors[f"{see}.pos_embed"]
    for i in range(size.vision_layers):
        block = f"{see}.blocks.{i}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attention(*qkv, size.vision_heads))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{see}.norm", x, 1e-6)
    y = tensors[f"{read}.embeddings.word_embeddings.weight"][ids]
    y = y + tensors[f"{read}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(f"{read}.embeddings.LayerNorm", y, 1e-12)
    for i in range(size.text_layers):
        layer = f"{read}.encoder.layer.{i}"
        for name, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            here = y if source is None else source
            k, v = (linear(f"{layer}.{name}.self.{part}", here) for part in ("key", "value"))
            z = attention(linear(f"{layer}.{name}.self.query", y), k, v, size.text_heads, hidden)
            y = norm(f"{layer}.{name}.output.LayerNorm", y + linear(f"{layer}.{name}.output.dense", z), 1e-12)
        z = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", y)))
        y = norm(f"{layer}.output.LayerNorm", y + z, 1e-12)
    reward = y[:, 0]
    for number in (0, 2, 4, 6, 7):
        reward = linear(f"mlp.layers.{number}", reward)
    return (reward[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_is_blip_with_a_head(clip_folder):
    tensors, tokenizer = random_file(SIZE), AutoTokenizer.from_pretrained(clip_folder)
    network = build(tensors, tokenizer, SIZE, "file")
    prompts = ["a red circle", "a", "a blue square left right"]
    frames = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    expected = plain_reward(tensors, SIZE, network.preprocess(frames), tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(network(frames, prompts), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05
    one = network(frames[:1], ["a " * 60])
    torch.testing.assert_close(one, network(frames[:1], ["a " * 33]))  # with both ends 35 tokens


def test_layers_are_those_of_the_file():
    """The official sizes, on no memory: every tensor of the file has its place, and every place its tensor."""
    with torch.device("meta"):
        network = ImageReward(BlipSize(), None)
    shapes = {k: v for k, v in official(BlipSize()).items() if "_proj." not in k and "position_ids" not in k}
    assert sum(p.numel() for p in network.parameters()) == sum(math.prod(s) for s in shapes.values())
    assert len(list(network.parameters())) == len(shapes)


def test_mean_over_frames(pairs, clip_folder):
    network = build(random_file(SIZE), AutoTokenizer.from_pretrained(clip_folder), SIZE, "file")
    batch = pairs(3, frames=7)  # 21 frames: two chunks
    metric = ImageRewardMetric(network, "ImageReward")
    metric.update(batch)
    result = metric.compute()
    for row, index in enumerate(batch.index.tolist()):
        expected = network(batch.references[row] / 255, [batch.prompts[row]] * 7).mean()
        found = result["per_sample_reference"][result["index"].tolist().index(index)]
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


def test_other_files_are_refused(clip_folder, offline, tmp_path):
    tensors, tokenizer = random_file(SIZE), AutoTokenizer.from_pretrained(clip_folder)
    del tensors["blip.visual_encoder.blocks.1.attn.qkv.bias"]
    with pytest.raises(UserError, match=r"another network.*layers\.1\.self_attn\.qkv\.bias"):
        build(tensors, tokenizer, SIZE, "file")
    torch.save(tensors, tmp_path / "small.pt")
    with pytest.raises(UserError, match=r"tokenizer of ImageReward.*cannot be loaded.*metric=pick_score"):
        load_image_reward(str(tmp_path / "small.pt"), str(tmp_path))

"""Official checkpoints for tests: small ones with the originals' weights, and full-sized ones that take no room."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from viditq.models.stdit import STDiT

GOLDEN = Path(__file__).parent / "data" / "golden"


def stored(name: str) -> dict[str, Tensor]:
    """The weights of the small `stdit` or `pixart`, under their official names (qkv merged)."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}


def real_shapes(kind: str) -> dict[str, list[int]]:
    """Names and shapes of the real checkpoint: stdit_merged, stdit_split or pixart_alpha."""
    shapes = json.loads((GOLDEN / "official_shapes.json").read_text())[kind]
    blocks = {f"blocks.{i}.{k}": v for i in range(28) for k, v in shapes["each of 28 blocks"].items()}
    return shapes["once"] | blocks


def write_real(kind: str, path: Path, **changes: Tensor | None) -> Path:
    """A .pth with the real names and shapes, every tensor one number seen many times. changes: None removes one."""
    tensors = {k: torch.full((1,), 0.5).expand(v) for k, v in real_shapes(kind).items()}
    tensors |= {k: v for k, v in changes.items() if v is not None}
    torch.save({k: v for k, v in tensors.items() if k not in changes or changes[k] is not None}, path)
    return path


TINY = {"sample_size": 8, "num_frames": 4, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 24}
TINY |= {"caption_channels": 96, "max_caption_tokens": 120}  # what the text encoder of tiny_video makes


def tiny_stdit() -> STDiT:
    """A random denoiser that fits the other parts of tiny_video: 4 frames of 32 x 32."""
    torch.manual_seed(0)
    model = STDiT(**TINY)
    model.y_embedder.y_embedding.normal_()
    return model.eval().requires_grad_(False)


def write_tiny_opensora(path: Path) -> Path:
    """Its official checkpoint, qkv merged."""
    model = tiny_stdit()
    ours = model.state_dict()
    queries = [k for k in ours if ".q." in k]
    merged = {k.replace(".q.", ".qkv."): torch.cat([ours[k.replace(".q.", f".{p}.")] for p in "qkv"]) for k in queries}
    rest = {k: v for k, v in ours.items() if not any(f".{p}." in k for p in "qkv")}
    tables = {"pos_embed": model.pos_embed, "pos_embed_temporal": model.pos_embed_temporal}
    torch.save(rest | tables | merged, path)
    return path

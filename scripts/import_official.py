"""Turn an official checkpoint into a folder in the diffusers layout, which model.path takes.

    python scripts/import_official.py opensora_v1 OpenSora-v1-HQ-16x512x512.pth --parts PixArt-XL-2-1024-MS --out models/opensora_v1
    python scripts/import_official.py pixart_alpha PixArt-XL-2-1024-MS.pth --parts PixArt-XL-2-1024-MS --out models/pixart
    python scripts/import_official.py pixart_sigma PixArt-Sigma-XL-2-1024-MS.pth --parts pixart_sigma_sdxlvae_T5_diffusers --out models/sigma

The checkpoint holds the denoiser only. --parts is a folder on this machine that holds the rest as a diffusers folder
does: vae/, and text_encoder/ and tokenizer/ unless embeddings made before will be used. Its files are linked, not copied.
"""  # noqa: E501

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from viditq.errors import UserError
from viditq.models.adapter import DTYPES
from viditq.models.official import TABLES, build_from, check_tables, read_checkpoint
from viditq.models.official_opensora import opensora_config, opensora_names
from viditq.models.official_pixart import pixart_config, pixart_names
from viditq.models.samplers import make_sampler
from viditq.models.stdit import STDiT

PIXART: tuple[Any, ...] = (diffusers.PixArtTransformer2DModel, pixart_config, pixart_names, "dpm_solver")
KINDS: dict[str, tuple[Any, ...]] = {  # pipeline, model, configuration, names, sampler
    "opensora_v1": ("OpenSoraPipeline", STDiT, opensora_config, opensora_names, "ancestral"),
    "pixart_alpha": ("PixArtAlphaPipeline", *PIXART),
    "pixart_sigma": ("PixArtSigmaPipeline", *PIXART),
}
PARTS = {  # what all three pipelines have beside the denoiser
    "tokenizer": ("transformers", "T5Tokenizer"),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def convert(args: argparse.Namespace, config: Callable[..., dict[str, Any]], names: Any, cls: Any) -> Any:
    """The denoiser, in the wanted dtype, from the checkpoint."""
    tensors = read_checkpoint(args.checkpoint)
    frames = {"num_frames": args.num_frames} if cls is STDiT else {}
    settings = config(tensors, num_heads=args.num_heads, size=args.size, position_scale=args.position_scale, **frames)
    ours = names(tensors)
    if args.dtype is not None:
        ours = {name: tensor.to(DTYPES[args.dtype]) for name, tensor in ours.items()}
    model = build_from(cls, settings, ours, args.checkpoint)
    if args.position_scale is None:
        computed = {name.rpartition(".")[2]: b for name, b in model.named_buffers() if name.endswith(TABLES)}
        check_tables(computed, tensors, args.checkpoint)
    print(
        f"{len(tensors)} tensors of {args.checkpoint.name} are {cls.__name__}'s {len(model.state_dict())}, all of them"
    )
    print("configuration: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    return model


def parts_of(folder: Path) -> dict[str, tuple[str, str]]:
    """Component -> (library, class) of what the folder of --parts offers; raises UserError without a VAE."""
    found = {name: which for name, which in PARTS.items() if (folder / name).is_dir()}
    if "vae" not in found:
        raise UserError(f"{folder} holds no vae/. Give a folder with vae/, and text_encoder/ and tokenizer/ beside it.")
    return found


def link(source: Path, target: Path, copy: bool) -> None:
    """Bring every file of a component along."""
    for file in (p for p in sorted(source.rglob("*")) if p.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copyfile(file, place)
        else:
            place.symlink_to(file.resolve())


def write(args: argparse.Namespace) -> None:
    """The whole folder, under a temporary name until it is complete."""
    pipeline, cls, config, names, sampler = KINDS[args.kind]
    if args.out.exists():
        raise UserError(f"{args.out} exists already. Remove it, or give another --out.")
    parts = parts_of(args.parts)
    model, scheduler = convert(args, config, names, cls), make_sampler(sampler)
    temporary = args.out.with_name(f".{args.out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary / "transformer")
        scheduler.save_pretrained(temporary / "scheduler")
        for name in parts:
            link(args.parts / name, temporary / name, args.copy)
        index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
        index |= {name: parts.get(name, (None, None)) for name in PARTS}
        index["transformer"] = [cls.__module__ if cls is STDiT else "diffusers", cls.__name__]
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        temporary.rename(args.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    absent = [name for name in PARTS if name not in parts]
    print(f"written: {args.out}" + (f" (without {' and '.join(absent)}: give data.embeds)" if absent else ""))
    print(f"use it: python run.py model={args.kind} model.path={args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("checkpoint", type=Path, help="the official .pth (or .safetensors) file")
    parser.add_argument("--parts", type=Path, required=True, help="a diffusers folder with the other components")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must not exist yet")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: the checkpoint's)")
    parser.add_argument("--copy", action="store_true", help="copy the other components instead of linking them")
    parser.add_argument("--size", type=int, help="pixels; default: as the stored position table says")
    parser.add_argument("--num-frames", type=int, help="Open-Sora; default: as the stored position table says")
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--position-scale", type=float, help="default: size / 512; given, the table is not compared")
    args = parser.parse_args()
    try:
        with torch.no_grad():
            write(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

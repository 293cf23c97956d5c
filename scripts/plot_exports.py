"""Draw what other programs make of the same quantized models, each in a process of its own.

    python scripts/plot_exports.py --out docs/deploy.png
    python scripts/plot_exports.py --torchao PYTHON --kitchen PYTHON      # interpreters that have these packages

tiny_video by `viditq.load_quantized`, by diffusers after `import viditq`, by diffusers with torchao and without viditq,
and imported back from torchao's folder; tiny_image likewise by comfy-kitchen's arithmetic on a ComfyUI file, and
imported back from that. Same prompts, same noise. What is not installed is left out, with a line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
MODELS: dict[str, dict[str, Any]] = {
    "tiny_video": {
        "recipe": ["quant=w8a8", "quant/format@quant.weight=int8_channel_symmetric"],
        "prompts": [
            "a small red circle moving left on a blue background",
            "a large green square moving up on a black background",
            "a small yellow triangle moving right on a white background",
        ],
        "targets": {"diffusers": "", "torchao": ""},
    },
    "tiny_image": {
        "recipe": ["experiment=w8a8_sym_convrot"],
        "prompts": ["a red circle", "a small green square", "a blue triangle"],
        "targets": {"comfyui": ".safetensors"},
    },
}
ROWS = [  # title, model, how it is loaded, from what, package that it needs
    ("float", "tiny_video", "float", None, None),
    ("viditq.load_quantized", "tiny_video", "viditq", "artifact", None),
    ("diffusers + import viditq", "tiny_video", "diffusers", "diffusers", None),
    ("diffusers + torchao alone", "tiny_video", "torchao", "torchao", "torchao"),
    ("torchao's folder, imported", "tiny_video", "imported", "torchao", None),
    ("float", "tiny_image", "float", None, None),
    ("viditq.load_quantized", "tiny_image", "viditq", "artifact", None),
    ("comfy-kitchen's arithmetic", "tiny_image", "kitchen", "comfyui", "comfy_kitchen"),
    ("ComfyUI's file, imported", "tiny_image", "imported", "comfyui", None),
]


# In a process of its own ----------------------------------------------------------------------------------------------


def sample(job: dict[str, Any]) -> None:
    """Write the samples of one row, [prompts, frames, H, W, 3] in 0 .. 1."""
    import torch

    pipeline = load(job["how"], job["place"], job["model"])
    assert job["how"] != "torchao" or "viditq" not in sys.modules
    pipeline.set_progress_bar_config(disable=True)
    samples = []
    for seed, prompt in enumerate(job["prompts"]):
        generator = torch.Generator().manual_seed(seed)
        out = pipeline(prompt, generator=generator, output_type="np", **job["settings"])[0]
        samples.append(np.asarray(out).reshape(-1, *np.asarray(out).shape[-3:]))
    np.save(job["out"], np.stack(samples))


def load(how: str, place: str, model: str) -> Any:
    """A pipeline; how: see ROWS."""
    if how in ("diffusers", "torchao"):
        import torch

        if how == "diffusers":
            import viditq  # lets diffusers know the method
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(place, dtype=torch.float32)
    import viditq

    if how == "float":
        from viditq.importing.float_model import float_model

        return float_model(model).load_complete()
    if how == "viditq":
        return viditq.load_quantized(place)
    pipeline = viditq.load_quantized(place, model=model)
    return with_kitchen(pipeline, place) if how == "kitchen" else pipeline


def with_kitchen(pipeline: Any, file: str) -> Any:
    """Its Linears computed by comfy-kitchen from the file's own tensors, as ComfyUI does."""
    import comfy_kitchen
    import torch
    from safetensors.torch import load_file

    from viditq.export.releases import release_of
    from viditq.quant.execution.linear import quant_linears

    tensors, layers = load_file(file), quant_linears(pipeline.transformer)
    release = release_of(type(pipeline.transformer).__name__)
    origins = release.origins([f"{layer}.weight" for layer in layers])
    for target, origin in origins.items():
        name, first = target.removesuffix(".weight"), 0
        marker = json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist()))
        rotation = {key: value for key, value in marker.items() if key.startswith("convrot")}
        for part in origin.names:
            layer = layers[part.removesuffix(".weight")]
            rows = slice(first, first + layer.out_features)
            codes, scale = tensors[target][rows], tensors[f"{name}.weight_scale"][rows]

            def forward(
                x: Any, codes: Any = codes, scale: Any = scale, layer: Any = layer, told: Any = rotation
            ) -> Any:
                flat = x.reshape(-1, x.shape[-1])
                with comfy_kitchen.use_backend("eager"):
                    out = comfy_kitchen.int8_linear(flat, codes, scale, layer.bias, torch.float32, **told)
                return out.view(*x.shape[:-1], -1)

            layer.forward = forward  # type: ignore[method-assign]
            first = rows.stop
    return pipeline


# In this one ----------------------------------------------------------------------------------------------------------


def made(model: str, work: Path) -> dict[str, Path]:
    """The artifact, and what it is exported as."""
    run, told = work / model, MODELS[model]
    command = ["run.py", f"model={model}", *told["recipe"], "stages=[prompts,calibrate,quantize]", "logger=none"]
    call([sys.executable, *command, f"hydra.run.dir={run}", f"cache_dir={work}/cache"])
    places = {"artifact": run / "quantized"}
    for target, suffix in told["targets"].items():
        places[target] = work / f"{model}_{target}{suffix}"
        words = ["-m", "viditq", "export", str(run), "--to", target, "--out", str(places[target])]
        call([sys.executable, *words])
    return places


def call(words: list[str], **environment: str) -> None:
    """Run it from the project's folder; what it says is shown where it fails."""
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def has(python: str, package: str) -> bool:
    """Whether an interpreter finds a package."""
    return not subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode


def settings_of(model: str) -> dict[str, Any]:
    """Arguments of the pipeline's call that diffusers does not know by itself."""
    from viditq.importing.float_model import float_model
    from viditq.models.generate import text_settings
    from viditq.models.registry import find_class

    adapter = float_model(model)
    return text_settings(adapter, find_class(adapter.pipeline))


def psnr(one: Any, other: Any) -> str:
    """Of a row against the one that viditq itself makes."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return "equal to the bit" if not error else f"{-10 * np.log10(error):.1f} dB"


def draw(found: dict[int, Any], out: Path) -> None:
    """The middle frame of each clip, and how near each row is to viditq's own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = {model: [i for i, row in enumerate(ROWS) if row[1] == model and i in found] for model in MODELS}
    height, wide = max(map(len, columns.values())), max(len(told["prompts"]) for told in MODELS.values())
    figure, axes = plt.subplots(height, len(columns) * wide, figsize=(1.6 * len(columns) * wide, 1.75 * height))
    for axis in axes.flat:
        axis.axis("off")
    for side, (model, rows) in enumerate(columns.items()):
        own = found[next(i for i in rows if ROWS[i][2] == "viditq")]
        for place, i in enumerate(rows):
            title = ROWS[i][0] if found[i] is own else f"{ROWS[i][0]}: {psnr(found[i], own)}"
            for column, frames in enumerate(found[i]):
                axis = axes[place, side * wide + column]
                axis.imshow(frames[len(frames) // 2].clip(0, 1), interpolation="nearest")
                if not column:
                    axis.set_title(f"{model}, {title}" if not place else title, loc="left", fontsize=8)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(out)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/deploy.png"), help="the picture")
    parser.add_argument("--torchao", default=sys.executable, metavar="PYTHON", help="with torchao and diffusers")
    parser.add_argument("--kitchen", default=sys.executable, metavar="PYTHON", help="with comfy-kitchen and viditq")
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.sample:
        return sample(json.loads(args.sample))
    pythons = {"torchao": args.torchao, "comfy_kitchen": args.kitchen}
    found: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        places = {model: made(model, work) for model in MODELS}
        for i, (title, model, how, source, package) in enumerate(ROWS):
            python = pythons.get(package or "", sys.executable)
            if package is not None and not has(python, package):
                print(f"left out: {title} ({python} has no {package})")
                continue
            place = str(places[model][source]) if source else ""
            settings = settings_of(model) if how in ("diffusers", "torchao", "float") else {}
            job = {"how": how, "model": model, "place": place, "settings": settings, "out": f"{folder}/{i}.npy"}
            job |= {"prompts": MODELS[model]["prompts"]}
            call([python, str(Path(__file__).resolve()), "--sample", json.dumps(job)], PYTHONPATH=path_for(how))
            found[i] = np.load(f"{folder}/{i}.npy")
        draw(found, args.out)


def path_for(how: str) -> str:
    """Where modules are looked for; torchao alone is shown without viditq."""
    given = os.environ.get("PYTHONPATH", "")
    return "" if how == "torchao" else os.pathsep.join(filter(None, [str(ROOT), given]))


if __name__ == "__main__":
    main()

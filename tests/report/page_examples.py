"""Contents for the report page: moving shapes, a degraded copy as the quantized model's, and plausible numbers."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from viditq.data.moving_shapes import draw_scenes, render
from viditq.report.content import Machine, PageContent, Pair
from viditq.report.plan_view import summarize_plan

LABELS: dict[str, dict[str, Any]] = {
    "psnr": {"label": "PSNR", "unit": "dB", "higher_is_better": True},
    "relative_l2": {"label": "relative L2", "unit": "", "higher_is_better": False},
    "clipsim": {"label": "CLIPSIM (moving-shapes CLIP)", "unit": "", "higher_is_better": True},
    "motion": {"label": "motion magnitude", "unit": "px/frame", "higher_is_better": None},
    "fvd": {"label": "FVD (moving-shapes features)", "unit": "", "higher_is_better": False},
}
VERDICTS: dict[str, dict[str, Any]] = {
    "psnr": {
        "verdict": "differs",
        "kind": "fidelity",
        "against": "bfloat16",
        "value": 35.4988,
        "interval": [34.41, 36.52],
        "float": None,
        "difference": -14.2,
        "difference_interval": [-15.4, -13.1],
        "noise": 1.1,
        "floors": {"seed": 11.92, "bfloat16": 49.7},
        "reason": "35.50 dB is 14.20 dB below what float in bfloat16 reaches (49.70 dB); noise moves it by 1.1 dB.",
    },
    "clipsim": {
        "verdict": "equal within noise",
        "kind": "quality",
        "value": 91.026,
        "interval": [89.8, 92.2],
        "float": 91.113,
        "difference": -0.086,
        "difference_interval": [-0.31, 0.12],
        "noise": 0.42,
        "floors": {"seed": 90.85, "bfloat16": 91.11},
        "reason": "The interval of the difference, -0.31 to 0.12, holds zero.",
    },
    "motion": {
        "verdict": "better",
        "kind": "quality",
        "value": 1.207,
        "interval": [1.12, 1.29],
        "float": 1.214,
        "difference": 0.081,
        "difference_interval": [0.02, 0.14],
        "noise": 0.015,
        "floors": {"seed": 1.23, "bfloat16": 1.214},
        "reason": "0.081 px/frame above float, beyond the 0.015 of noise.",
    },
    "fvd": {
        "verdict": "equal within noise",
        "kind": "distribution",
        "value": 2.9016,
        "interval": None,
        "float": None,
        "difference": None,
        "difference_interval": None,
        "noise": None,
        "floors": {"seed": 3.4, "bfloat16": None},
        "reason": "2.90 is below the 3.40 of float with another seed.",
    },
}
ROLES = {"spatial_attention": 4, "cross_attention": 4, "temporal_attention": 4, "mlp": 2}
EDGES = [0.0, 0.5, 1.0]


def make_errors(num_blocks: int = 3, num_buckets: int = 20, num_steps: int = 12) -> dict[str, Any]:
    """errors.json of a made-up network; buckets that none of `num_steps` steps reaches hold null."""
    generator = torch.Generator().manual_seed(0)
    reached = {min(int(num_buckets * (i + 1) / num_steps - 1e-9), num_buckets - 1) for i in range(num_steps)}

    def levels(values: Tensor) -> list[float | None]:
        return [float(v) if i in reached else None for i, v in enumerate(values)]

    place = torch.linspace(0, 1, num_buckets)
    layers = {}
    for role, count in ROLES.items():
        for block in range(num_blocks):
            for i in range(count):
                level = 0.02 + 0.09 * torch.rand((), generator=generator)
                error = level * (1.6 - place) + 0.004 * torch.rand(num_buckets, generator=generator)
                high = (2 + 4 * torch.rand((), generator=generator)) * (1 + 0.4 * place**2)
                layers[f"transformer_blocks.{block}.{role}.to_{i}"] = {
                    "role": role,
                    "weight_bits": [4, 4 if i else 8],
                    "activation_bits": [8, 8],
                    "relative_error": levels(error),
                    "total": float(error.mean()),
                    "minimum": levels(-0.8 * high),
                    "maximum": levels(high),
                    "amax": levels(high),
                }
    whole = levels(0.05 + 0.12 * (1 - place) ** 2)
    edges = [float(i) / num_buckets for i in range(num_buckets + 1)]
    return {"num_prompts": 8, "bucket_edges": edges, "denoiser": {"relative_error": whole}, "layers": layers}


def make_incoherence(roles: dict[str, str]) -> dict[str, Any]:
    """incoherence.json of these layers (name -> role); the last one was never called."""
    generator = torch.Generator().manual_seed(1)
    layers: dict[str, Any] = {}
    for name, role in roles.items():
        high = 5 + 40 * float(torch.rand((), generator=generator)) ** 3
        values = {"raw": high, "scaled": 3 + high / 2, "rotated": 5 + high / 20, "both": 4.5 + high / 30}
        layers[name] = {"role": role, "activation": values, "weight": {k: 3 + v / 3 for k, v in values.items()}}
    layers[list(roles)[-1]].update(activation=None, weight=None)
    return {"stage": "calibrate", "num_prompts": 16, "max_rows": 160, "alpha": 0.5, "layers": layers}


def make_speed(layers: dict[str, int] | None = None, compiled: bool = False) -> dict[str, Any]:
    """speed.json: float32 90 ms, bfloat16 60 ms, quantized 30 ms; compiled ones a tenth faster."""
    took = {
        "float": (0.09, "float32", 40e6),
        "bfloat16": (0.06, "bfloat16", 20e6),
        "quantized": (0.03, "float32", 10e6),
    }
    candidates = {}
    for end in ("", "_compiled")[: 1 + compiled]:
        for name, (seconds, dtype, weights) in took.items():
            seconds *= 0.9 if end else 1.0
            spread = {"median": seconds, "low": 0.9 * seconds, "high": 1.2 * seconds}
            shown = {"dtype": dtype, "compiled": bool(end), "seconds": spread}
            candidates[name + end] = {**shown, "weights_bytes": int(weights), "step_bytes": 2_000_000 if end else None}
    machine = {"cpu": "AMD EPYC 9R45", "cores": 2, "threads": 1, "isa": ["avx2"], "gpu": None, "torch": "2.13.0"}
    backend = {"requested": "auto", "layers": {"native": 40} if layers is None else layers}
    return {"backend": backend, "batch_size": 8, "rounds": 10, "machine": machine, "candidates": candidates}


def make_plan(layers: list[str]) -> dict[str, Any]:
    """plan.json for `layers`: every first one of a role in more bits above noise level 0.5."""
    specs = {name: {"weight": {"bits": bits}, "activation": {"bits": 8}} for name, bits in (("w4a8", 4), ("w8a8", 8))}
    return {
        "edges": EDGES,
        "schemes": specs,
        "layers": {n: ["w4a8", "w4a8" if n[-1] != "0" else "w8a8"] for n in layers},
    }


def make_metrics(prompts: int) -> dict[str, Any]:
    """metrics.json with one verdict of each kind, and one metric that has none."""
    return {
        "metrics": {"psnr": 35.4988, "relative_l2": None, "clipsim": 91.026, "motion": 1.207, "fvd": 2.9016},
        "standard_errors": {"psnr": 0.54, "relative_l2": None, "clipsim": 0.63, "motion": 0.04, "fvd": None},
        "float_metrics": {"clipsim": 91.113, "motion": 1.214},
        "labels": LABELS,
        "model": "moving shapes",
        "experiment": "w4a8",
        "seed": 0,
        "average_weight_bits": 4.98360,
        "average_activation_bits": 8.49733,
        "size_bytes": 5321585,
        "float_size_bytes": 9058240,
        "prompts": prompts,
        "seconds": {
            "prompts": 1.4,
            "reference": 32.6,
            "calibrate": 5.8,
            "quantize": 0.5,
            "generate": 31.4,
            "evaluate": 3.9,
        },
        "noise_floor": {"num_prompts": 16, "seed": 1, "dtype": "bfloat16"},
        "verdict": VERDICTS,
        "fingerprint": "3fc387206c691dd8",
    }


def degrade(clips_BFCHW: Tensor, generator: torch.Generator, amount: float = 0.06) -> Tensor:
    """Coarser colours and smooth noise, more of it from clip to clip."""
    shape = (*clips_BFCHW.shape[:3], clips_BFCHW.shape[3] // 4, clips_BFCHW.shape[4] // 4)
    noise = torch.randn(shape, generator=generator).repeat_interleave(4, -1).repeat_interleave(4, -2)
    strength = torch.linspace(amount, 0.15 * amount, len(clips_BFCHW)).view(-1, 1, 1, 1, 1)
    return ((clips_BFCHW * 15).round() / 15 + strength * noise).clamp(0, 1)


def make_content(
    count: int = 6, num_frames: int = 8, enlarge: int = 1, prompts: list[str] | None = None
) -> PageContent:
    """A whole page of `count` moving shapes, `enlarge` x 32 pixels wide; one frame makes it an image model."""
    generator = torch.Generator().manual_seed(0)
    scenes = draw_scenes(count, generator)
    clean = render(scenes, generator, num_frames).repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    references, samples = ((255 * clips).round().byte() for clips in (clean, degrade(clean, generator)))
    prompts = prompts or [scene.caption(num_frames > 1) for scene in scenes]
    error = (references.float() - samples.float()).pow(2).flatten(1).mean(1)
    scores = {
        "psnr": (20 * (255 / error.sqrt()).log10()).tolist(),
        "clipsim": (91 + torch.rand(count, generator=generator)).tolist(),
        "clipsim_float": (91 + torch.rand(count, generator=generator)).tolist(),
    }
    errors = make_errors()
    roles = {name: layer["role"] for name, layer in errors["layers"].items()}
    pairs = [
        Pair(
            index=i,
            prompt=prompts[i],
            clips=lambda i=i: (references[i], samples[i]),
            scores={name: scores[name][i] for name in ("psnr", "clipsim")},
        )
        for i in range(count)
    ]
    return PageContent(
        title="W4A8 on moving shapes",
        experiment="w4a8",
        model="moving shapes",
        seed=0,
        command="python run.py experiment=w4a8 model=tiny_video seed=0",
        versions={"viditq": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.0"},
        machine=Machine("AMD EPYC 9R45", 2, None),
        conditions={stage: ["2 threads of AMD EPYC 9R45"] for stage in make_metrics(count)["seconds"]},
        metrics=make_metrics(count),
        per_prompt={"prompts": prompts, "reference": "outputs/_cache/reference/a958cae32d369486", "metrics": scores},
        errors=errors,
        segments=EDGES,
        plan=summarize_plan(make_plan(list(errors["layers"])), {**roles, "proj_out": "float"}),
        configuration="name: w4a8\nseed: 0\nquant:\n  weight:\n    bits: 4\n",
        pairs=pairs,
        sorted_by="psnr",
        incoherence=make_incoherence(roles),
        speed=make_speed(),
    )


def without_verdict(content: PageContent) -> PageContent:
    """The same run as an older version wrote it."""
    metrics = {k: v for k, v in content.metrics.items() if k not in ("verdict", "noise_floor")}
    return replace(content, metrics=metrics, errors=None, incoherence=None, speed=None)

"""Is a LoRA better merged before quantizing or added to the quantized model? Both against the float model with it.

    python scripts/train_lora.py && python scripts/measure_lora.py  # a quarter of an hour; resumes
    python scripts/measure_lora.py --schemes w4a8 --seeds 0 --picture docs/lora.png

tiny_video on captions of the learned shape that training has not seen, the same noise for all. Prints a markdown
table: PSNR and SSIM to the float model with the LoRA (means over all clips with 95 % intervals), the paired
difference of the two ways, and how often a ring is drawn, in the captioned colour, with the captioned motion.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from viditq import config
from viditq.data.moving_shapes import Scene, labels
from viditq.errors import UserError
from viditq.files import write_tensors
from viditq.loading import load_artifact
from viditq.lora import add_lora, merge_lora
from viditq.metrics.batch import EvalBatch, to_unit
from viditq.metrics.bootstrap import bootstrap_interval
from viditq.metrics.shapes import load_judge
from viditq.models.generate import generate
from viditq.models.text import encode_prompt
from viditq.report.pictures import rows_picture
from viditq.runner import quiet_libraries, run
from viditq.tiny.concept import WORD, concept_caption, concept_scenes, shows_ring

CONF = Path(__file__).parents[1] / "conf"
SCHEMES = {  # name -> overrides of run.py
    "w8a8": ["experiment=w8a8"],
    "w4a8": ["experiment=w4a8"],
    "w4a8_smooth": ["experiment=w4a8_smooth"],
    "w4a8_gptq": ["experiment=q_dit", "bits=w4a8"],
}
QUANTIZE = ["name=lora", "data.num_prompts=1", "stages=[prompts,calibrate,search,quantize]"]
BATCH = 8
FLOAT, FLOAT_WITHOUT = "float with LoRA", "float without"
WAYS = ("merged, quantized", "quantized, added", "quantized without")
SHOWN = 4  # prompts in the picture


def names_of(schemes: Sequence[str]) -> list[str]:
    """All that is sampled, in the table's order."""
    return [FLOAT, FLOAT_WITHOUT, *(f"{scheme}: {way}" for scheme in schemes for way in WAYS)]


def configured(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["model=tiny_video", "logger=none", *overrides])


class Bench:
    """Pipelines and their samples; what is made once lies in `work`."""

    def __init__(self, lora: Path, work: Path, seeds: Sequence[int]) -> None:
        self.lora, self.seeds, self.scenes = lora, seeds, concept_scenes(held_out=True)
        self.work = work / hashlib.sha256(lora.read_bytes()).hexdigest()[:12]
        self.adapter: Any = instantiate(configured([]).model, _convert_="all")
        text = self.adapter.load_text_part()
        self.prompts = [concept_caption(scene) for scene in self.scenes]
        self.embeds = [encode_prompt(self.adapter, text, prompt) for prompt in self.prompts]

    def merged(self) -> Path:
        """The float pipeline with the LoRA in its weights, as a folder."""
        folder = self.work / "merged"
        if not (folder / "model_index.json").is_file():
            pipeline = self.adapter.load_complete()
            add_lora(pipeline, self.lora)
            merge_lora(pipeline)
            pipeline.save_pretrained(folder)
        return folder

    def quantized(self, scheme: str, model: Path | None) -> Any:
        """tiny_video, or the model of a folder, quantized."""
        where = [] if model is None else [f"model.path='{model.resolve()}'"]
        folder = self.work / f"{scheme}_{'base' if model is None else model.name}"
        cache = f"cache_dir='{self.work / 'cache'}'"
        run(configured([*SCHEMES[scheme], *QUANTIZE, cache, *where]), folder)
        return load_artifact(folder / "quantized", "auto", complete=False)

    def pipeline(self, name: str) -> Any:
        """FLOAT, FLOAT_WITHOUT, or a scheme and one of WAYS."""
        scheme, _, way = name.partition(": ")
        merged = self.merged() if way == WAYS[0] else None
        pipeline = self.quantized(scheme, merged) if way else self.adapter.load()
        if name == FLOAT or way == WAYS[1]:
            add_lora(pipeline, self.lora)
        return pipeline

    def samples(self, name: str) -> Tensor:
        """uint8 [B, F, C, H, W], all prompts of each seed."""
        files = {
            s: self.work / "samples" / f"{name.replace(': ', '_').replace(', ', '_')}_{s}.safetensors"
            for s in self.seeds
        }
        missing = {seed: file for seed, file in files.items() if not file.is_file()}
        pipeline = self.pipeline(name) if missing else None
        for seed, file in missing.items():
            starts = range(0, len(self.prompts), BATCH)
            batches = [[*range(len(self.prompts))][start : start + BATCH] for start in starts]
            before = time.process_time()
            clips = [generate(self.adapter, pipeline, [self.embeds[i] for i in b], b, seed) for b in batches]
            write_tensors(file, {"clips": torch.cat(clips)})
            seconds = (time.process_time() - before) / len(self.prompts)
            print(f"sampled: {name}, seed {seed}, {seconds:.2f} s of processor time a clip", file=sys.stderr)
        return torch.cat([load_file(file)["clips"] for file in files.values()])


def as_captioned(clips_BFCHW: Tensor, scenes: list[Scene]) -> list[float]:
    """Shares of clips that show a ring, the captioned colour, and the captioned motion."""
    unit = to_unit(clips_BFCHW)
    with torch.no_grad():
        logits = load_judge("shipped:judge")(unit)
    wanted = labels(scenes)
    right = [(logits[name].argmax(1) == wanted[name]).float().mean().item() for name in ("color", "motion")]
    return [sum(shows_ring(unit, scenes)) / len(scenes), *right]


def spread(values: Tensor, digits: int, sign: str = "") -> str:
    """A mean with its 95 % interval."""
    mean, interval = float(values.mean()), bootstrap_interval(values)
    numbers = [mean] if interval is None else [mean, *interval]
    first, *ends = [f"{number:{sign}.{digits}f}" for number in numbers]
    return f"{first} [{', '.join(ends)}]" if ends else first


def table(clips: dict[str, Tensor], scenes: list[Scene], prompts: list[str], schemes: Sequence[str]) -> str:
    """Markdown; `clips`, `scenes` and `prompts` of all seeds."""
    metrics = {name: instantiate(configured([]).metric[name], _convert_="all") for name in ("psnr", "ssim")}

    def scores(name: str) -> tuple[Tensor, Tensor]:
        batch = EvalBatch(clips[name], clips[FLOAT], prompts, torch.arange(len(prompts)))
        psnr, ssim = (metrics[m].scores(batch)["per_sample"] for m in ("psnr", "ssim"))
        return psnr, ssim

    lines = [
        f"| | PSNR dB | SSIM | {WORD} | colour | motion | PSNR added less merged |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names_of(schemes):
        told = [f"{100 * share:.0f} %" for share in as_captioned(clips[name], scenes)]
        psnr, ssim = scores(name)
        paired = ""
        if name.endswith(WAYS[1]):
            paired = spread(psnr - scores(name.replace(WAYS[1], WAYS[0]))[0], 2, "+")
        near = ["", ""] if name == FLOAT else [spread(psnr, 1), spread(ssim, 4)]
        lines.append(f"| {' | '.join([name, *near, *told, paired])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, default=Path("outputs/lora/pytorch_lora_weights.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("outputs/lora"), help="artifacts and samples")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the noise")
    parser.add_argument("--picture", type=Path, default=Path("outputs/lora/lora.png"))
    args = parser.parse_args()
    if not args.lora.is_file():
        sys.exit(f"error: {args.lora} does not exist: make it with python scripts/train_lora.py, or give --lora.")
    quiet_libraries()
    config.register()
    try:
        bench = Bench(args.lora, args.out, args.seeds)
        clips = {name: bench.samples(name) for name in names_of(args.schemes)}
    except UserError as error:
        sys.exit(f"error: {error}")
    times = len(args.seeds)
    print(table(clips, bench.scenes * times, bench.prompts * times, args.schemes))
    rows = [(name, clips[name][:SHOWN]) for name in names_of(["w4a8"]) if name in clips]
    rows_picture(rows, args.picture, bench.prompts[:SHOWN], "A shape learned by LoRA")
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()

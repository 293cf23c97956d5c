"""The stages of a run; each does only what is missing on disk and leaves a file for the next."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from viditq.data.samples import load_sample, missing_samples, sample_path, save_sample
from viditq.engine.evaluation import Pairs, Results, evaluate
from viditq.engine.sampling import Calibration, Generation, batches_of, load_partial, run_batches
from viditq.errors import UserError
from viditq.experiment import Experiment
from viditq.files import read_json, read_tensors, write_json, write_tensors
from viditq.loading import load_artifact
from viditq.models.text import PromptEmbeds, check_prompts, encode_prompt
from viditq.quant.artifact import save_denoiser, size_bytes
from viditq.quant.calibration import Calibrator
from viditq.quant.convert import linear_names, quantize_denoiser
from viditq.quant.observers import CalibrationStats
from viditq.report.pictures import comparison_gif, comparison_picture
from viditq.run_dir import Cache, RunDir, fingerprint, read_seconds, timed
from viditq.summary import summarize, worst_first

# What of the model a cached output depends on: its weights (by content), not where they lie or how Linears are grouped.
NOT_SAMPLING = ("name", "path", "roles", "keep_float")
OF_TEXT = ("pipeline", "dtype", "encode", "encode_outputs", "max_tokens")


@dataclass
class Stages:
    """One run's stages as methods, in the order of `viditq.config.STAGES`. Each returns a line saying what it did."""

    experiment: Experiment
    run_dir: RunDir

    def __post_init__(self) -> None:
        self.cache = Cache(self.experiment.cache_dir)

    # Where things are ------------------------------------------------------------------------------------------------

    @cached_property
    def _base_key(self) -> dict[str, Any]:
        model = {k: v for k, v in self.experiment.adapter.to_dict().items() if k not in NOT_SAMPLING}
        return {"model": model, "weights": self.experiment.weights}

    @cached_property
    def embeds_dir(self) -> Path:
        model = {k: self._base_key["model"][k] for k in OF_TEXT}
        return self.cache.entry("prompts", {"model": model, "weights": self.experiment.weights})

    @cached_property
    def reference_dir(self) -> Path:
        key = {**self._base_key, "seed": self.experiment.seed, "prompts": self.experiment.data.prompts}
        return self.cache.entry("reference", key)

    @cached_property
    def stats_dir(self) -> Path:
        e = self.experiment
        prompts = {"calibration_prompts": e.data.calibration_prompts, "batch_size": e.batch_size}
        sizes = {"num_buckets": e.num_buckets, "rows_per_bucket": e.rows_per_bucket}
        return self.cache.entry("stats", {**self._base_key, "seed": e.seed, **prompts, **sizes})

    @property
    def _stats_file(self) -> Path:
        return self.stats_dir / "stats.safetensors"

    def embeds_path(self, prompt: str) -> Path:
        """The cached embeddings of one prompt."""
        return self.embeds_dir / f"{fingerprint({'prompt': prompt})}.safetensors"

    def _load_embeds(self, prompts: list[str]) -> Callable[[int], PromptEmbeds]:
        remedy = "Delete it and run the command again, with the stage prompts."
        return lambda index: read_tensors(self.embeds_path(prompts[index]), remedy)

    # Stages ----------------------------------------------------------------------------------------------------------

    def prompts(self) -> str:
        """Encode every prompt once; the text encoder is freed before the denoiser is loaded."""
        data, adapter = self.experiment.data, self.experiment.adapter
        wanted = dict.fromkeys([*data.prompts, *data.calibration_prompts])
        missing = [p for p in wanted if not self.embeds_path(p).is_file()]
        if not missing:
            return f"{len(wanted)} prompts already encoded"
        with timed(self.run_dir.path, "prompts"):
            pipeline = adapter.load_text_part()
            check_prompts(adapter, pipeline, missing)
            for prompt in missing:
                write_tensors(self.embeds_path(prompt), encode_prompt(adapter, pipeline, prompt))
        return f"{len(missing)} of {len(wanted)} prompts encoded"

    def reference(self) -> str:
        """Generate the evaluation prompts with the float model."""
        return self._generate(self.reference_dir, "float", lambda: self.experiment.adapter.load(), self.reference_dir)

    def calibrate(self) -> str:
        """Observe the float model on the calibration prompts; resumes after the last finished batch."""
        if not self.experiment.plan.needs_stats:
            return "not needed: this recipe takes no statistics"
        already = self._stats_file.is_file()
        self.statistics()
        what = "already done" if already else f"{len(self.experiment.data.calibration_prompts)} prompts observed"
        return f"{what} ({self._stats_file})"

    def statistics(self) -> CalibrationStats:
        """The calibration statistics, from disk or by calibrating now."""
        if not self._stats_file.is_file():
            with timed(self.stats_dir, "calibrate"):
                partial = self.stats_dir / "partial.safetensors"
                self._calibrate(partial).save(self._stats_file)
                partial.unlink(missing_ok=True)
        return CalibrationStats.load(self._stats_file)

    def quantize(self) -> str:
        """Resolve the plan, fit transforms, quantize the weights, write the artifact."""
        folder = self.run_dir.artifact
        if folder.is_dir():
            return f"already done ({folder})"
        with timed(self.run_dir.path, "quantize"):
            e, plan = self.experiment, self.experiment.plan
            stats = self.statistics() if plan.needs_stats else None
            denoiser = getattr(e.adapter.load(), e.adapter.denoiser)
            if e.quant.float_dtype is not None:
                denoiser.to(getattr(torch, e.quant.float_dtype))
            numel = {name: m.weight.numel() for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
            inputs = {name: m.in_features for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
            float_size = sum(2 * p.numel() for p in denoiser.parameters())
            quantize_denoiser(denoiser, plan, stats, e.backend, e.adapter.timestep_scale)
            bits = {
                "average_weight_bits": plan.average_weight_bits(numel),
                "average_activation_bits": plan.average_activation_bits(inputs),
                "float_size_bytes": float_size,
            }
            meta = {
                "model": e.adapter.to_dict(),
                "weights": self.experiment.weights,
                "float_dtype": e.quant.float_dtype,
                **bits,
            }
            save_denoiser(folder, denoiser, plan, {**meta, "stats": self.stats_dir.name if stats else None})
        return f"{len(plan.layers)} of {len(numel)} Linears, {size_bytes(folder) / 1e6:.2f} MB ({folder})"

    def generate(self) -> str:
        """Reload the artifact and generate the same prompts from the same noise."""
        return self._generate(self.run_dir.samples, "quantized", self._load_quantized, self.run_dir.path)

    def evaluate(self) -> str:
        """Compare the pairs; writes metrics.json and per_prompt.json."""
        e = self.experiment
        if self.run_dir.metrics.is_file():
            return f"already done ({self.run_dir.metrics})"
        with timed(self.run_dir.path, "evaluate"):
            count = len(e.data.prompts)
            for folder in (self.reference_dir, self.run_dir.samples):
                if gone := missing_samples(folder, count, e.adapter.modality):
                    raise UserError(f"{len(gone)} samples are missing in {folder}. Run the stages before evaluate too.")
            metrics = e.make_metrics()
            batches = batches_of(count, 16)
            pairs = Pairs(self.run_dir.samples, self.reference_dir, e.data, e.adapter.modality, batches)
            results = evaluate(e.make_trainer(), metrics, pairs)
        described = {
            name: {"label": m.name, "unit": m.unit, "higher_is_better": m.higher_is_better}
            for name, m in metrics.items()
        }
        self._write_metrics(results, described)
        return f"{len(results)} metrics ({self.run_dir.metrics})"

    def report(self) -> str:
        """Draw the float model above and the quantized below, worst pair first."""
        path = self.run_dir.picture
        if path.is_file():
            return f"already done ({path})"
        if not self.run_dir.per_prompt.is_file():
            raise UserError(f"{self.run_dir.per_prompt} is missing. Run the stage evaluate before report.")
        with timed(self.run_dir.path, "report"):
            e, count = self.experiment, len(self.experiment.data.prompts)
            per_prompt = read_json(self.run_dir.per_prompt)["metrics"]
            scores, name = worst_first(per_prompt, read_json(self.run_dir.metrics)["labels"])
            folders = (self.run_dir.samples, self.reference_dir)
            paths = [[sample_path(folder, i, e.adapter.modality) for i in range(count)] for folder in folders]
            samples, references = (torch.stack([load_sample(p) for p in group]) for group in paths)
            title = f"{e.name} on {e.adapter.name}, seed {e.seed}"
            if e.adapter.modality == "video":
                comparison_gif(samples, references, scores, path.with_suffix(".gif"), name["higher_is_better"])
            comparison_picture(samples, references, e.data.prompts, scores, path, title, **name)
        return f"picture drawn ({path})"

    # Parts -----------------------------------------------------------------------------------------------------------

    def _load_quantized(self) -> Any:
        return load_artifact(self.run_dir.artifact, backend=self.experiment.backend, complete=False)

    def _generate(self, folder: Path, what: str, load: Callable[[], Any], seconds_dir: Path) -> str:
        e, count = self.experiment, len(self.experiment.data.prompts)
        missing = set(missing_samples(folder, count, e.adapter.modality))
        if not missing:
            return f"all {count} {what} samples already there ({folder})"
        self.run_dir.forget_evaluation()

        def sink(index: int, clip: torch.Tensor) -> None:
            if index in missing:
                save_sample(sample_path(folder, index, e.adapter.modality), clip)

        with timed(seconds_dir, "reference" if what == "float" else "generate"):
            batches = [b for b in batches_of(count, e.batch_size) if missing & set(b)]
            module = Generation(e.adapter, load(), self._load_embeds(e.data.prompts), e.seed, sink=sink)
            run_batches(e.make_trainer(), module, batches)
        return f"{len(missing)} of {count} {what} samples generated ({folder})"

    def _calibrate(self, partial: Path) -> CalibrationStats:
        e = self.experiment
        pipeline = e.adapter.load()
        denoiser = getattr(pipeline, e.adapter.denoiser)
        calibrator = Calibrator(
            denoiser, linear_names(denoiser), e.adapter.timestep_scale, e.num_buckets, e.rows_per_bucket
        )
        num_done = 0
        if partial.is_file():
            num_done, state = load_partial(partial)
            calibrator.load_state(state)
        prompts = e.data.calibration_prompts
        batches = batches_of(len(prompts), e.batch_size)[num_done:]
        arguments = (e.adapter, pipeline, self._load_embeds(prompts), e.seed)
        module = Calibration(*arguments, calibrator=calibrator, partial=partial, num_done=num_done)
        run_batches(e.make_trainer(), module, batches)
        return calibrator.stats

    def _write_metrics(self, results: Results, labels: dict[str, Any]) -> None:
        e, folder = self.experiment, self.run_dir.artifact
        summary = summarize(results, labels)
        meta = read_json(folder / "meta.json")
        seconds = {
            **read_seconds(self.reference_dir),
            **read_seconds(self.stats_dir),
            **read_seconds(self.run_dir.path),
        }
        if not self.experiment.plan.needs_stats:
            seconds.pop("calibrate", None)
        per_prompt = {"prompts": e.data.prompts, "reference": str(self.reference_dir.resolve())}
        write_json(self.run_dir.per_prompt, {**per_prompt, "metrics": summary.pop("per_prompt")})
        write_json(
            self.run_dir.metrics,
            {
                **summary,
                "model": e.adapter.name,
                "experiment": e.name,
                "seed": e.seed,
                "average_weight_bits": meta["average_weight_bits"],
                "average_activation_bits": meta["average_activation_bits"],
                "size_bytes": size_bytes(folder),
                "float_size_bytes": meta["float_size_bytes"],
                "prompts": len(e.data.prompts),
                "seconds": seconds,
                "fingerprint": self.run_dir.fingerprint,
            },
        )

"""Where in the cache the embeddings, float samples, statistics and noise floor of a run lie, by what they depend on."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from viditq.errors import UserError
from viditq.experiment import Experiment
from viditq.models.stored_embeds import read_embeds
from viditq.models.text import PromptEmbeds
from viditq.prompt import key_of, keys_of
from viditq.quant.calibration.row_sample import MOMENT_ROWS, MOMENT_SHARE
from viditq.quant.calibration.statistics import STATS_LAYOUT
from viditq.quant.reconstruction.slots import LAYOUT
from viditq.run_dir import Entry, fingerprint

# What of the model a cached output depends on: its weights (by content), not where they lie or how Linears are grouped.
NOT_SAMPLING = (
    *("name", "path", "revision", "denoiser_path", "denoiser_revision", "fps"),
    *("roles", "keep_float", "float_roles", "guess", "float_denoisers"),
    "calibration_batch_size",  # a key of its own, where it counts
)
UNLESS_GIVEN = (  # younger than what caches hold
    *("scheduler", "scheduler_settings", "variant", "conditions", "vae_tiling"),
)
OF_TEXT = (
    *("pipeline", "dtype", "component_dtypes", "conditioning", "negative_prompt"),
    *("encode", "encode_outputs", "max_tokens", "prompt_tokenizer", "variant"),
)


class CacheEntries:
    """Of one experiment."""

    experiment: Experiment

    @cached_property
    def _base_key(self) -> dict[str, Any]:
        values = self.experiment.adapter.to_dict()
        model = {k: v for k, v in values.items() if k not in NOT_SAMPLING and not (k in UNLESS_GIVEN and not v)}
        return {"model": model, "weights": self.experiment.weights}

    def _entry(self, kind: str, key: Mapping[str, Any]) -> Entry:
        return Entry(self.experiment.cache_dir / kind, key)

    @cached_property
    def embeds(self) -> Entry:
        """Embeddings of prompts."""
        # where the pipeline's own call encodes (with pictures; as it takes no embeddings) all that it is given counts
        whole = bool(self.experiment.adapter.conditions) or self.experiment.adapter.replays
        model = {k: v for k, v in self._base_key["model"].items() if whole or k in OF_TEXT}
        return self._entry("prompts", {"model": model, "weights": self.experiment.weights})

    @cached_property
    def quantized_embeds(self) -> Entry:
        """Embeddings of prompts by the text encoders that this run samples with: quantized ones, where it has them."""
        plans = {name: fingerprint({"json": plan.to_json()}) for name, plan in self.experiment.encoder_plans.items()}
        return self._entry("prompts", {**self.embeds.key, "text_encoders": plans}) if plans else self.embeds

    @cached_property
    def reference(self) -> Entry:
        """The float model's samples of the evaluation prompts."""
        return self.float_samples(self.experiment.seed, None)

    def float_samples(self, seed: int, denoiser_dtype: str | None, nudge: float = 0.0) -> Entry:
        """The same from another seed, with the denoiser in another dtype (None: the model's own), latents nudged."""
        key = {**self._base_key, "seed": seed, "prompts": keys_of(self.experiment.data.prompts)}
        key |= {"denoiser_dtype": denoiser_dtype} if denoiser_dtype else {}
        key |= {"nudge": nudge} if nudge else {}
        return self._entry("reference", key | ({"compile": True} if self.experiment.adapter.compile else {}))

    @cached_property
    def stats(self) -> Entry:
        """Calibration statistics."""
        e = self.experiment
        rows = {"share": MOMENT_SHARE, "of_each": MOMENT_ROWS}
        moments = {"moment_layers": e.plan.moment_layers, "moment_rows": rows} if e.plan.moment_layers else {}
        key = {"rows_per_bucket": e.rows_per_bucket, "layout": STATS_LAYOUT}
        return self._entry("stats", {**self._calibration_key, **key, **moments})

    @cached_property
    def block_inputs(self) -> Entry:
        """Inputs of blocks, of a plan that learns roundings block by block."""
        e = self.experiment
        key = {"blocks": [*e.plan.learned_blocks], "block_input_bytes": e.block_input_bytes, "layout": LAYOUT}
        return self._entry("block_inputs", {**self._calibration_key, **key})

    @property
    def _calibration_key(self) -> dict[str, Any]:
        e = self.experiment
        prompts: dict[str, Any] = {"calibration_prompts": keys_of(e.observed_prompts)}
        prompts |= {"batch_size": e.adapter.calibration_batch_size}
        return {**self._base_key, "seed": e.seed, **prompts, "num_buckets": e.num_buckets}

    @property
    def num_prompts(self) -> int:
        """Number of evaluation prompts."""
        return len(self.experiment.data.prompts)

    @property
    def floor_size(self) -> int:
        """Number of prompts of the noise floor."""
        return self.experiment.floor_size

    @cached_property
    def floors(self) -> dict[str, Entry]:
        """Samples that differ from the reference as the float model does by itself: by seed, bfloat16, latents."""
        e = self.experiment
        if not self.floor_size:
            return {}
        samples = self.float_samples
        floors = {"seed": samples(e.floor_seed, None), "bfloat16": samples(e.seed, e.floor_dtype)}
        return floors | ({"latents": samples(e.seed, None, e.floor_latents)} if e.floor_latents else {})

    @property
    def stats_file(self) -> Path:
        return self.stats.path / "stats.safetensors"

    @cached_property
    def floor_results(self) -> Entry:
        """What the metrics say of the noise floor's samples, set against the reference."""
        keys = {name: entry.path.name for name, entry in self.floors.items()}
        inputs = {"reference": self.reference.path.name, "floors": keys, "num_prompts": self.floor_size}
        return self._entry("noise_floor", {**inputs, "metrics": self.experiment.tracked["metric"]})

    def embeds_path(self, prompt: str, entry: Entry | None = None) -> Path:
        """The cached embeddings of one prompt; entry: of the float encoder (None) or `quantized_embeds`."""
        return (entry or self.embeds).path / f"{fingerprint({'prompt': key_of(prompt)})}.safetensors"

    def load_embeds(self, prompts: list[str], entry: Entry | None = None) -> Callable[[int], PromptEmbeds]:
        """Index of a prompt -> its embeddings; entry: as of `embeds_path`."""
        remedy = "Delete it and run the command again, with the stage prompts."

        def load(index: int) -> PromptEmbeds:
            file = self.embeds_path(prompts[index], entry)
            if not file.is_file():
                raise UserError(f"{prompts[index][:60]!r} is not encoded ({file}). Run the stage prompts before.")
            return read_embeds(file, remedy)

        return load

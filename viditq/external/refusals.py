"""What changes nothing, or cannot be, where another library quantizes; nothing here imports torch."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from viditq.errors import UserError

POLICY = ".ExternalQuantization"
OURS: Mapping[str, Any] = {  # quant.* of our own recipes -> what conf/quant/base.yaml has
    **dict.fromkeys(
        ("weight", "activation", "smoothing", "low_rank", "float_dtype", "correction", "text_encoder", "attention")
    ),
    "rounding": "nearest",
    "segments": [0.0, 1.0],
    "rules": [],
}
MIN_MAX = ("ranges", "activation_ranges")


def is_external(cfg: DictConfig) -> bool:
    """Whether quant.policy is one of conf/quant/external."""
    policy: Any = cfg.quant.get("policy") if OmegaConf.is_dict(cfg.quant) else None
    return OmegaConf.is_dict(policy) and str(policy.get("_target_")).endswith(POLICY)


def check_external(cfg: DictConfig) -> None:
    """Raises UserError for settings of ours that such a run does not read."""
    if not is_external(cfg):
        return
    given: Any = OmegaConf.to_container(cfg.quant, resolve=True)
    changed = [key for key, value in OURS.items() if given.get(key, value) != value]
    changed += [key for key in MIN_MAX if not str((given.get(key) or {}).get("_target_")).endswith(".MinMax")]
    if changed:
        raise UserError(
            f"{', '.join(f'quant.{key}={_short(given[key])}' for key in changed)}: with quant=external/... another "
            "library quantizes, which reads none of our formats, bits, smoothing, rounding, ranges and segments, so "
            "this would change nothing. Leave it (bits=, experiment=) out, or choose another quant=..."
        )
    if cfg.trainer.get("accelerator") == "cpu" and "cpu" not in given["policy"].get("devices", ["cpu"]):
        raise UserError(
            f"quant=external: {given['policy']['library']} in diffusers does not run on a CPU, where this run would "
            f"be. {given['policy'].get('instead', '')}".rstrip()
        )
    if cfg.backend != "auto":
        raise UserError(
            f"backend={cfg.backend}: with quant=external/... the library multiplies, not one of our backends. Leave "
            "it out."
        )
    if cfg.estimate or cfg.fit is not None:
        raise UserError(
            "estimate and fit tell of our own formats, not of those of another library (quant=external/...). Leave "
            "them out, or choose another quant=..."
        )
    if (offload := cfg.trainer.get("offload")) is not None:
        raise UserError(
            f"trainer.offload={offload}: tensors of other libraries (quant=external/...) are not moved to and fro. "
            "Leave it out."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."

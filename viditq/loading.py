"""From an artifact back to a pipeline, without statistics, prompts or the denoiser's float weights."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from viditq.assets import is_hub_id
from viditq.byte_numbers import num_bytes
from viditq.errors import UserError
from viditq.fusion.install import fuse_blocks
from viditq.interop.folder import is_pipeline
from viditq.interop.pipeline import load_exported
from viditq.models.adapter import ModelAdapter
from viditq.models.dtypes import DTYPES
from viditq.models.generate import DtypeBoundary, with_settings
from viditq.models.hub import fetch_whole
from viditq.models.sampler_noise import check_shrinkable, shrink_noise
from viditq.models.text_encoders import build_encoder, encoders_on_disk
from viditq.quant.artifact import load_denoiser, read_meta
from viditq.quant.correction.ptqd import corrections_of, latest_variance
from viditq.quant.execution.denoiser import refuse_to_save
from viditq.quant.execution.linear import quant_linears
from viditq.quant.text_encoder import BACKEND


def load_quantized(
    path: str | Path | Sequence[str | Path],
    backend: str = "auto",
    model_path: str | None = None,
    memory_budget: int | str | None = None,
    revision: str = "main",
    model: str | None = None,
) -> Any:
    """Load a quantized pipeline, ready for `pipeline("a prompt")`.

    path: an artifact (<run>/quantized), the run's folder, a quantized pipeline in diffusers' layout (`viditq
    export --to diffusers`), or the id of one of these on the Hugging Face hub, there of `revision`. backend:
    what multiplies (docs/backends.md): auto = for each layer the fastest that is exact on this CPU; cuda = the same
    on a GPU that the pipeline is moved to; fake = emulation, anywhere; native; portable; triton; scaled_mm. model_path:
    the float pipeline's folder on this machine, for its VAE, text encoder and scheduler, where it is not the one
    recorded. memory_budget: bytes, or such as "1.5GB", that the denoiser's weights may take (on a CPU): they stay
    in their files, and as many layers as fit are kept ready; those of text encoders, which are called once, stay in
    their files until a layer computes; None = all of them are in memory. model: where path is another program's
    file (docs/import.md; of several denoisers, a list of files), the float model that it was made from: a folder,
    an id on the hub, or the name of a yaml of conf/model. The model's settings (steps, guidance, size) are defaults
    of the call. Raises UserError for damaged or missing files, and for a budget that is too small.
    """
    budget = num_bytes(memory_budget)
    if model is not None:
        return _load_imported(path, model, backend, model_path, budget)
    if not isinstance(path, str | Path):
        raise UserError(f"{path} names several places: give one, or with them the float model (model=...).")
    given = str(path)
    folder = artifact_folder(fetch_whole(given, revision) if is_hub_id(given) else path)
    if not is_pipeline(folder):
        return load_artifact(folder, backend, complete=True, model_path=model_path, memory_budget=budget)
    if model_path is not None:
        raise UserError(f"{folder} is a whole pipeline: leave out model_path={model_path!r}.")
    return load_exported(folder, backend, budget)


def artifact_folder(path: str | Path) -> Path:
    """The artifact that a path names: itself, or the one of a run's folder."""
    folder = Path(path).expanduser()
    return folder / "quantized" if (folder / "quantized").is_dir() else folder


def load_artifact(
    folder: Path, backend: str, complete: bool, model_path: str | None = None, memory_budget: int | None = None
) -> Any:
    """The pipeline around an artifact's denoiser; without its text part unless `complete`."""
    meta = read_meta(folder)
    try:
        float_dtype = meta["float_dtype"]
        adapter = ModelAdapter.from_dict(meta["model"] | ({"path": model_path} if model_path is not None else {}))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'meta.json'} is damaged or describes a model this version does not know ({error}). "
            "Delete the folder and quantize again."
        ) from error
    denoiser = load_denoiser(folder, adapter.build_denoiser, backend, memory_budget)[0]
    denoiser.eval().requires_grad_(False)
    fuse_blocks(denoiser)
    if float_dtype not in (None, adapter.dtype):
        DtypeBoundary(denoiser, DTYPES[float_dtype], adapter.torch_dtype, adapter.timestep_argument)
    encoders: dict[str, Any] = {}
    if complete:
        encoders = load_encoders(folder, adapter, meta.get("text_encoders", []), memory_budget is not None)
        encoders |= {} if memory_budget is None else encoders_on_disk(adapter, but=encoders)
    pipeline = adapter.load_complete(denoiser, encoders) if complete else adapter.load(denoiser)
    if meta.get("correction") == "ptqd":
        _tell_sampler(folder, adapter, pipeline, denoiser)
    if quant_linears(denoiser) or meta.get("text_encoders"):
        pipeline.save_pretrained = partial(refuse_to_save, f"a copy of {folder}, and viditq.load_quantized(copy)")
    return with_settings(adapter, pipeline) if complete else pipeline


def _load_imported(
    path: str | Path | Sequence[str | Path], model: str, backend: str, model_path: str | None, budget: int | None
) -> Any:
    """From another program's files, without an artifact in between."""
    if budget is not None:
        raise UserError(
            "memory_budget needs an artifact, whose weights can stay on disk. Write one: viditq import FILE "
            f"--model {model} --out FOLDER, and load that."
        )
    from viditq.importing.artifact import ImportedModel  # brings in Hydra, which nothing else here needs
    from viditq.importing.float_model import float_model

    paths = [path] if isinstance(path, str | Path) else path
    adapter = float_model(model, path=model_path)
    denoiser = ImportedModel(adapter, [Path(one).expanduser() for one in paths]).fill(backend)
    fuse_blocks(denoiser)
    pipeline = adapter.load_complete(denoiser)
    pipeline.save_pretrained = partial(refuse_to_save, "viditq import, which writes an artifact")
    return with_settings(adapter, pipeline)


def load_encoders(folder: Path, adapter: ModelAdapter, names: Iterable[str], on_disk: bool = False) -> dict[str, Any]:
    """The quantized text encoders of an artifact by name, whose weights stay codes until their layers are called.

    on_disk: and in their files, embedding tables too.
    """
    encoders: dict[str, Any] = {}
    for name in names:
        if not (folder / name).is_dir():
            raise UserError(f"{folder} is no whole quantized model: {name} is missing. Run the stage quantize again.")
        encoder: Any = load_denoiser(
            folder / name, partial(build_encoder, adapter, name), BACKEND, 0 if on_disk else None
        )[0]
        encoder.tie_weights()
        encoders[name] = encoder.eval().requires_grad_(False)
    return encoders


def _tell_sampler(folder: Path, adapter: ModelAdapter, pipeline: Any, denoiser: nn.Module) -> None:
    """Let a stochastic sampler add less noise where a corrected denoiser's error adds some."""
    if not check_shrinkable(pipeline.scheduler, adapter.call):
        return
    if any(correction.variance is None for correction in corrections_of(denoiser)):
        raise UserError(
            f"{folder} was corrected without the variance that {type(pipeline.scheduler).__name__}, a stochastic "
            "scheduler, needs (by an earlier version, or for another scheduler). Delete the folder and quantize again."
        )
    # asked for at each step: the pipeline's denoiser may have been replaced by a copy of it
    shrink_noise(pipeline.scheduler, lambda: latest_variance(corrections_of(adapter.denoiser_of(pipeline))))
    pipeline.__deepcopy__ = _refuse_to_copy


def _refuse_to_copy(memo: Any) -> NoReturn:
    raise UserError(
        "A pipeline whose sampler makes up for the error of its denoiser (quant.correction=ptqd) cannot be copied: "
        "sampler and denoiser know each other. Load it a second time with viditq.load_quantized, or copy its denoiser."
    )


def in_dtype(adapter: ModelAdapter, pipeline: Any, dtype: str, cast: bool = True) -> Any:
    """The pipeline with its denoiser computing in `dtype`; noise, text and decoder stay as they are.

    cast: its weights are not in that type yet.
    """
    denoiser = adapter.denoiser_of(pipeline)
    if cast:
        denoiser.to(DTYPES[dtype])
    DtypeBoundary(denoiser, DTYPES[dtype], adapter.torch_dtype, adapter.timestep_argument)
    return pipeline

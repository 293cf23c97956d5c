"""Models named by their hub id, from a cache as the hub's own client lays it out; nothing is downloaded."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from hydra.utils import instantiate

from viditq.assets import SHIPPED, is_hub_id
from viditq.errors import UserError
from viditq.models import hub
from viditq.models.adapter import ModelAdapter
from viditq.models.contents import check_contents

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "somebody/tiny-image"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the shipped image pipeline under an id."""
    repository = tmp_path / "hub" / "models--somebody--tiny-image"
    shutil.copytree(SHIPPED / "tiny_image", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fetch.cache_clear()
    hub._snapshot.cache_clear()
    return repository / "snapshots" / COMMIT


@pytest.fixture
def adapter(configure: Callable[..., Any]) -> ModelAdapter:
    return instantiate(configure("model=tiny_image", "model.num_steps=2", "name=x").model, _convert_="all")


def test_cached_model_loads_without_network(cache: Path, adapter: ModelAdapter) -> None:
    of_hub = replace(adapter, path=ID)
    assert of_hub.folder == cache and of_hub.weights_fingerprint() == COMMIT[:16]
    assert type(of_hub.load().transformer).__name__ == "PixArtTransformer2DModel"
    assert replace(of_hub, revision=COMMIT).folder == cache


def test_a_modular_pipeline_is_downloaded_part_by_part(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the model that would write prompts anew, nor files beside the parts."""

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("model_index.json is missing")

    def snapshot(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        asked.append(allow_patterns)
        return str(cache)

    asked: list[list[str]] = []
    (cache / "model_index.json").rename(cache / "modular_model_index.json")
    (cache / "prompt_upsampler").mkdir()
    (cache / "prompt_upsampler" / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.DiffusionPipeline, "download", refuse)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert hub.fetch(ID, "main", True) == cache
    parts = [f"{path.name}/*" for path in sorted(cache.iterdir()) if path.is_dir() and path.name != "prompt_upsampler"]
    assert asked == [hub.DESCRIPTIONS, [*hub.DESCRIPTIONS, *parts]] and "transformer/*" in parts


def test_a_variant_that_the_repository_lacks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, variant: str, **__: Any) -> str:
        raise ValueError(f"no such modeling files ({variant})")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.DiffusionPipeline, "download", refuse)
    with pytest.raises(
        UserError, match=rf"{ID} \(revision main\) cannot be downloaded: no such modeling files \(fp16\)"
    ):
        hub.fetch(ID, "main", True, "fp16")


def test_weights_that_are_not_downloaded_yet(cache: Path, adapter: ModelAdapter) -> None:
    for file in cache.rglob("*.safetensors"):
        file.unlink()
    of_hub = replace(adapter, path=ID)
    check_contents(of_hub, lenient=True)
    with pytest.raises(UserError, match="holds no weights"):
        of_hub.load_text_part()


def test_denoiser_of_another_place(cache: Path, adapter: ModelAdapter, tmp_path: Path) -> None:
    shutil.copytree(cache / "transformer", tmp_path / "tuned" / "transformer")
    shutil.rmtree(cache / "transformer")
    tuned = replace(adapter, path=ID, denoiser_path=str(tmp_path / "tuned"))
    assert tuned.load().transformer is not None and tuned.build_denoiser() is not None
    assert all(p.is_meta for p in tuned.load_text_part().transformer.parameters())
    first = tuned.weights_fingerprint()
    (tmp_path / "tuned" / "transformer" / "more").write_text("x")
    assert tuned.weights_fingerprint() != first and first.startswith(COMMIT[:16])
    with pytest.raises(UserError, match=r"holds no transformer: transformer/config\.json"):
        replace(adapter, denoiser_path=str(tmp_path)).build_denoiser()


@pytest.mark.parametrize("path", ["nobody/nothing", ID])
def test_absent_model_says_how_to_get_it(cache: Path, adapter: ModelAdapter, path: str) -> None:
    with pytest.raises(
        UserError, match=rf"'{path}' \(revision v2\) .*hf download {path} --revision v2.*model\.path=FOLDER"
    ):
        replace(adapter, path=path, revision="v2")


@pytest.mark.parametrize(
    ("error", "message"),
    [(GatedRepoError, "licence.*hf auth login"), (RepositoryNotFoundError, "no folder here and no model on the hub")],
)
def test_refusals_of_the_hub(
    cache: Path, adapter: ModelAdapter, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error.__new__(error)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message):
        replace(adapter, path="some/model")


def test_what_a_hub_id_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "folder").mkdir(parents=True)
    ids = ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "a/b"]
    folders = ["a/folder", "/a/b", "./a/b", "../b", "a", "a/b/c", "shipped:x", "~/model"]
    assert [path for path in ids + folders if is_hub_id(path)] == ids

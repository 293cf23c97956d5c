"""Runs with quantized text encoders: what they leave, what they say, how they go on, what is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from viditq.assets import SHIPPED
from viditq.errors import UserError
from viditq.estimate import estimate
from viditq.experiment import build
from viditq.files import read_json, read_tensors
from viditq.job import Job
from viditq.loading import load_quantized
from viditq.models.text import encode_prompt
from viditq.on_disk import is_visit
from viditq.quant.artifact import denoiser_bytes, read_meta, size_bytes, verify
from viditq.quant.execution.linear import backend_counts
from viditq.run_dir import RunDir
from viditq.stages.embedding_error import embedding_errors, mean_errors
from viditq.stages.prompts import prompts as encode_all
from viditq.stages.text_encoders import encode

STAGES = "stages=[prompts,reference,calibrate,quantize,generate,evaluate,report]"
ASKED = ("quant/text_encoder=w4", STAGES, "noise_floor.num_prompts=0", "metric=psnr")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def encoded(run: Run, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, only to be read."""
    folder = tmp_path_factory.mktemp("encoded") / "run"
    run(folder, shared_cache, *ASKED)
    return folder


@pytest.fixture
def job(configure: Callable[..., Any], shrunk: list[str], shared_cache: Path, encoded: Path) -> Job:
    experiment = build(configure(*shrunk, *ASKED, f"cache_dir='{shared_cache}'"))
    return Job(experiment, RunDir(encoded, experiment.tracked))


def test_bits_bytes_and_errors_are_told_apart_and_together(encoded: Path, job: Job) -> None:
    metrics, folder = read_json(encoded / "metrics.json"), encoded / "quantized"
    told = metrics["text_encoder"]
    (part,) = told["parts"].values()
    assert part["size_bytes"] == size_bytes(folder / "text_encoder")
    assert metrics["size_bytes"] == denoiser_bytes(folder)
    assert told["together"]["size_bytes"] == size_bytes(folder) == verify(folder)
    assert told["together"]["float_size_bytes"] == metrics["float_size_bytes"] + part["float_size_bytes"]
    assert part["average_weight_bits"] == 4
    assert 4 < told["together"]["average_weight_bits"] < metrics["average_weight_bits"]
    prompts = job.experiment.data.prompts
    exact, quantized = (job.load_embeds(prompts, entry) for entry in (job.embeds, job.quantized_embeds))
    assert job.embeds.path != job.quantized_embeds.path
    errors = [embedding_errors(quantized(i), exact(i)) for i in range(len(prompts))]
    assert read_json(encoded / "text_encoder.json") == {
        "prompts": prompts,
        "errors": errors,
        "mean": mean_errors(errors),
    }
    assert told["errors"] == mean_errors(errors)
    assert 0.01 < told["errors"]["prompt_embeds"]["relative_l2"] < 0.3
    assert "Embeddings against the float encoder" in (encoded / "report.html").read_text()


def test_the_estimate_counts_it(job: Job, tmp_path: Path) -> None:
    fresh = Job(job.experiment, RunDir(tmp_path / "run", job.experiment.tracked))
    found = estimate(fresh, "meta")
    (one,) = found.encoders.values()
    folder = job.run_dir.artifact / "text_encoder"
    assert one.artifact == pytest.approx(size_bytes(folder), rel=0.02)
    assert one.float16 == read_meta(folder)["float_size_bytes"] == found.parts["text_encoder"][0] * 2
    assert found.disk["text_encoder, quantized"] == one.artifact
    assert one.held < one.float16


def test_it_is_loaded_without_the_float_encoders_weights(encoded: Path, job: Job, tmp_path: Path) -> None:
    model = Path(shutil.copytree(SHIPPED / "tiny_image", tmp_path / "model"))
    for path in (model / "text_encoder").glob("*.safetensors"):
        path.unlink()
    pipeline = load_quantized(encoded, model_path=str(model))
    assert backend_counts(pipeline.text_encoder) == {"weight_only": 12}
    prompt = job.experiment.data.prompts[0]
    made = encode_prompt(job.experiment.adapter, pipeline, prompt)
    kept = read_tensors(job.embeds_path(prompt, job.quantized_embeds))
    assert made.keys() == kept.keys() and all(torch.equal(made[name], kept[name]) for name in kept)
    with pytest.raises(UserError, match="save_pretrained writes float models only"):
        pipeline.text_encoder.save_pretrained(tmp_path / "saved")


def test_within_a_budget_no_encoder_is_in_memory(
    encoded: Path, finished_run: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that quantizes them, and of one that does not; their embeddings are equal to the bit."""
    monkeypatch.setattr("viditq.on_disk.SMALL_BYTES", 1000)
    prompts = job.experiment.data.prompts
    for folder, entry in ((encoded, job.quantized_embeds), (finished_run, job.embeds)):
        pipeline = load_quantized(folder, memory_budget="20MB")
        assert any(is_visit(hook) for m in pipeline.text_encoder.modules() for hook in m._forward_hooks.values())
        made, kept = encode_prompt(job.experiment.adapter, pipeline, prompts[0]), job.load_embeds(prompts, entry)(0)
        assert made.keys() == kept.keys() and all(torch.equal(made[name], kept[name]) for name in kept)


def test_encoding_from_disk_gives_the_same_embeddings(
    encoded: Path, configure: Callable[..., Any], shrunk: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage prompts by the float encoder, and stage generate by the quantized one."""
    monkeypatch.setattr("viditq.on_disk.SMALL_BYTES", 1000)
    cfg = configure(*shrunk, *ASKED, f"cache_dir='{tmp_path}'", "trainer.offload=disk", "trainer.memory_budget=20MB")
    experiment = build(cfg)
    job = Job(experiment, RunDir(Path(shutil.copytree(encoded, tmp_path / "run")), experiment.tracked))
    encode_all(job)
    job.run_dir.embedding_errors.unlink()
    encode(job)
    assert read_json(job.run_dir.embedding_errors) == read_json(encoded / "text_encoder.json")


def test_only_what_is_missing_or_damaged_is_made_again(
    encoded: Path, run: Run, job: Job, shared_cache: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(encoded, tmp_path / "run"))
    shards = [folder / "quantized" / name / "model.safetensors" for name in (".", "text_encoder")]
    before = [{name: t.clone() for name, t in load_file(path).items()} for path in shards]
    written = [os.stat(path).st_mtime_ns for path in shards]
    shards[1].write_bytes(shards[1].read_bytes()[:-9])
    embeds = job.embeds_path(job.experiment.data.prompts[1], job.quantized_embeds)
    was = read_tensors(embeds)
    embeds.unlink()
    (folder / "text_encoder.json").unlink()
    run(folder, shared_cache, *ASKED)
    assert os.stat(shards[0]).st_mtime_ns == written[0] and os.stat(shards[1]).st_mtime_ns != written[1]
    for path, tensors in zip(shards, before, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    assert all(torch.equal(tensor, was[name]) for name, tensor in read_tensors(embeds).items())
    assert read_json(folder / "text_encoder.json") == read_json(encoded / "text_encoder.json")


def test_an_altered_or_absent_encoder_is_refused(encoded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoded / "quantized", tmp_path / "quantized"))
    path = folder / "text_encoder" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    for check in (verify, load_quantized):
        with pytest.raises(UserError, match=r"text_encoder/model.safetensors was altered \(the sha256 of"):
            check(folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match="is no whole quantized model: text_encoder is missing"):
        load_quantized(folder)


def test_folders_of_runs_without_it_are_those_of_earlier_versions(finished_run: Path) -> None:
    assert "text_encoder" not in read_json(finished_run / "run.json")["quant"]
    assert read_json(finished_run / "metrics.json")["text_encoder"] is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quant.text_encoder={bits: 4}"], "is no format, only a part of one"),
        (["quant/text_encoder=w4", "quant.text_encoder.bits=1"], "bits=1 is not possible"),
        (["quant/text_encoder=w4", "+quant.text_encoder.dynamic=true"], "a weight cannot be dynamic"),
        (["quant/text_encoder=w4", "quant.text_encoder.group_size=0"], "group_size"),
    ],
)
def test_what_is_no_format_of_weights_is_refused(
    overrides: list[str], words: str, configure: Callable[..., Any], shrunk: list[str]
) -> None:
    with pytest.raises(Exception, match=words):
        build(configure(*shrunk, *overrides))


def test_errors_count_the_tokens_of_the_mask_alone() -> None:
    """By hand: (3, 4) against (3, 5) is 1 of 5; what the mask leaves out may be anything."""
    exact = {"e": torch.tensor([[[3.0, 4.0], [7.0, 7.0]]]), "mask": torch.tensor([[1, 0]]), "pooled": torch.ones(1, 2)}
    quantized = {"e": torch.tensor([[[3.0, 5.0], [0.0, 0.0]]]), "mask": exact["mask"], "pooled": torch.ones(1, 2)}
    found = embedding_errors(quantized, exact)
    assert found["e"] == {
        "relative_l2": pytest.approx(0.2),
        "cosine": pytest.approx(29 / (5 * 34**0.5)),
    }
    assert found["pooled"] == {"relative_l2": 0, "cosine": 1} and found.keys() == {"e", "pooled"}
    zero = embedding_errors({"e": torch.zeros(1, 2, 3)}, {"e": torch.zeros(1, 2, 3)})
    assert zero["e"] == {"relative_l2": 0, "cosine": 1}

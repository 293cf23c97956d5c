"""Bad input ends in one clear message and exit status 2, before slow work where possible, and leaves nothing broken."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from viditq.cli import guarded_run, user_message
from viditq.errors import UserError
from viditq.experiment import _check_model
from viditq.loading import load_quantized
from viditq.models.adapter import ModelAdapter

ROOT = Path(__file__).parents[1]
Refuse = Callable[..., str]

# Overrides, and the words without which the message would be of no help: what was given, what is allowed, what to do.
WITHOUT_SLOW_WORK = {
    "unknown key of the root": (["+foo=1"], ["Unknown key foo", "batch_size"]),
    "unknown key of calibration": (["+calibration.foo=1"], ["calibration.foo", "num_buckets"]),
    "unknown key of model": (["+model.foo=1"], ["model.foo", "--cfg job"]),
    "unknown argument of the text encoding": (["+model.encode.foo=1"], ["model.encode.foo", "clean_caption"]),
    "unknown argument of the call": (["+model.call.foo=1"], ["model.call.foo", "guidance_scale"]),
    "videos of an image model": (["model.modality=video"], ["model.modality=video", "makes images"]),
    "unknown key of a format": (["+quant.weight.foo=1"], ["quant.weight.foo", "--cfg job"]),
    "unknown key of data": (["+data.foo=1"], ["data.foo", "--cfg job"]),
    "unknown key of a metric": (["+metric.psnr.foo=1"], ["metric.psnr.foo", "--cfg job"]),
    "unknown key of the logger": (["+logger.foo=1"], ["logger.foo", "--cfg job"]),
    "unknown key of the trainer": (["+trainer.foo=1"], ["trainer.foo", "accelerator", "offload"]),
    "unknown stage": (["stages=[prompts,train]"], ["'train'", "prompts, reference, noise_floor"]),
    "no stage": (["stages=[]"], ["stages=[]", "prompts, reference, noise_floor"]),
    "unknown backend": (["backend=cudnn"], ["'cudnn'", "fake"]),
    "a backend of GPUs on a CPU": (["backend=cuda"], ["backend=cuda", "on cpu", "backend=auto", "trainer=gpu"]),
    "kernels of GPUs on a CPU": (["backend=triton"], ["backend=triton", "on cpu", "backend=auto", "trainer=gpu"]),
    "attention in a list": (["quant.attention=[int8_qk]"], ["quant.attention=", "choose null or one of"]),
    "scales of attention in a list": (
        ["quant.attention=int8_qk", "quant.attention_granularity=[token]"],
        ["quant.attention_granularity=", "choose one of token"],
    ),
    "unknown attention": (["quant.attention=int4_qk"], ["'int4_qk'", "null", "int8_qk_fp8_pv"]),
    "unknown layer pattern": (
        ["quant.rules=[{pattern: '*.attn9.*', keep_float: true}]"],
        ["'*.attn9.*'", "matches no Linear", "transformer_blocks.0.attn1.to_k"],
    ),
    "0 bits": (["quant.weight.bits=0"], ["bits=0", "2 to 8"]),
    "17 bits": (["quant.activation.bits=17"], ["bits=17", "2 to 8"]),
    "bits in words": (["quant.weight.bits=four"], ["bits='four'", "2 to 8"]),
    "alpha above 1": (["quant.smoothing.alpha=1.5"], ["alpha=1.5", "[0, 1]"]),
    "alpha below 0": (["quant.smoothing.alpha=[0.5,-0.1]"], ["alpha=-0.1", "[0, 1]"]),
    "alpha in words": (["quant.smoothing.alpha=half"], ["alpha='half'", "auto"]),
    "too many alphas": (["quant.smoothing.alpha=[0.1,0.2,0.3]"], ["3 values for 2 segments", "one per segment"]),
    "segments that end early": (["quant.segments=[0,0.5]"], ["[0, 0.5]", "tile [0, 1]", "end at 1"]),
    "segments that start late": (["quant.segments=[0.1,0.5,1]"], ["[0.1, 0.5, 1]", "start at 0"]),
    "segments in disorder": (["quant.segments=[0,0.6,0.5,1]"], ["ascending"]),
    "segment above all steps": (
        ["quant.segments=[0,0.999999,1]"],
        ["segment of noise levels 0.999999 to 1", "steps lie at 0.999", "wider segments"],
    ),
    "segment between the steps": (["quant.segments=[0,0.9,0.99,1]"], ["noise levels 0.9 to 0.99"]),
    "edge within a bucket": (
        ["model.num_steps=50", "quant.segments=[0,0.53,1]"],
        [
            "quant.segments (or a plan file) parts the sampling steps",
            "Move the edge between them to 0.5 or 0.55",
            "calibration.num_buckets=",
        ],
    ),
    "steps at one level": (["model.timestep_scale=1e6"], ["model.timestep_scale=1000000.0", "at one noise level"]),
    "steps beyond noise": (["model.timestep_scale=500"], ["model.timestep_scale=500", "outside of [0, 1]"]),
    "unknown rounding": (["quant.rounding=up"], ["'up'", "nearest"]),
    "unknown dtype": (["model.dtype=float8"], ["'float8'", "float32, float16, bfloat16"]),
    "unknown dtype of the quantized": (["quant.float_dtype=int8"], ["'int8'", "null", "float16"]),
    "missing model folder": (["model.path=/no/such/folder"], ["/no/such/folder", "shipped:NAME"]),
    "unknown shipped model": (["model.path=shipped:opensora"], ["shipped:opensora", "shipped:tiny_video"]),
    "folder without pipeline": (["model.path={tmp}"], ["model_index.json", "no diffusers pipeline"]),
    "unknown pipeline class": (["model.pipeline=Sora"], ["'Sora'", "diffusers"]),
    "unknown denoiser": (["model.denoisers=[unet]"], ["'unet'", "transformer"]),
    "Linears without a role": (["model.roles.mlp=[]"], ["ff.net", "model.roles", "model.keep_float"]),
    "size in words": (["model.height=tall"], ["model.height='tall'", "whole number"]),
    "no steps": (["model.num_steps=0"], ["model.num_steps=0", "at least 1"]),
    "empty prompt file": (["data=prompt_file", "data.path={tmp}/empty.txt"], ["holds no prompt", "one prompt a line"]),
    "missing prompt file": (["data=prompt_file", "data.path={tmp}/gone.txt"], ["gone.txt", "does not exist"]),
    "binary prompt file": (["data=prompt_file", "data.path={tmp}/binary.txt"], ["not UTF-8"]),
    "prompt file not given": (["data=prompt_file"], ["data.path", "data.path=..."]),
    "no prompts": (["data.num_prompts=0"], ["data.num_prompts=0", "at least 1"]),
    "no calibration prompts": (["data.num_calibration_prompts=0"], ["num_calibration_prompts=0", "at least 1"]),
    "missing plan file": (["quant/policy=plan_file", "quant.policy.path=gone.json"], ["gone.json", "plan.json"]),
    "plan file not given": (["quant/policy=plan_file"], ["quant.policy.path=..."]),
    "plan file of another kind": (
        ["quant/policy=plan_file", "quant.policy.path='{tmp}/empty.txt'"],
        ["not valid JSON"],
    ),
    "negative devices": (["trainer.devices=-3"], ["trainer.devices=-3", "> 0", "trainer.devices=1"]),
    "several devices without ddp": (
        ["trainer=ddp_cpu", "trainer.strategy=ddp_spawn"],
        ["trainer.strategy=ddp_spawn", "trainer.devices=2", "trainer=ddp_cpu"],
    ),
    "several nodes without a launcher": (["trainer=ddp_cpu", "trainer.num_nodes=2"], ["num_nodes=2", "torchrun"]),
    "batch size 0": (["batch_size=0"], ["batch_size=0", "at least 1"]),
    "negative seed": (["seed=-1"], ["seed=-1", "at least 0"]),
    "negative noise floor": (["noise_floor.num_prompts=-1"], ["noise_floor.num_prompts=-1", "at least 0"]),
    "as many held out as calibrated on": (
        ["quant=none", "quant/policy=treatments", "data.num_calibration_prompts=8"],
        ["held_out=8", "none of 8", "data.num_calibration_prompts"],
    ),
    "noise floor of one prompt": (["noise_floor.num_prompts=1"], ["noise_floor.num_prompts=1", "2 or more"]),
    "no buckets": (["calibration.num_buckets=0"], ["calibration.num_buckets=0", "at least 1"]),
    "a million buckets": (["calibration.num_buckets=1000000"], ["num_buckets=1000000", "at most 1000"]),
    "a billion rows": (["calibration.rows_per_bucket=1000000000"], ["rows_per_bucket=1000000000", "at most"]),
    "a billion prompts": (["data.num_prompts=1000000000"], ["data.num_prompts=1000000000", "at most 1000000"]),
    "a billion calibration prompts": (
        ["data.num_calibration_prompts=1000000000"],
        ["data.num_calibration_prompts=1000000000", "at most 1000000"],
    ),
    "a seed beyond 64 bits": (["seed=100000000000000000000"], ["seed=100000000000000000000", "at most"]),
    "metric that is null": (["metric.psnr=null"], ["metric.psnr=null", "metric=[ssim,"]),
    "metric that is a number": (["metric.ssim=3"], ["metric.ssim=3", "metric=[psnr,"]),
    "metric in bad range": (["metric.psnr.metric.data_range=-1"], ["metric.psnr", "nan", "ceiling"]),
    "metric with a word for a number": (
        ["metric.ssim.metric.data_range=abc"],
        ["metric.ssim cannot score", "1 x 3 x 3"],
    ),
    "metric with an even window": (["+metric.ssim.metric.kernel_size=4"], ["metric.ssim", "kernel_size", "odd"]),
    "metric against nothing": (["metric.fid.against=nope"], ["'nope'", "reference, data"]),
    "video metrics on images": (["metric=video"], ["got images", "metric=image", "model.num_frames"]),
    "video metrics on one frame": (
        ["model=tiny_video", "model.num_frames=1", "metric=[flow_score]"],
        ["metric.flow_score", "metric=image"],
    ),
    "real clips that there are not": (
        ["data=ucf101", "data.num_prompts=2", "metric=[fid_data]"],
        ["metric.fid_data", "real clips"],
    ),
    "fewer prompts than a distance takes": (["data.num_prompts=1", "metric=[fid]"], ["metric.fid", "at least 2"]),
    "drop of a metric without a float value": (
        ["gate={psnr_drop: '<= 0.1'}"],
        ["gate.psnr_drop", "no value of the float"],
    ),
    "verdict of two prompts": (["gate={clipsim_verdict: equal}"], ["gate.clipsim_verdict", "5 prompts", "is 2"]),
    "verdict without a noise floor": (
        ["gate={ssim_verdict: equal}", "data.num_prompts=8", "noise_floor.num_prompts=0"],
        ["gate.ssim_verdict", "noise_floor.num_prompts", "is 0"],
    ),
    "interval of two prompts": (["gate={psnr_low: '>= 1'}"], ["gate.psnr_low", "5 prompts", "data.num_prompts is 2"]),
    "name that leads upwards": (["name=.."], ["name='..'", "name=my_run"]),
    "name with a way upwards in it": (["name=a/../../b"], ["name='a/../../b'", "name=my_run"]),
    "model name that leads upwards": (["model.name=../x"], ["model.name='../x'", "no name of a folder"]),
    "no name": (["name=''"], ["name=''", "name=my_run"]),
    "no cache folder": (["cache_dir=''"], ["''", "cache_dir=FOLDER"]),
    "cache in the root": (["cache_dir=/"], ["'/'", "cache_dir=FOLDER"]),
    "cache in a file": (["cache_dir='{tmp}/empty.txt/cache'"], ["empty.txt", "cache_dir=FOLDER"]),
    "project that W&B refuses": (["logger=wandb", "logger.project=a/b"], ["logger.project=a/b", "no / "]),
    "project without a name": (["logger=wandb", "logger.project=''"], ["logger.project=''", "1 to 128"]),
    "low rank below 0": (["quant.low_rank=-1"], ["low_rank=-1", "rank of the branch", "null"]),
}
AT_COMPOSITION = {
    "a slip in a key": (["quant.weigth.bits=4"], ["quant.weigth.bits", "close names: weight."]),
    "a slip in a key of the root": (["batchsize=4"], ["close names: batch_size"]),
    "a slip in a group": (["experimnt=w4a8"], ["close names: experiment."]),
    "a slip in a choice": (["model=tiny_vido"], ["Available options", "close names: tiny_video"]),
    "experiment": (["experiment=w3a3"], ["experiment/w3a3", "w4a8_ts_smooth"]),
    "model": (["model=opensora"], ["model/opensora", "tiny_video"]),
    "metric": (["metric=[nope]"], ["metric/nope", "Known are", "psnr", "warping_error"]),
    "data": (["data=nope"], ["data/nope", "moving_shapes"]),
    "logger": (["logger=nope"], ["logger/nope", "wandb"]),
    "key": (["foo=1"], ["'foo'", "--cfg job"]),
    "path with spaces, a comma and parentheses": (
        ["data=prompt_file", "data.path=/a b/c, (1).txt"],
        ["""'data.path="/a b/c, (1).txt"'"""],
    ),
    "path at home": (["model.path=~/model"], ["""'model.path="~/model"'"""]),
    "path beyond a to z": (["cache_dir=/tmp/über"], ["""'cache_dir="/tmp/über"'"""]),
    "path with a comma": (["data=prompt_file", "data.path=/a,b.txt"], ["""'data.path="/a,b.txt"'"""]),
    "path with quotes": (["model.path=/it's"], ["""model.path="/it"""]),
    "key of a group": (["model.num_stepz=4"], ["model.num_stepz", "--cfg job"]),
    "devices at the root": (["devices=-3"], ["'devices'", "--cfg job"]),
    "type": (["batch_size=many"], ["batch_size=many", "Integer"]),
}


@pytest.fixture
def refuse(configure: Callable, shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """(*overrides, folder=, cache=) -> the message of a run that has to be refused."""

    def refuse(*overrides: str, folder: Path = tmp_path / "refused", cache: Path = tmp_path / "cache") -> str:
        cfg = configure(*shrunk, f"cache_dir='{cache}'", *overrides)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            guarded_run(cfg, folder)
        stderr = capsys.readouterr().err
        assert exit_.value.code == 2
        assert stderr.count("\nerror: ") == 1 and "Traceback" not in stderr
        assert not unfinished_files(tmp_path, cache)
        return stderr[stderr.index("\nerror: ") :]

    return refuse


def unfinished_files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*.tmp")]


@pytest.mark.parametrize("case", WITHOUT_SLOW_WORK)
def test_refused_before_anything_is_loaded_or_written(
    case: str, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slow in ("load", "load_text_part", "load_complete"):
        monkeypatch.setattr(ModelAdapter, slow, lambda *_: pytest.fail("loaded a model"))
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    overrides, words = WITHOUT_SLOW_WORK[case]
    message = refuse(*(override.replace("{tmp}", str(tmp_path)) for override in overrides))
    assert all(word in message for word in words), message
    assert not (tmp_path / "refused").exists() and not (tmp_path / "cache").exists()


def test_what_hydra_has_made_for_a_refused_run_goes_again(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its empty log and the composed configuration, but never what an earlier run has left."""
    monkeypatch.chdir(tmp_path)  # an empty folder elsewhere is one that the user has made
    for earlier in ("", "viditq.log", "run.json", "hydra/mine.yaml", ".hidden"):
        folder = tmp_path / "outputs" / "refused"
        (folder / "hydra").mkdir(parents=True)
        for name in ("viditq.log", *(f"hydra/{word}.yaml" for word in ("config", "hydra", "overrides"))):
            (folder / name).touch()
        if earlier:
            (folder / earlier).write_text("of an earlier run")
        before = sorted(folder.rglob("*"))
        refuse("seed=-1", folder=folder)
        assert sorted(folder.rglob("*")) == (before if earlier else []), earlier
        assert (tmp_path / "outputs").exists() == bool(earlier)
        shutil.rmtree(tmp_path / "outputs", ignore_errors=True)


@pytest.mark.parametrize("case", AT_COMPOSITION)
def test_refused_by_hydra(case: str, configure: Callable, shrunk: list[str]) -> None:
    overrides, words = AT_COMPOSITION[case]
    with pytest.raises(HydraException) as error:
        configure(*shrunk, *overrides)
    message = user_message(error.value)
    assert message is not None and all(word in message for word in words), message


def test_debug_shows_the_traceback(configure: Callable, shrunk: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed=-1"):
        guarded_run(configure(*shrunk, "seed=-1", "debug=true"), tmp_path / "run")


def test_errors_that_name_each_other_as_their_cause() -> None:
    """As libraries that re-raise do: the message is found all the same."""
    first, second = UserError("mend it"), RuntimeError("instantiation failed")
    second.__cause__, first.__context__ = first, second
    assert user_message(second) == "mend it"
    cycle = [KeyError("a"), KeyError("b")]
    cycle[0].__context__, cycle[1].__context__ = cycle[1], cycle[0]
    assert user_message(cycle[0]) is None


def test_bugs_keep_their_traceback() -> None:
    assert user_message(KeyError("x")) is None
    assert user_message(TypeError("y")) is None


def test_too_little_memory_ends_with_what_needs_less() -> None:
    text = (  # as torch 2.13's allocator words it
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3.25 GiB is "
        "free. Process 12 has 75.85 GiB memory in use. Of the allocated memory 74.50 GiB is allocated by PyTorch, and "
        "200.00 MiB is reserved by PyTorch but unallocated. See documentation for Memory Management"
    )
    message = user_message(torch.OutOfMemoryError(text))
    assert message is not None and "The memory of the GPU does not suffice. Tried to allocate 20.00 GiB." in message
    for words in ("of which 3.25 GiB is free", "batch_size", "trainer.offload=model", "estimate=true", "fit=84GB"):
        assert words in message
    assert "See documentation" not in message
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, dtype=torch.uint8)
    message = user_message(error.value)
    assert message is not None and f"tried to allocate {2**50} bytes" in message and "of the GPU" not in message


# Models and prompts ---------------------------------------------------------------------------------------------------


def test_prompts_longer_than_the_encoder_takes(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a red circle\n" + "red " * 40 + "\n")
    message = refuse("data=prompt_file", f"data.path={tmp_path}/long.txt", "metric=[psnr]")
    assert "'red red red" in message and "41 tokens" in message and "at most 16" in message
    assert "model.max_tokens" in message and "Shorten" in message
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_nan_in_weights(refuse: Refuse, model_copy: Path, tmp_path: Path) -> None:
    file = model_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["transformer_blocks.1.attn2.to_v.weight"][3, 5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    message = refuse(f"model.path={model_copy}")
    assert "transformer.transformer_blocks.1.attn2.to_v.weight" in message and "NaN" in message
    assert "Check the checkpoint" in message
    assert not list(tmp_path.rglob("*.png"))


def rename_tensors(folder: Path, part: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    save_file({f"module.{name}": tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: rename_tensors(folder, "text_encoder"), ["text_encoder", "missing", "'module.' too much"]),
        (lambda folder: rename_tensors(folder, "transformer"), ["transformer", "missing", "'module.' too much"]),
        (lambda folder: rename_tensors(folder, "vae"), ["vae", "missing", "'module.' too much"]),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), ["tokenizer holds no vocabulary"]),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), ["tokenizer is missing"]),
        (lambda folder: shutil.rmtree(folder / "scheduler"), ["scheduler is missing"]),
    ],
    ids=["text encoder", "denoiser", "decoder", "vocabulary", "tokenizer", "scheduler"],
)
def test_contents_of_the_model_folder(
    damage: Callable[[Path], None],
    words: list[str],
    refuse: Refuse,
    model_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for slow in ("load", "load_text_part", "load_complete"):
        monkeypatch.setattr(ModelAdapter, slow, lambda *_: pytest.fail("loaded a model"))
    damage(model_copy)
    message = refuse(f"model.path={model_copy}")
    assert all(word in message for word in words), message
    assert not (tmp_path / "refused").exists() and not (tmp_path / "cache").exists()


def test_a_folder_without_text_encoder_where_embeddings_are_ready(
    configure: Callable, shrunk: list[str], model_copy: Path
) -> None:
    adapter = instantiate(configure(*shrunk, f"model.path={model_copy}").model, _convert_="all")
    for part in adapter.text_parts:
        shutil.rmtree(model_copy / part)
    prompts = {"prompts": ["a"], "calibration_prompts": ["b"]}
    _check_model(adapter, SimpleNamespace(**prompts, ready_embeds={"a": {}, "b": {}}), lenient=False)
    assert adapter.load().transformer is not None
    with pytest.raises(UserError, match=r"(tokenizer|text_encoder) is missing"):
        _check_model(adapter, SimpleNamespace(**prompts, ready_embeds={"a": {}}), lenient=False)


@pytest.mark.parametrize(
    "file", ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
)
def test_truncated_model_folder(file: str, refuse: Refuse, model_copy: Path) -> None:
    truncate(model_copy / file)
    message = refuse(f"model.path={model_copy}")
    assert str(model_copy) in message and "Copy the model's folder again" in message


def test_size_that_the_pipeline_refuses(refuse: Refuse) -> None:
    assert "divisible by 8" in refuse("model.height=33", "metric=[psnr]")


def test_segment_without_a_sampling_step(refuse: Refuse, shared_cache: Path, finished_run: Path) -> None:
    message = refuse("quant.segments=[0,0.5,1]", cache=shared_cache)
    assert "0 to 0.5" in message and "more sampling steps, or use wider segments" in message


# The run's own files --------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(("name", "old", "new"), [("model.safetensors", b"", b"\0"), ("plan.json", b"8", b"7")])
def test_altered_artifact(
    name: str, old: bytes, new: bytes, refuse: Refuse, run_copy: Path, shared_cache: Path
) -> None:
    """Whole, but not what was written."""
    file = run_copy / "quantized" / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if not old else content.replace(old, new))
    shutil.rmtree(run_copy / "samples")
    message = refuse(folder=run_copy, cache=shared_cache)
    assert str(run_copy / "quantized") in message and name in message and "quantize again" in message
    assert not (run_copy / "samples").exists()


@pytest.mark.parametrize(
    "key",
    [
        "model",
        "float_dtype",
        "format_version",
        "sha256",
        "timestep_scale",
        "dtypes",
    ],
)
def test_artifact_whose_meta_lacks_a_key(key: str, refuse: Refuse, run_copy: Path, shared_cache: Path) -> None:
    file = run_copy / "quantized" / "meta.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
    shutil.rmtree(run_copy / "samples")
    message = refuse(folder=run_copy, cache=shared_cache)
    assert "meta.json" in message and "quantize again" in message


def test_artifact_of_another_format_version(refuse: Refuse, run_copy: Path, shared_cache: Path) -> None:
    file = run_copy / "quantized" / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    shutil.rmtree(run_copy / "samples")
    assert "99" in refuse(folder=run_copy, cache=shared_cache)


def test_damaged_run_json(refuse: Refuse, run_copy: Path, shared_cache: Path) -> None:
    """Whether this is the same run cannot be told any more."""
    (run_copy / "run.json").write_text("{")
    message = refuse(folder=run_copy, cache=shared_cache)
    assert str(run_copy / "run.json") in message and "damaged" in message and "elete" in message


@pytest.mark.parametrize("stage", ["generate", "diagnose"])
def test_stage_without_a_quantized_model(stage: str, refuse: Refuse, shared_cache: Path, finished_run: Path) -> None:
    message = refuse(f"stages=[{stage}]", cache=shared_cache)
    assert "Run the stage quantize before" in message and "elete" not in message


@pytest.mark.parametrize("path", ["no/such/folder", "~/no/such folder", "."])
def test_loading_what_is_no_quantized_model(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="give the folder `quantized` of a run") as error:
        load_quantized(path)
    assert "elete" not in str(error.value) and "~" not in str(error.value)


def test_stage_without_the_stages_before_it(refuse: Refuse) -> None:
    assert "Run the stage prompts before" in refuse("stages=[reference]")


def test_run_folder_that_is_a_file(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    message = refuse(folder=tmp_path / "taken")
    assert "taken" in message and "hydra.run.dir=FOLDER" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_run_folder(refuse: Refuse, tmp_path: Path) -> None:
    folder = tmp_path / "read only"
    folder.mkdir(mode=0o500)
    message = refuse(folder=folder)
    assert "read only" in message and "hydra.run.dir=FOLDER" in message


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_folder_that_cannot_be_written(code: int, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "write_text", fail)
    message = refuse()
    assert "run.json" in message and "hydra.run.dir=FOLDER" in message


# A full disk ----------------------------------------------------------------------------------------------------------


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_safetensors(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("target", "writer"),
    [
        ("viditq.data.samples.Image.Image.save", full_disk),  # a sample
        # Slow: the same at every other kind of file. The artifact meets a disk that is really full below.
        *(
            pytest.param(target, writer, marks=pytest.mark.slow)
            for target, writer in (
                ("viditq.mapped.Writer.add", full_disk),  # the artifact
                ("safetensors.torch.save_file", full_disk_in_safetensors),  # the first embeddings
                ("viditq.files.os.replace", full_disk),  # the first file of all
                ("viditq.engine.partials.write_tensors", full_disk_in_safetensors),  # the statistics
                ("viditq.stages.report.comparison_picture", full_disk),  # the picture
            )
        ),
    ],
)
def test_full_disk(
    target: str,
    writer: Callable,
    refuse: Refuse,
    run: Callable,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(target, writer)
        message = refuse()
        assert "disk is full" in message or "free space" in message, message
    wanted = json.loads((finished_run / "metrics.json").read_text())
    assert run(tmp_path / "refused", tmp_path / "cache")["metrics"] == wanted["metrics"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_really_full_disk(refuse: Refuse, small_disk: Path, shared_cache: Path, finished_run: Path) -> None:
    message = refuse(folder=small_disk / "run", cache=shared_cache)
    assert "small disk" in message and "No space left on device" in message and "free space" in message
    assert not (small_disk / "run" / "quantized").exists()


# As a user meets it ---------------------------------------------------------------------------------------------------


def run_py(*arguments: str) -> SimpleNamespace:
    """`python run.py ...` in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    command = [sys.executable, "run.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=w3a3"], ["experiment/w3a3", "w4a8_ts_smooth"]),
        (["experiment=smoke", "foo=1"], ["'foo'", "--cfg job"]),
        (["experiment=smoke", "logger=null"], ["cannot be null", "logger=none"]),
        (["experiment=smoke", "devices=-3"], ["'devices'", "--cfg job"]),
        (["experiment=smoke", "trainer.devices=-3"], ["trainer.devices=-3", "trainer.devices=1"]),
        (["experiment=smoke", "hydra.run.dir=/dev/null/x"], ["/dev/null", "hydra.run.dir=FOLDER"]),
    ],
)
def test_command_line(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    where = [] if "hydra.run.dir" in arguments[-1] else [f"hydra.run.dir={tmp_path}/run"]
    done = run_py(*where, *arguments)
    assert done.code == 2
    assert "Traceback" not in done.err and done.err.count("\nerror: ") == 1
    assert all(word in done.err for word in words), done.err

"""Sound beside clips, on tiny random pipelines of LTX-2 and Kandinsky 6: kept, resumed, judged, shown, quantized."""

import errno
import inspect
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from hydra.utils import instantiate
from zoo import sound as zoo_sound
from zoo import videos_2026 as zoo

from scripts.compare_runs import clips
from viditq.checks import check
from viditq.cli import user_message
from viditq.data.samples import checksum_path, load_sound, sound_path
from viditq.errors import UserError
from viditq.estimate.probe import probe
from viditq.experiment import build
from viditq.files import read_json
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import noise_generator, with_settings
from viditq.models.roles import without
from viditq.models.sound import PARTS, SILENT, makes_sound, sampling_rate, waveforms
from viditq.models.text import encode_prompt
from viditq.quant import linear_names
from viditq.runner import run
from viditq.sweeps.worst_pair import sample_of
from viditq.trial import try_metrics

PROMPTS = ["a small red circle", "a large blue square"]
STAGES = "[prompts,reference,noise_floor,calibrate,quantize,generate,evaluate,report]"
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "a green triangle"]))
    return folder


@pytest.fixture(scope="module")
def overrides(folder_of: Callable[..., Path], place: Path) -> list[str]:
    size = ["model.num_frames=5", "model.num_steps=2", "model.height=32", "model.width=32", "model.dtype=float32"]
    data = ["data=prompt_file", f"data.path='{place}/prompts.txt'", "data.num_prompts=2"]
    few = ["data.num_calibration_prompts=1", "noise_floor.num_prompts=2", "diagnosis.num_prompts=0", "logger=none"]
    model = ["model=ltx2", f"model.path='{folder_of(zoo.ltx2)}'", f"cache_dir='{place}/cache'"]
    return [*model, *size, *data, *few, "quant=w4a8", "metric=[psnr,sound]", "batch_size=1", f"stages={STAGES}"]


@pytest.fixture(scope="module")
def start(configure: Callable[..., Any], overrides: list[str]) -> Run:
    """(folder, *overrides) -> what a run of LTX-2 has measured."""

    def start(folder: Path, *more: str) -> dict[str, Any]:
        return run(configure("name=x", *overrides, *more), folder) or {}

    return start


@pytest.fixture(scope="module")
def finished(place: Path, start: Run) -> Path:
    start(place / "run")
    return place / "run"


def reference_of(folder: Path) -> Path:
    return Path(read_json(folder / "per_prompt.json")["reference"])


def adapter_of(configure: Callable[..., Any], overrides: list[str]) -> ModelAdapter:
    return instantiate(configure("name=x", *overrides).model, _convert_="all")


def test_what_is_kept_is_what_the_pipelines_own_call_makes(
    finished: Path, configure: Callable[..., Any], overrides: list[str]
) -> None:
    adapter = adapter_of(configure, overrides)
    whole = with_settings(adapter, adapter.load_complete())
    for index, prompt in enumerate(PROMPTS):
        theirs = whole(prompt=prompt, generator=noise_generator(0, index), output_type="pt", return_dict=False)[1][0]
        ours, rate = load_sound(sound_path(reference_of(finished), index))
        assert ours.shape == theirs.shape == (2, ours.shape[1]) and rate == whole.vocoder.config.output_sampling_rate
        assert (ours - (theirs * 32768).round()).abs().max() <= 1 and ours.float().std() > 1


def test_a_clip_too_short_for_sound_is_refused_before_anything_is_loaded(
    configure: Callable[..., Any], overrides: list[str]
) -> None:
    """Torch refused to reshape nothing, while sampling."""
    with pytest.raises(UserError, match=r"too short for the sound of LTX2Pipeline.*model\.num_frames=3 or more"):
        check(configure("name=x", *overrides, "model.num_frames=1", "model.fps=60"))


def test_it_is_judged_beside_the_frames_as_a_distance_to_float(finished: Path) -> None:
    metrics = read_json(finished / "metrics.json")
    for name, unit in (("log_mel", "dB"), ("sound_snr", "dB")):
        assert metrics["verdict"][name]["kind"] == "fidelity" and metrics["labels"][name]["unit"] == unit
        assert set(metrics["verdict"][name]["floors"]) == {"seed", "bfloat16", "latents"}
    assert metrics["metrics"]["log_mel"] > 0 and metrics["metrics"]["sound_snr"] < 100
    assert len(read_json(finished / "per_prompt.json")["metrics"]["log_mel"]) == 2


def test_next_to_no_noise_on_latents_moves_next_to_nothing(finished: Path) -> None:
    """The sound is stepped by a copy of the scheduler, which must not step the frames' own."""
    floors = {name: verdict["floors"] for name, verdict in read_json(finished / "metrics.json")["verdict"].items()}
    assert all(floors[name]["latents"] > 60 > 40 > floors[name]["seed"] for name in ("psnr", "sound_snr"))
    assert floors["log_mel"]["latents"] < 0.01 < floors["log_mel"]["seed"]


def test_the_page_plays_both(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("<audio ") == 4 and page.count('src="data:audio/wav;base64,') == 4
    assert "Sound is stereo, 24 kHz, 16 bits, as the model made it." in page


def test_only_a_sample_whose_sound_was_changed_is_made_again(finished: Path, start: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    changed, other = (sound_path(folder / "samples", i) for i in (1, 0))
    before = changed.read_bytes()
    changed.write_bytes(before[:-2] + bytes([before[-2] ^ 1, before[-1]]))
    untouched = other.stat().st_mtime_ns
    metrics = start(folder)["metrics"]
    assert changed.read_bytes() == before and other.stat().st_mtime_ns == untouched
    assert metrics == read_json(finished / "metrics.json")["metrics"]
    assert checksum_path(changed).is_file()


def test_a_cache_without_sound_is_filled_and_its_clips_stay_also_after_a_full_disk(
    finished: Path, start: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versions before have left it: under the same key, frames alone."""
    cache = Path(shutil.copytree(place / "cache", tmp_path / "cache"))
    reference = cache / "reference" / reference_of(finished).name
    for path in [*reference.glob("*.wav"), *reference.glob(".*.wav.sha256")]:
        path.unlink()
    frames = (reference / "000001.safetensors").read_bytes()
    short = (f"cache_dir='{cache}'", "stages=[prompts,reference]", "noise_floor.num_prompts=0")
    with monkeypatch.context() as patch:
        write = Path.write_bytes

        def full(path: Path, content: bytes) -> int:
            if "000001.wav" in path.name:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, content)

        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError) as raised:
            start(tmp_path / "run", *short)
    assert "disk is full" in (user_message(raised.value) or "")
    assert sorted(path.name for path in reference.glob("0*.wav*")) == ["000000.wav"]
    start(tmp_path / "run", *short)
    assert len([*cache.glob("reference/*")]) == len([*(place / "cache").glob("reference/*")])
    assert (reference / "000001.safetensors").read_bytes() == frames
    assert sound_path(reference, 1).read_bytes() == sound_path(reference_of(finished), 1).read_bytes()


def test_the_frames_are_what_pictures_of_runs_take(finished: Path) -> None:
    assert sample_of(finished / "samples", 1) == finished / "samples" / "000001.safetensors"
    clips_BFCHW = clips(finished / "samples", [0, 1])
    assert clips_BFCHW.shape == (2, 5, 3, 32, 32) and clips_BFCHW.dtype == torch.uint8


def test_a_model_without_sound_is_refused_before_anything_slow(configure: Callable[..., Any]) -> None:
    experiment = build(configure("experiment=w4a8", "model=tiny_image", "metric=[psnr,log_mel]", "name=x"))
    with pytest.raises(
        UserError, match=r"metric\.log_mel: log-mel distance of the sound compares sound, and this model"
    ):
        try_metrics(experiment)


def test_an_estimate_counts_its_bytes_and_calls_of_half_a_batch(
    finished: Path, configure: Callable[..., Any], overrides: list[str]
) -> None:
    """LTX-2's guidance calls the denoiser with twice the batch, and twice with the batch."""
    adapter = adapter_of(configure, overrides)
    seen = probe(adapter, adapter.load(), encode_prompt(adapter, adapter.load_text_part(), PROMPTS[0]), 2)
    assert seen.forwards == 6 and seen.forward_seconds is not None
    assert seen.sample_bytes == 5 * 3 * 32 * 32 + load_sound(sound_path(reference_of(finished), 0))[0].nbytes


def test_quantizing_its_layers_costs_sound(finished: Path, start: Run, tmp_path: Path) -> None:
    """From the same float samples, and the frames hear of it through attention to sound alone."""
    before = read_json(finished / "metrics.json")["metrics"]
    stages = "stages=[prompts,reference,calibrate,quantize,generate,evaluate]"
    after = start(tmp_path / "run", "model.float_roles=[]", stages, "noise_floor.num_prompts=0")["metrics"]
    assert after["log_mel"] > 1.1 * before["log_mel"] and after["sound_snr"] < before["sound_snr"] - 1
    assert reference_of(tmp_path / "run") == reference_of(finished)
    plans = [read_json(folder / "quantized" / "plan.json")["layers"] for folder in (finished, tmp_path / "run")]
    sound = plans[1].keys() - plans[0].keys()
    assert len(sound) == 28 and all("audio" in name for name in sound)


def test_roles_are_left_in_float_by_name_and_one_that_no_linear_has_is_refused() -> None:
    roles = {"a": "mlp", "b": "sound", "c": "float"}
    assert without(roles, ["sound"]) == {"a": "mlp", "b": "float", "c": "float"} and without(roles, []) == roles
    with pytest.raises(UserError, match=r"float_roles has 'sounds', which no Linear has; the roles are mlp, sound\."):
        without(roles, ["sounds"])


def test_kandinsky_has_sound_unless_told_otherwise(
    folder_of: Callable[..., Path], configure: Callable[..., Any]
) -> None:
    folder = folder_of(zoo_sound.kandinsky6)
    adapter = adapter_of(configure, ["model=kandinsky6", f"model.path='{folder}'"])
    assert adapter.makes_sound and adapter.sample_kind == "video with sound"
    assert sampling_rate(adapter.load()) == 1000
    names = linear_names(adapter.build_denoiser())
    found = [Counter(replace(adapter, float_roles=left).linear_roles(names).values()) for left in (["sound"], [])]
    assert found[0] - found[1] == {"float": 34} and found[1] - found[0] == {"sound": 34}
    silent = replace(adapter, call={**adapter.call, "sample_audio": False})
    assert not silent.makes_sound and silent.sample_kind == "video"
    index = {**adapter.index(), "vocoder": [None, None]}
    parts = SimpleNamespace(modality="video", pipeline=adapter.pipeline, call={}, index=lambda: index)
    assert not makes_sound(parts)
    assert all({*PARTS} <= {*inspect.signature(getattr(diffusers, name)).parameters} for name in SILENT)


def test_a_pipeline_that_returns_no_sound_or_a_broken_one_is_refused() -> None:
    adapter, clips = SimpleNamespace(pipeline="Some"), torch.zeros(2, 1)
    for out in ((clips,), (clips, None), (clips, torch.zeros(1, 2, 5))):
        with pytest.raises(UserError, match="Some has audio_vae and vocoder, and returns no waveform for each of 2"):
            waveforms(adapter, out, 2)
    with pytest.raises(UserError, match="not finite"):
        waveforms(adapter, (clips, torch.full((2, 5), float("nan"))), 2)
    loud = waveforms(adapter, (clips, torch.tensor([[-2.0, -1.0, 0.0, 0.5], [1.0, 2.0, 0.0, 0.0]])), 2)
    assert loud.tolist() == [[[-32768, -32768, 0, 16384]], [[32767, 32767, 0, 0]]]

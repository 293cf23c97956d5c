"""Sound: levels against transformers' own spectrogram and by known tones, distances by known changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.audio import ScaleInvariantSignalDistortionRatio, SignalNoiseRatio
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from viditq.errors import UserError
from viditq.metrics.batch import Sound
from viditq.metrics.comparison import kind_of
from viditq.metrics.sound import LogMel, Waveform, filter_bank, log_mel

RATE = 8000


def to_short(values: torch.Tensor) -> torch.Tensor:
    return (values * 32767).round().short()


def result_of(metric, batch, **sounds):
    metric.reset()
    metric.update(replace(batch, sound=replace(batch.sound, **sounds)))
    return metric.compute()


def snr() -> Waveform:
    return Waveform(SignalNoiseRatio(), "SNR", 100.0)


@pytest.mark.parametrize("rate", [8000, 24000, 44100])
def test_levels_are_those_of_transformers(rate):
    sound = to_short(0.1 * torch.randn(rate // 8, generator=torch.Generator().manual_seed(0)))
    size = round(0.046 * rate)
    window = window_function(size, "hann")
    theirs = spectrogram(
        sound.double().numpy() / 32768,
        window,
        frame_length=size,
        hop_length=size // 4,
        fft_length=size,
        power=2.0,
        pad_mode="constant",
        mel_filters=mel_filter_bank(size // 2 + 1, 64, 0.0, rate / 2, rate, norm=None, mel_scale="slaney"),
        mel_floor=1e-30,
    )
    expected = np.maximum(10 * np.log10(theirs * 4 / (size * (window**2).sum())), -80)
    np.testing.assert_allclose(log_mel(sound[None], rate, 64, 0.046, -80.0)[0], expected, atol=1e-3)


@pytest.mark.parametrize(("amplitude", "level"), [(1.0, 0.0), (0.5, -6.02)])
def test_a_sine_has_the_level_of_its_amplitude(amplitude, level):
    sine = to_short(amplitude * torch.sin(2 * torch.pi * 1234 / RATE * torch.arange(RATE)))
    found = log_mel(sine[None], RATE, 64, 0.046, -80.0)[0, :, 10:-10]
    total = 10 * (10 ** (found / 10)).sum(0).log10()
    torch.testing.assert_close(total, torch.full_like(total, level), atol=0.05, rtol=0)


def test_bands_between_two_frequencies_are_left_out():
    assert filter_bank(1104, 24000, 64).shape == (553, 64)
    few = filter_bank(46, 1000, 64)
    assert 0 < few.shape[1] < 64 and bool((few.sum(0) > 0).all())


def test_half_as_loud_is_6_db_apart(pairs):
    batch = pairs(3)
    quieter = (batch.sound.references / 2).round().short()
    assert result_of(LogMel("mel"), batch, samples=quieter)["value"] == pytest.approx(6.02, abs=0.02)
    assert result_of(snr(), batch, samples=quieter)["value"] == pytest.approx(6.02, abs=0.02)


def test_what_is_below_the_floor_is_not_heard(pairs):
    batch = pairs(2)
    hiss = torch.randint(-1, 2, batch.sound.samples.shape, generator=torch.Generator().manual_seed(1)).short()
    silence = torch.zeros_like(hiss)
    assert result_of(LogMel("mel"), batch, samples=hiss, references=silence)["value"] == 0
    assert result_of(LogMel("mel", floor=-140.0), batch, samples=hiss, references=silence)["value"] > 10


def test_the_snr_is_the_formula_over_both_channels(pairs):
    batch = pairs(4)
    s, r = (x.numpy().astype(np.float64).reshape(4, -1) for x in (batch.sound.samples, batch.sound.references))
    expected = 10 * np.log10((r**2).sum(1) / ((s - r) ** 2).sum(1))
    np.testing.assert_allclose(result_of(snr(), batch)["per_sample"], expected[batch.index.argsort()], rtol=1e-5)


def test_equal_sounds_and_silence_are_finite(pairs):
    batch = pairs(2)
    silence = torch.zeros_like(batch.sound.samples)
    for equal in (batch.sound.references, silence):
        assert result_of(snr(), batch, samples=equal, references=equal)["value"] == 100
        assert result_of(LogMel("mel"), batch, samples=equal, references=equal)["value"] == 0
    assert result_of(snr(), batch, references=silence)["value"] == -100
    assert result_of(snr(), batch, samples=silence)["value"] == pytest.approx(0, abs=1e-5)


def test_another_stock_metric_takes_its_place(pairs):
    batch = pairs(3, noise=0.01)
    ratio = Waveform(ScaleInvariantSignalDistortionRatio(), "SI-SDR", 100.0)
    louder = (batch.sound.samples * 2).clamp(-32768, 32767).short()
    loud, plain = (result_of(ratio, batch, samples=samples)["value"] for samples in (louder, batch.sound.samples))
    assert loud == pytest.approx(plain.item(), abs=0.5) and result_of(snr(), batch, samples=louder)["value"] < 1


def test_more_noise_is_worse(pairs):
    for metric, worse in ((snr, -1), (lambda: LogMel("mel"), 1)):
        values = [result_of(metric(), pairs(3, noise=noise))["value"].item() for noise in (0.001, 0.01, 0.1)]
        assert values == sorted(values, reverse=worse < 0)
        assert metric().higher_is_better is (worse < 0)


def test_it_is_a_distance_to_float_and_no_quality(pairs):
    assert kind_of(result_of(LogMel("mel"), pairs(3))) == kind_of(result_of(snr(), pairs(3))) == "fidelity"


def test_a_sound_shorter_than_a_window_is_scored(pairs):
    batch, short = pairs(2), torch.full((2, 1, 7), 1000, dtype=torch.int16)
    found = result_of(LogMel("mel"), batch, samples=short, references=short // 2)
    assert 0 < found["value"] < 6.1


@pytest.mark.parametrize("metric", [LogMel("mel"), snr()], ids=["log_mel", "snr"])
def test_a_model_without_sound_is_refused(metric, pairs):
    with pytest.raises(UserError, match=r"makes none beside its frames.*Leave the metric out"):
        metric.update(replace(pairs(2), sound=None))


@pytest.mark.parametrize(("key", "value"), [("bands", 0), ("bands", 2.5), ("window", 0), ("window", 3), ("floor", 0)])
def test_settings_that_make_no_sense_are_refused(key, value):
    with pytest.raises(UserError, match=f"{key} is {value}"):
        LogMel("mel", **{key: value})


def test_rates_are_heard(pairs):
    """The same values at another rate are another sound."""
    batch = pairs(2)
    sounds = batch.sound.samples, batch.sound.references
    values = []
    for rate in (8000, 16000):
        metric = LogMel("mel")
        metric.update(replace(batch, sound=Sound(*sounds, rate)))
        values.append(metric.compute()["value"])
    assert values[0] != values[1]

"""How far the sound beside a clip is from the float model's: by its log-mel spectrogram, and value by value.

Axes: B pairs, A audio channels, T values of each in time; K frequencies, M mel bands, N windows in time. Levels are in
dB of full scale: a sine that just fills 16 bits has 0 dB, summed over its frequencies.
"""

import functools
import warnings

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers.audio_utils import mel_filter_bank

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch, Sound
from viditq.metrics.paired import Paired
from viditq.metrics.streaming import PerSampleMetric
from viditq.wav import FULL_SCALE

LEAST_WINDOW = 16  # values


def heard(batch: EvalBatch, name: str) -> Sound:
    """The sound of each pair; raises UserError where the model makes none."""
    if batch.sound is None:
        raise UserError(
            f"{name} compares sound, and this model makes none beside its frames (LTX-2 and Kandinsky 6 do). Leave the "
            "metric out of metric=[...]."
        )
    return batch.sound


@functools.cache
def filter_bank(size: int, rate: int, bands: int) -> Tensor:
    """Triangles on Slaney's mel scale, each 1 at its peak, float64 [K, M], from 0 Hz to rate / 2.

    A band that lies between two frequencies of a window of `size` values hears nothing and is left out.
    """
    with warnings.catch_warnings():  # of these bands
        warnings.simplefilter("ignore")
        bank = mel_filter_bank(size // 2 + 1, bands, 0.0, rate / 2, rate, norm=None, mel_scale="slaney")
    bank_KM = torch.from_numpy(bank).double()
    return bank_KM[:, bank_KM.sum(0) > 0]


def log_mel(sound: Tensor, rate: int, bands: int, seconds: float, floor: float) -> Tensor:
    """Levels in dB of int16 [..., T], float64 [..., M, N]; what is quieter than `floor` counts as it.

    Hann windows of `seconds`, a quarter of one apart, the first and the last filled up with silence.
    """
    size = max(LEAST_WINDOW, round(seconds * rate))
    window = torch.hann_window(size, dtype=torch.float64, device=sound.device)
    flat = sound.double().flatten(0, -2) / FULL_SCALE
    spectrum = torch.stft(flat, size, size // 4, window=window, pad_mode="constant", return_complex=True)
    power_KN = spectrum.abs().square() * 4 / (size * window.square().sum())
    mel_MN = filter_bank(size, rate, bands).to(sound.device).T @ power_KN
    levels = 10 * mel_MN.clamp(min=10 ** (floor / 10)).log10()
    return levels.unflatten(0, sound.shape[:-1])


class LogMel(PerSampleMetric):
    """Mean difference of the levels of two sounds, |s - r| in dB over mel bands, windows and audio channels.

    bands: of the mel scale; window: its length in seconds; floor: in dB of full scale, below which nothing is heard.
    Raises UserError for values outside of what makes sense, and for a model without sound.
    """

    higher_is_better = False
    reads_sound = True

    def __init__(self, name: str, bands: int = 64, window: float = 0.046, floor: float = -80.0) -> None:
        super().__init__(name, unit="dB")
        for key, value, good, allowed in (
            ("bands", bands, isinstance(bands, int) and bands > 0, "a number of bands, such as 64"),
            ("window", window, 0 < window <= 1, "seconds, above 0 and up to 1"),
            ("floor", floor, floor < 0, "dB of full scale, below 0"),
        ):
            if not good:
                raise UserError(f"{key} is {value!r}. Give {allowed}.")
        self.bands, self.window, self.floor = bands, float(window), float(floor)

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """One value per pair, [B]."""
        sound = heard(batch, self.name)
        # one pair at a time: spectra take 30 times a sound's bytes
        pairs = zip(sound.samples, sound.references, strict=True)
        return {"per_sample": torch.stack([self._distance(sample, other, sound.rate) for sample, other in pairs])}

    def _distance(self, sample_AT: Tensor, reference_AT: Tensor, rate: int) -> Tensor:
        levels = [log_mel(one, rate, self.bands, self.window, self.floor) for one in (sample_AT, reference_AT)]
        return (levels[0] - levels[1]).abs().mean()


class Waveform(Paired):
    """A stock metric in dB of two waveforms, `metric(sample_T, reference_T)`, audio channels one after another.

    Scores are kept within -`ceiling` and `ceiling`, which equal sounds have: one against silence is finite so, and one
    that is the float model's to the bit is not told from silence by what a library adds against division by zero.
    """

    reads_sound = True

    def __init__(self, metric: Metric, name: str, ceiling: float, unit: str = "dB") -> None:
        super().__init__(metric, name, unit, ceiling=ceiling)
        self.limit = float(ceiling)

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """One value per pair, [B]."""
        sound = heard(batch, self.name)
        samples, references = (one.double().flatten(1) / FULL_SCALE for one in (sound.samples, sound.references))
        values = [self._score(sample, other) for sample, other in zip(samples, references, strict=True)]
        per_sample = torch.stack(values).double().clamp(-self.limit, self.limit)
        per_sample[(samples == references).all(1)] = self.limit
        self._refuse_non_finite(per_sample, batch.index)
        return {"per_sample": per_sample}

"""Other voices out of the same recordings, for training: changes of a speaker's tempo, size and channel.

It works on features, so that F0 is estimated once and every epoch differs. Masking (SpecAugment) is the model's own,
see `apply_spec_augment` in the config.
"""

import random

import numpy as np
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

SHORTEST = 4  # frames that tempo leaves an utterance at least
LONGEST_PAUSES = (20, 1000)  # frames, 0.2 and 10 s: range of the longest pause of a batch


class VoicePerturbation:
    r"""Perturbs the features of an utterance, or of each of a `batch`, with factors drawn anew for every one.

    - **tempo**: time is stretched by linear interpolation, `exp(u)` times as fast, u uniform in `[-tempo, tempo]`.
    - **voice**: the vocal tract changes its length, `g = exp(u)`, u uniform in `[-voice, voice]`: mel channel at
      frequency h takes the value from h / g (vocal tract length perturbation, Jaitly and Hinton, ICML workshop 2013),
      and F0 becomes g * F0, as in faster playback. F0 is never interpolated: frames are selected.
    - **f0_drop**: with this probability all F0 and voicing of an utterance is 0, so that a model does not rely on it.
    - **pause**: with this probability a pause is put before or behind each utterance of a batch: digital silence, or
      the utterance's quietest frames in random order. Its longest duration is drawn between 0.2 and 10 s, uniform on a
      logarithmic scale. A batch has pauses or none, as a single long one would have all the others padded.
    - **channel**: the spectrum is tilted, by u uniform in `[-channel, channel]` at the highest mel channel and -u at
      the lowest (units of the extractor: 0.25 is 10 dB), and everything under a floor drawn from `[0, 1.5 * channel]`
      is raised to it, as by noise.

    Voicing follows in time only.

    Args:
        feature_extractor ([`EchoFeatureExtractor`]): defines the channels.
        tempo, voice, channel, f0_drop, pause (`float`, defaults to 0.0): strengths, or probabilities; 0 is off.

    Raises:
        `ValueError`: a strength is negative or above 1, or the features hold no F0 to drop.

    Example:

    ```python
    >>> import numpy as np
    >>> from echo_hf import EchoFeatureExtractor
    >>> from echo_hf.data.augmentation import VoicePerturbation

    >>> perturb = VoicePerturbation(EchoFeatureExtractor(), voice=0.2)
    >>> perturb(np.ones((100, 81), dtype=np.float32)).shape
    (100, 81)

    ```"""

    def __init__(
        self,
        feature_extractor,
        tempo: float = 0.0,
        voice: float = 0.0,
        channel: float = 0.0,
        f0_drop: float = 0.0,
        pause: float = 0.0,
    ):
        strengths = {"tempo": tempo, "voice": voice, "channel": channel, "f0_drop": f0_drop, "pause": pause}
        for name, value in strengths.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}.")
        groups = feature_extractor.feature_groups
        if "pitch" not in groups and f0_drop:
            raise ValueError("f0_drop needs the feature group 'pitch'; leave it out, or add 'pitch': 1.")
        self.tempo, self.voice, self.channel, self.f0_drop, self.pause = strengths.values()
        self.is_active = any(strengths.values())
        self.num_mels = groups["spectrogram"]
        self.has_pitch = "pitch" in groups
        self.has_voicing = "voicing" in groups
        self.top = feature_extractor.sampling_rate / 2
        # Centers of the mel channels.
        self.mels = np.linspace(0.0, hertz_to_mel(self.top, mel_scale="slaney"), self.num_mels + 2)[1:-1]
        self.frequencies = mel_to_hertz(self.mels, mel_scale="slaney")

    def __call__(self, features: np.ndarray, chance: random.Random | None = None) -> np.ndarray:
        """[`batch`](VoicePerturbation.batch) of a single utterance."""
        return self.batch([features], chance)[0]

    def batch(self, utterances: list[np.ndarray], chance: random.Random | None = None) -> list[np.ndarray]:
        """
        Args:
            utterances: features of the extractor, each float32 of shape `(frames, channels)`.
            chance (`random.Random`, *optional*): draws the factors; Python's own when not given.

        Returns:
            As many new arrays, each float32 of shape `(other frames, channels)`.
        """
        chance, longest = chance or random, 0
        if self.pause and chance.random() < self.pause:
            longest = round(np.exp(chance.uniform(*np.log(LONGEST_PAUSES))))
        return [self._perturb(np.array(features, dtype=np.float32), chance, longest) for features in utterances]

    def _perturb(self, features: np.ndarray, chance: random.Random, longest_pause: int) -> np.ndarray:
        if self.tempo:
            features = self._stretch(features, np.exp(chance.uniform(-self.tempo, self.tempo)))
        if longest_pause:
            features = self._add_pause(features, chance, longest_pause)
        spectrogram = features[:, : self.num_mels]
        if self.voice:
            factor = np.exp(chance.uniform(-self.voice, self.voice))
            spectrogram[:] = self._warp(spectrogram, factor)
            if self.has_pitch:
                features[:, -1] *= factor
        if self.f0_drop and chance.random() < self.f0_drop:
            features[:, -1 - self.has_voicing :] = 0.0  # voicing lies before pitch
        if self.channel:
            tilt = chance.uniform(-self.channel, self.channel) * np.linspace(-1.0, 1.0, self.num_mels, dtype=np.float32)
            floor = chance.uniform(0.0, 1.5 * self.channel)
            tilted = np.where(spectrogram > 0, spectrogram + tilt, 0.0)  # silence has no tilt
            spectrogram[:] = np.clip(tilted, floor, 2.0)
        return features

    def _stretch(self, features: np.ndarray, factor: float) -> np.ndarray:
        length = len(features)
        times = np.linspace(0, length - 1, max(round(length / factor), min(SHORTEST, length)))
        stretched = _interpolate(features, times)
        if self.has_pitch:
            stretched[:, -1] = features[np.round(times).astype(int), -1]
        return stretched

    def _add_pause(self, features: np.ndarray, chance: random.Random, longest: int) -> np.ndarray:
        pause = np.zeros((chance.randint(1, longest), features.shape[1]), dtype=np.float32)
        if chance.random() < 0.5:
            loudness = features[:, : self.num_mels].mean(axis=1)
            quietest = np.argsort(loudness, kind="stable")[: max(1, len(features) // 10)]
            rows = [chance.randrange(len(quietest)) for _ in range(len(pause))]
            pause[:, : self.num_mels] = features[quietest[rows], : self.num_mels]
        return np.concatenate((pause, features) if chance.random() < 0.5 else (features, pause))

    def _warp(self, spectrogram: np.ndarray, factor: float) -> np.ndarray:
        """Formants `factor` times as high. The highest channel repeats above the band."""
        sources = hertz_to_mel(np.minimum(self.frequencies / factor, self.top), mel_scale="slaney")
        positions = np.clip((sources - self.mels[0]) / (self.mels[1] - self.mels[0]), 0, self.num_mels - 1)
        return _interpolate(spectrogram.T, positions).T


def _interpolate(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rows at fractional positions, linearly."""
    before = np.floor(positions).astype(int)
    after = np.minimum(before + 1, len(rows) - 1)
    weight = (positions - before).astype(np.float32)[:, None]
    return rows[before] * (1 - weight) + rows[after] * weight

"""Speech for the study: manifests, the conditions under which they are heard, and their features.

A corpus is a folder with `train.jsonl`, `dev.jsonl` and `test.jsonl`, one JSON object a line with `audio` (a path
relative to the folder) and `text`. Features are computed once for each corpus, split and condition, and kept in the
cache folder.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyworld
import soundfile
import soxr

from echo_hf import EchoFeatureExtractor

SAMPLING_RATE = 16000  # Hz
F0_METHOD = "dio"
FRAME_PERIOD = 5.0  # ms, of WORLD's analysis where a voice is flattened
BABBLE_VOICES = 6
NOISES = ("white", "babble")

# What is done to the audio of a clip before its features are computed. F0 is tracked on the result.
CONDITIONS = ("clean", "flattened", *(f"{noise}_{decibels}" for noise in NOISES for decibels in (10, 0)))


def read_manifest(speech: Path, corpus: str, split: str) -> list[dict]:
    """The rows of a split, with `audio` as an absolute path."""
    folder = speech / corpus
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{**row, "audio": str(folder / row["audio"])} for row in rows]


def read_audio(path: str) -> np.ndarray:
    """Samples `(samples,)` at 16 kHz, float32."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    samples = samples.mean(axis=1)
    return samples if rate == SAMPLING_RATE else soxr.resample(samples, rate, SAMPLING_RATE).astype(np.float32)


def flatten(samples: np.ndarray) -> np.ndarray:
    """The clip with its F0 set to the median wherever it is voiced, by WORLD (https://doi.org/10.1587/transinf.2015EDP7457).

    The spectral envelope and the aperiodicity stay, so only cues of pitch in the fine structure of the spectrum go.
    """
    audio = samples.astype(np.float64)
    f0, times = pyworld.dio(audio, SAMPLING_RATE, f0_floor=71.0, f0_ceil=500.0, frame_period=FRAME_PERIOD)
    f0 = pyworld.stonemask(audio, f0, times, SAMPLING_RATE)
    if not (f0 > 0).any():
        return samples
    envelope = pyworld.cheaptrick(audio, f0, times, SAMPLING_RATE)
    aperiodicity = pyworld.d4c(audio, f0, times, SAMPLING_RATE)
    flat = np.where(f0 > 0, np.median(f0[f0 > 0]), 0.0)
    flat = pyworld.synthesize(flat, envelope, aperiodicity, SAMPLING_RATE, FRAME_PERIOD)
    return np.clip(flat[: len(samples)], -1.0, 1.0).astype(np.float32)


def add_noise(samples: np.ndarray, noise: np.ndarray, decibels: float) -> np.ndarray:
    """The clip with noise at a signal-to-noise ratio of `decibels`, over the whole clip."""
    power = np.mean(samples.astype(np.float64) ** 2)
    noise = noise * np.sqrt(power / max(np.mean(noise**2), 1e-12) / 10.0 ** (decibels / 10.0))
    return np.clip(samples + noise, -1.0, 1.0).astype(np.float32)


class Babble:
    """Noise of several voices that speak at once, cut from the training speech of another corpus."""

    def __init__(self, speech: Path, corpus: str = "speechocean762", clips: int = 240):
        rows = read_manifest(speech, corpus, "train")
        rows = rows[:: max(1, len(rows) // clips)]
        audio = [read_audio(row["audio"]) for row in rows]
        voices = [np.concatenate(audio[i::BABBLE_VOICES]) for i in range(BABBLE_VOICES)]
        length = min(map(len, voices))
        self.samples = np.sum([voice[:length] / np.std(voice[:length]) for voice in voices], axis=0)

    def draw(self, length: int, chance: np.random.Generator) -> np.ndarray:
        start = chance.integers(len(self.samples) - length)
        return self.samples[start : start + length]


def hear(samples: np.ndarray, condition: str, seed: int, babble: Babble | None) -> np.ndarray:
    """The clip under a condition; what is random depends on `seed` alone."""
    if condition == "clean":
        return samples
    if condition == "flattened":
        return flatten(samples)
    kind, decibels = condition.split("_")
    chance = np.random.default_rng(seed)
    noise = chance.standard_normal(len(samples)) if kind == "white" else babble.draw(len(samples), chance)
    return add_noise(samples, noise, float(decibels))


class Corpora:
    """Features of corpora, computed once.

    Args:
        speech (`Path`): folder of the corpora.
        cache (`Path`): folder for features.
        num_mel_bins (`int`): channels of the spectrogram; voicing in [0, 1] and F0 in Hz, 0 = unvoiced, follow them.
    """

    def __init__(self, speech: Path, cache: Path, num_mel_bins: int = 80):
        self.speech, self.cache = speech, cache
        groups = {"spectrogram": num_mel_bins, "voicing": 1, "pitch": 1}
        self.extractor = EchoFeatureExtractor(feature_groups=groups, f0_method=F0_METHOD)
        self.babble = None

    def load(self, corpus: str, split: str, condition: str = "clean") -> list[dict]:
        """Rows with `text` and `input_features`, float32 `(frames, channels)`."""
        rows = read_manifest(self.speech, corpus, split)
        key = json.dumps([self.extractor.to_dict(), condition, [row["audio"] for row in rows]], sort_keys=True)
        path = self.cache / f"{corpus}-{split}-{condition}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
        if not path.exists():
            self._compute(rows, condition, path)
        with np.load(path) as stored:
            frames, lengths = stored["frames"], stored["lengths"]
        parts = np.split(frames, np.cumsum(lengths)[:-1])
        return [{**row, "input_features": part.astype(np.float32)} for row, part in zip(rows, parts)]

    def _compute(self, rows: list[dict], condition: str, path: Path):
        if condition.startswith("babble") and self.babble is None:
            self.babble = Babble(self.speech)
        features = []
        for index, row in enumerate(rows):
            samples = hear(read_audio(row["audio"]), condition, index, self.babble)
            features.append(self.extractor(samples, sampling_rate=SAMPLING_RATE)["input_features"][0])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, frames=np.concatenate(features), lengths=np.array([len(part) for part in features]))
        partial.replace(path)


def drop_voicing(rows: list[dict]) -> list[dict]:
    """The same rows without the channel of voicing, for arms with hard decisions."""
    return [{**row, "input_features": np.delete(row["input_features"], -2, axis=1)} for row in rows]


# What is done to F0 after tracking ------------------------------------------------------------------------------------

CONSTANT_F0 = 150.0  # Hz


def draw_donors(number: int, seed: int = 0) -> np.ndarray:
    """For each of `number` utterances the one that it takes F0 from, another one, `(number,)`."""
    order = np.random.default_rng(seed).permutation(number)
    own = np.arange(number)
    return np.where(order == own, (own + 1) % number, order)


def change_f0(features: list[np.ndarray], change: str, seed: int = 0) -> list[np.ndarray]:
    """The same features, each `(frames, channels)`, with another F0 in the last channel.

    - `"real"`: as tracked.
    - `"zero"`: 0 throughout, as where nothing is voiced.
    - `"flag"`: 150 Hz where voiced; only the voicing is left.
    - `"constant"`: 150 Hz in every frame; nothing is left.
    - `"shuffled"`: that of another utterance, stretched to this one's length by nearest index.
    """
    if change == "real":
        return features
    donors = draw_donors(len(features), seed)
    changed = []
    for own, donor in zip(features, donors):
        own = own.copy()
        f0 = own[:, -1]
        if change == "zero":
            f0[:] = 0.0
        elif change == "flag":
            f0[:] = np.where(f0 > 0, CONSTANT_F0, 0.0)
        elif change == "constant":
            f0[:] = CONSTANT_F0
        elif change == "shuffled":
            other = features[donor][:, -1]
            f0[:] = other[np.arange(len(f0)) * len(other) // len(f0)]
        else:
            raise ValueError(f"change {change!r} is not known; choose real, zero, flag, constant or shuffled.")
        changed.append(own)
    return changed

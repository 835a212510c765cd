"""Synthetic audio in which nobody speaks, to train a model to write nothing there.

A kind of sound is a function of the number of samples, a `np.random.Generator` and the sampling rate in Hz that returns
`(samples,)` at any level. Other kinds, for evaluation, are in `benchmarks/non_speech.py`.
"""

import io
from collections.abc import Callable, Mapping
from functools import partial

import datasets
import numpy as np
import soundfile
from datasets import Dataset

LOWEST_NOISE = 20.0  # Hz; colored noise is flat below, where it would be mostly a drift
A4 = 440.0  # Hz
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9))  # semitones: major, minor, pentatonic
CHORDS = ((0,), (0,), (0, 7), (0, 4, 7), (0, 3, 7), (0, 4, 7, 10))  # semitones above the root; single notes twice


def zeros(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    """Digital silence."""
    return np.zeros(samples)


def noise(samples: int, generator: np.random.Generator, rate: int, slope: float) -> np.ndarray:
    """Gaussian noise whose power falls by `slope` times 3 dB an octave: white, pink and brown are 0, 1 and 2."""
    gain = np.maximum(np.fft.rfftfreq(samples, 1.0 / rate), LOWEST_NOISE) ** (-slope / 2.0)
    return np.fft.irfft(np.fft.rfft(generator.standard_normal(samples)) * gain, samples)


def _harmonics(cycles: np.ndarray, amplitudes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Sines at 1, 2, ... times the `cycles` up to each sample, with these amplitudes and random phases."""
    phases = generator.uniform(0.0, 2.0 * np.pi, len(amplitudes))
    signal = np.zeros(len(cycles))
    for number, (amplitude, phase) in enumerate(zip(amplitudes, phases), start=1):
        signal += amplitude * np.sin(2.0 * np.pi * number * cycles + phase)
    return signal


def hum(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    """Mains of 50 or 60 Hz with harmonics up to 1 kHz."""
    mains = generator.choice([50.0, 60.0])
    numbers = np.arange(1, int(min(1000.0, 0.45 * rate) / mains) + 1)
    amplitudes = generator.uniform(0.1, 1.0, len(numbers)) / numbers ** generator.uniform(0.3, 1.5)
    return _harmonics(np.arange(samples) * mains / rate, amplitudes, generator)


def music(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    """Notes and chords of a scale with rests between them, in a random timbre."""
    numbers = np.arange(1, 13)
    amplitudes = generator.uniform(0.0, 1.0, len(numbers)) / numbers ** generator.uniform(0.5, 3.0)
    attack, fade = generator.uniform(0.005, 0.08), generator.choice([0.15, 0.5, 5.0])  # seconds
    scale, root, degree = SCALES[generator.integers(len(SCALES))], generator.integers(-18, 6), 0
    beat = generator.uniform(0.12, 0.5)  # seconds
    signal, start = np.zeros(samples), 0
    while start < samples:
        length = max(2, int(beat * generator.choice([0.5, 1.0, 1.0, 2.0]) * rate))
        if start == 0 or generator.uniform() > 0.15:  # else a rest
            times = np.arange(length) / rate
            release = np.minimum((length / rate - times) / 0.02, 1.0)  # the last 20 ms
            envelope = np.minimum(times / attack, 1.0) * np.exp(-times / fade) * release
            octave, step = divmod(degree, len(scale))
            for interval in CHORDS[generator.integers(len(CHORDS))]:
                frequency = A4 * 2.0 ** ((root + 12 * octave + scale[step] + interval) / 12.0)
                audible = amplitudes[: max(1, int(0.45 * rate / frequency))]
                note = envelope * _harmonics(times * frequency, audible, generator)
                signal[start : start + length] += note[: samples - start]
            degree = int(np.clip(degree + generator.integers(-3, 4), -len(scale), len(scale)))
        start += length
    return signal


def clicks(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    """Ticks of 1 to 30 ms, at random times or at a steady beat."""
    interval = rate / np.exp(generator.uniform(np.log(0.8), np.log(15.0)))  # samples
    is_regular = generator.uniform() < 0.5
    fade, frequency = generator.uniform(0.001, 0.03), generator.uniform(500.0, min(6000.0, 0.45 * rate))
    times = np.arange(int(5 * fade * rate) + 1) / rate
    tick = np.exp(-times / fade) * np.cos(2.0 * np.pi * frequency * times)
    signal, position = np.zeros(samples), generator.uniform(0.0, min(interval, samples))  # so there is one at least
    while position < samples:
        start = int(position)
        size = 1.0 if is_regular else generator.uniform(0.2, 1.0)
        signal[start : start + len(tick)] += size * tick[: samples - start]
        position += interval if is_regular else generator.exponential(interval)
    return signal


TRAINING_KINDS: dict[str, Callable] = {
    "zeros": zeros,
    "white_noise": partial(noise, slope=0.0),
    "pink_noise": partial(noise, slope=1.0),
    "brown_noise": partial(noise, slope=2.0),
    "hum": hum,
    "music": music,
    "clicks": clicks,
}


def make_signal(
    kind: Callable, seconds: float, generator: np.random.Generator, level: float = -20.0, sampling_rate: int = 16000
) -> np.ndarray:
    """
    A signal of a kind of sound.

    Args:
        kind (`Callable`): of [`TRAINING_KINDS`], or another one.
        seconds (`float`): duration; at least one sample.
        generator (`np.random.Generator`): draws all that is random.
        level (`float`, defaults to -20.0):
            Root mean square in dBFS, at most 0. A signal with peaks above 1, such as loud clicks, is made quieter.
        sampling_rate (`int`, defaults to 16000): Hz.

    Returns:
        `np.ndarray`: float32, shape `(samples,)`, in [-1, 1].

    Raises:
        `ValueError`: there is not one sample, or the level is above 0.
    """
    samples = round(seconds * sampling_rate)
    if samples < 1:
        raise ValueError(f"{seconds} seconds at {sampling_rate} Hz are not one sample.")
    if not level <= 0:
        raise ValueError(f"level must be at most 0 dBFS, got {level}.")
    signal = kind(samples, generator, sampling_rate)
    peak = np.abs(signal).max()
    if peak > 0:
        signal = signal * min(10.0 ** (level / 20.0) / np.sqrt(np.mean(signal**2)), 1.0 / peak)
    return np.clip(signal, -1.0, 1.0).astype(np.float32)


def non_speech_table(
    count: int,
    seed: int,
    kinds: Mapping[str, Callable] = TRAINING_KINDS,
    seconds: tuple[float, float] = (0.3, 4.0),
    levels: tuple[float, float] = (-60.0, -20.0),
    sampling_rate: int = 16000,
) -> Dataset:
    """
    Clips that are not speech, as a table of utterances without words.

    A row depends on the seed and its number alone: a longer table begins with the rows of a shorter one.

    Args:
        count (`int`): number of clips.
        seed (`int`): of durations, levels and signals.
        kinds (`Mapping[str, Callable]`, defaults to [`TRAINING_KINDS`]): kinds of sound by name, taken in turns.
        seconds (`tuple[float, float]`, defaults to `(0.3, 4.0)`): shortest and longest clip; drawn evenly between.
        levels (`tuple[float, float]`, defaults to `(-60.0, -20.0)`): softest and loudest, dBFS; drawn evenly between.
        sampling_rate (`int`, defaults to 16000): Hz.

    Returns:
        `datasets.Dataset`: of [`table_of_signals`]; `origin` has number, kind and level.

    Raises:
        `ValueError`: there is no clip or no kind, or a duration or level cannot be made.

    Example:

    ```python
    >>> from echo_hf.data.non_speech import non_speech_table

    >>> table = non_speech_table(3, seed=0)
    >>> table.column_names, table["text"][:]
    (['audio', 'text', 'origin'], ['', '', ''])
    >>> table["origin"][1]
    'non-speech 1 of seed 0 (white_noise, ... dBFS)'

    ```
    """
    if count < 1 or not kinds:
        raise ValueError(f"A table needs a clip and a kind at least, got count={count} and kinds={tuple(kinds)}.")
    signals, origins, names = [], [], list(kinds)
    for row in range(count):
        generator, name = np.random.default_rng((seed, row)), names[row % len(names)]
        duration, level = generator.uniform(*seconds), generator.uniform(*levels)
        signals.append(make_signal(kinds[name], duration, generator, level, sampling_rate))
        origins.append(f"non-speech {row} of seed {seed} ({name}, {level:.0f} dBFS)")
    return table_of_signals(signals, origins, sampling_rate)


def table_of_signals(signals: list[np.ndarray], origins: list[str], sampling_rate: int) -> Dataset:
    """
    Signals at a sampling rate in Hz as utterances without words: `audio` (undecoded 16-bit FLAC in memory), `text`
    (`""`) and `origin`, as of [`~echo_hf.data.load_sources`]. [`~echo_hf.data.prepare_dataset`] takes the table with
    `allow_empty_text`.
    """
    audio = []
    for signal in signals:
        file = io.BytesIO()
        soundfile.write(file, signal, sampling_rate, format="FLAC", subtype="PCM_16")
        audio.append({"bytes": file.getvalue(), "path": None})
    table = Dataset.from_dict({"audio": audio, "text": [""] * len(audio), "origin": origins})
    return table.cast_column("audio", datasets.Audio(decode=False))


__all__ = ["TRAINING_KINDS", "make_signal", "non_speech_table", "table_of_signals"]

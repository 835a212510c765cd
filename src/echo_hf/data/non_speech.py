"""Audio in which nobody speaks, to train a model to write nothing there.

All of it is computed, none recorded, and the same for the same seed. Training takes [`TRAINING_KINDS`] only. The
[`FURTHER_KINDS`] are for evaluation (`benchmarks/non_speech.py`) and must never be trained on: their figures tell what
a model does with sounds of a kind that it has not met.
"""

import io
from collections.abc import Sequence

import datasets
import numpy as np
import soundfile
from datasets import Dataset

TRAINING_KINDS = ("zeros", "white_noise", "pink_noise", "brown_noise", "hum", "chords", "melody", "clicks")
FURTHER_KINDS = ("sweep", "wind", "bursts", "engine")  # for evaluation alone

LOWEST_NOISE = 20.0  # Hz; coloured noise is flat below, where it would be mostly a drift
A4 = 440.0  # Hz
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9))  # semitones: major, minor, pentatonic
CHORDS = ((0, 4, 7), (0, 3, 7), (0, 4, 7, 10), (0, 5, 7), (0, 7, 12))  # semitones above the root


# Signals -------------------------------------------------------------------------------------------------------------


def non_speech_signal(
    kind: str, seconds: float, generator: np.random.Generator, level: float = -20.0, sampling_rate: int = 16000
) -> np.ndarray:
    """
    Audio of a kind that is not speech.

    | kind | what it is |
    |---|---|
    | `zeros` | digital silence; it has no level |
    | `white_noise`, `pink_noise`, `brown_noise` | Gaussian noise whose power falls by 0, 3 and 6 dB an octave |
    | `hum` | mains of 50 or 60 Hz with harmonics up to 1 kHz |
    | `chords` | chords of three or four notes, one after the other, in one of several timbres |
    | `melody` | notes of a scale with rests between them, in one of several timbres |
    | `clicks` | ticks of 1 to 30 ms, at random times or as regular as a clock |
    | `sweep` | a sine that glides up and down like a siren, within 80 Hz to 7 kHz |
    | `wind` | noise falling by 6 dB an octave, in gusts |
    | `bursts` | bursts of coloured noise of 50 to 200 ms, 2 to 6 times a second, as often as syllables |
    | `engine` | a buzz of many harmonics whose F0 wanders, between 50 and 250 Hz at the start |

    The first eight are [`TRAINING_KINDS`], the others [`FURTHER_KINDS`].

    Args:
        kind (`str`): one of the table.
        seconds (`float`): duration; at least one sample.
        generator (`np.random.Generator`): draws all that is random; in the same state it gives the same signal.
        level (`float`, defaults to -20.0):
            Root mean square in dB relative to 1, the full scale (dBFS); 0 at most. What would have peaks above 1, such
            as loud clicks, is made quieter until they are 1.
        sampling_rate (`int`, defaults to 16000): Hz.

    Returns:
        `np.ndarray`: float32, shape `(samples,)`, in [-1, 1].

    Raises:
        `ValueError`: the kind is not known, there is not one sample, or the level is above 0.

    Example:

    ```python
    >>> import numpy as np
    >>> from echo_hf.data.non_speech import non_speech_signal

    >>> hum = non_speech_signal("hum", 2.0, np.random.default_rng(0), level=-40.0)
    >>> hum.shape, round(float(np.sqrt(np.mean(hum**2))), 4)
    ((32000,), 0.01)

    ```
    """
    if kind not in _SIGNALS:
        raise ValueError(f"{kind!r} is no kind of audio known here; choose among {', '.join(_SIGNALS)}.")
    samples = round(seconds * sampling_rate)
    if samples < 1:
        raise ValueError(f"{seconds} seconds at {sampling_rate} Hz are not one sample.")
    if not level <= 0:
        raise ValueError(f"level must be at most 0 dBFS, got {level}.")
    signal = _SIGNALS[kind](samples, generator, sampling_rate)
    loudness, peak = np.sqrt(np.mean(signal**2)), np.abs(signal).max()
    if peak > 0:
        signal = signal * min(10.0 ** (level / 20.0) / loudness, 1.0 / peak)
    return np.clip(signal, -1.0, 1.0).astype(np.float32)


def _zeros(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    return np.zeros(samples)


def _noise(samples: int, generator: np.random.Generator, rate: int, slope: float) -> np.ndarray:
    """Gaussian noise whose power falls by `slope` times 3 dB an octave."""
    frequencies = np.fft.rfftfreq(samples, 1.0 / rate)
    gain = np.maximum(frequencies, LOWEST_NOISE) ** (-slope / 2.0)
    return np.fft.irfft(np.fft.rfft(generator.standard_normal(samples)) * gain, samples)


def _white_noise(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    return generator.standard_normal(samples)


def _pink_noise(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    return _noise(samples, generator, rate, slope=1.0)


def _brown_noise(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    return _noise(samples, generator, rate, slope=2.0)


def _wander(samples: int, generator: np.random.Generator, rate: int, hertz: float) -> np.ndarray:
    """A smooth random curve with about `hertz` turns a second, mostly within [-2, 2]."""
    knots = generator.standard_normal(int(samples / rate * hertz) + 3)
    positions = np.arange(samples) * hertz / rate + generator.uniform()
    before = positions.astype(int)
    weight = 0.5 - 0.5 * np.cos(np.pi * (positions - before))
    return knots[before] * (1.0 - weight) + knots[before + 1] * weight


def _harmonics(cycles: np.ndarray, amplitudes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Sines at 1, 2, ... times the `cycles` gone by at each sample, each with an amplitude and a random phase."""
    phases = generator.uniform(0.0, 2.0 * np.pi, len(amplitudes))
    signal = np.zeros(len(cycles))
    for number, (amplitude, phase) in enumerate(zip(amplitudes, phases), start=1):
        if amplitude:
            signal += amplitude * np.sin(2.0 * np.pi * number * cycles + phase)
    return signal


def _hum(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    mains = generator.choice([50.0, 60.0])
    numbers = np.arange(1, int(min(1000.0, 0.45 * rate) / mains) + 1)
    amplitudes = generator.uniform(0.1, 1.0, len(numbers)) / numbers ** generator.uniform(0.3, 1.5)
    return _harmonics(np.arange(samples) * mains / rate, amplitudes, generator)


def _timbre(generator: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """How an instrument sounds: amplitudes of its harmonics, seconds of attack, seconds in which a note fades."""
    numbers = np.arange(1, 13)
    amplitudes = [
        (numbers == 1) * 1.0,  # a tuning fork
        1.0 / numbers**2,  # a flute
        1.0 / numbers,  # strings
        (numbers % 2) / numbers,  # a clarinet
        generator.uniform(0.0, 1.0, len(numbers)) / numbers,  # like none
    ][generator.integers(5)]
    attack = generator.uniform(0.005, 0.08)
    fade = generator.choice([0.15, 0.5, 5.0])  # plucked, struck, bowed
    return amplitudes, attack, fade


def _note(
    semitones: float, samples: int, timbre: tuple[np.ndarray, float, float], generator: np.random.Generator, rate: int
) -> np.ndarray:
    """A note so far above or below A4, with its envelope."""
    amplitudes, attack, fade = timbre
    frequency = A4 * 2.0 ** (semitones / 12.0)
    amplitudes = amplitudes[: max(1, int(0.45 * rate / frequency))]
    times = np.arange(samples) / rate
    release = (samples - np.arange(samples)) / rate / 0.02  # the last 20 ms
    envelope = np.minimum(times / attack, 1.0) * np.exp(-times / fade) * np.minimum(release, 1.0)
    return envelope * _harmonics(times * frequency, amplitudes, generator)


def _chords(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    timbre, signal, start = _timbre(generator), np.zeros(samples), 0
    while start < samples:
        length = max(2, int(generator.uniform(0.3, 1.5) * rate))
        root, notes = generator.integers(-24, 4), CHORDS[generator.integers(len(CHORDS))]
        chord = sum(_note(root + note, length, timbre, generator, rate) for note in notes)
        signal[start : start + length] = chord[: samples - start]
        start += length
    return signal


def _melody(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    timbre, signal, start = _timbre(generator), np.zeros(samples), 0
    scale, root, degree = SCALES[generator.integers(len(SCALES))], generator.integers(-18, 6), 0
    beat = generator.uniform(0.12, 0.4)  # seconds
    while start < samples:
        length = max(2, int(beat * generator.choice([0.5, 1.0, 1.0, 2.0]) * rate))
        if start == 0 or generator.uniform() > 0.15:  # else a rest
            octave, step = divmod(degree, len(scale))
            note = _note(root + 12 * octave + scale[step], length, timbre, generator, rate)
            signal[start : start + length] = note[: samples - start]
            degree = int(np.clip(degree + generator.integers(-3, 4), -len(scale), len(scale)))
        start += length
    return signal


def _clicks(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    interval = rate / np.exp(generator.uniform(np.log(0.8), np.log(15.0)))  # samples
    regular = generator.uniform() < 0.5
    fade, frequency = generator.uniform(0.001, 0.03), generator.uniform(500.0, min(6000.0, 0.45 * rate))
    times = np.arange(int(5 * fade * rate) + 1) / rate
    tick = np.exp(-times / fade) * np.cos(2.0 * np.pi * frequency * times)
    signal, position = np.zeros(samples), generator.uniform(0.0, min(interval, samples))  # so there is one at least
    while position < samples:
        start = int(position)
        size = 1.0 if regular else generator.uniform(0.2, 1.0)
        signal[start : start + len(tick)] += size * tick[: samples - start]
        position += interval if regular else generator.exponential(interval)
    return signal


def _sweep(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    low, high = np.sort(generator.uniform(np.log(80.0), np.log(min(7000.0, 0.45 * rate)), 2))
    position = np.arange(samples) / rate / generator.uniform(0.3, 3.0) + generator.uniform()
    height = np.abs(2.0 * (position % 1.0) - 1.0)  # up and down once in that many seconds
    cycles = np.cumsum(np.exp(low + (high - low) * height)) / rate
    return np.sin(2.0 * np.pi * cycles)


def _wind(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    gusts = 10.0 ** (0.4 * _wander(samples, generator, rate, hertz=generator.uniform(0.3, 1.5)))
    return gusts * _brown_noise(samples, generator, rate)


def _bursts(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    noise = _noise(samples, generator, rate, slope=generator.uniform(-1.0, 1.5))
    interval = rate / generator.uniform(2.0, 6.0)  # samples
    envelope, position = np.zeros(samples), 0.0
    while position < samples:
        length = int(generator.uniform(0.05, 0.2) * rate) + 1
        shape = np.hanning(length + 2)[1:-1] * generator.uniform(0.3, 1.0)
        start = int(position)
        piece = envelope[start : start + length]
        np.maximum(piece, shape[: len(piece)], out=piece)
        position += interval * generator.uniform(0.6, 1.4)
    return envelope * noise


def _engine(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    base = np.exp(generator.uniform(np.log(50.0), np.log(250.0)))
    f0 = base * np.exp(0.15 * _wander(samples, generator, rate, hertz=1.0))
    numbers = np.arange(1, max(1, int(min(4000.0, 0.45 * rate) / f0.max())) + 1)
    amplitudes = generator.uniform(0.2, 1.0, len(numbers)) / numbers ** generator.uniform(0.3, 1.2)
    buzz = _harmonics(np.cumsum(f0) / rate, amplitudes, generator)
    noise = _pink_noise(samples, generator, rate)
    return buzz + 0.1 * noise * np.sqrt(np.mean(buzz**2) / np.mean(noise**2))


_SIGNALS = {
    "zeros": _zeros,
    "white_noise": _white_noise,
    "pink_noise": _pink_noise,
    "brown_noise": _brown_noise,
    "hum": _hum,
    "chords": _chords,
    "melody": _melody,
    "clicks": _clicks,
    "sweep": _sweep,
    "wind": _wind,
    "bursts": _bursts,
    "engine": _engine,
}


# Tables --------------------------------------------------------------------------------------------------------------


def non_speech_table(
    count: int,
    seed: int,
    kinds: Sequence[str] = TRAINING_KINDS,
    seconds: tuple[float, float] = (0.3, 4.0),
    levels: tuple[float, float] = (-60.0, -20.0),
    sampling_rate: int = 16000,
) -> Dataset:
    """
    Clips that are not speech, as a table of utterances without words, to be put beside a table of speech.

    Each row hangs on the seed and its number alone: a longer table begins with the rows of a shorter one.

    Args:
        count (`int`): number of clips.
        seed (`int`): of kinds of sound, durations and levels.
        kinds (`Sequence[str]`, defaults to [`TRAINING_KINDS`]):
            What to make, see [`non_speech_signal`]; in turns, so that each is there as often as the others, to one.
        seconds (`tuple[float, float]`, defaults to `(0.3, 4.0)`): shortest and longest clip; drawn evenly between.
        levels (`tuple[float, float]`, defaults to `(-60.0, -20.0)`): softest and loudest, dBFS; drawn evenly between.
        sampling_rate (`int`, defaults to 16000): Hz.

    Returns:
        `datasets.Dataset`: the columns that [`~echo_hf.data.load_sources`] gives, and so fit to be concatenated with
        its tables: `audio` (undecoded 16-bit FLAC in memory, `{"bytes", "path": None}`), `text` (`""`) and `origin`
        (number, kind and level). [`~echo_hf.data.prepare_dataset`] takes it with `allow_empty_text`.

    Raises:
        `ValueError`: `count` is below 1, or a kind, duration or level cannot be made.

    Example:

    ```python
    >>> from echo_hf.data.non_speech import non_speech_table

    >>> table = non_speech_table(3, seed=0, kinds=("zeros", "hum"))
    >>> table.column_names, table["text"][:]
    (['audio', 'text', 'origin'], ['', '', ''])
    >>> table["origin"][1]
    'non-speech 1 of seed 0 (hum, ... dBFS)'

    ```
    """
    if count < 1 or not kinds:
        raise ValueError(f"A table needs a clip and a kind at least, got count={count} and kinds={tuple(kinds)}.")
    signals, origins = [], []
    for row in range(count):
        generator, kind = np.random.default_rng((seed, row)), kinds[row % len(kinds)]
        duration, level = generator.uniform(*seconds), generator.uniform(*levels)
        signals.append(non_speech_signal(kind, duration, generator, level, sampling_rate))
        origins.append(f"non-speech {row} of seed {seed} ({kind}, {level:.0f} dBFS)")
    return table_of_signals(signals, origins, sampling_rate)


def table_of_signals(signals: list[np.ndarray], origins: list[str], sampling_rate: int) -> Dataset:
    """Utterances without words of signals at a sampling rate in Hz, each with what an error message calls it."""
    audio = []
    for signal in signals:
        file = io.BytesIO()
        soundfile.write(file, signal, sampling_rate, format="FLAC", subtype="PCM_16")
        audio.append({"bytes": file.getvalue(), "path": None})
    table = Dataset.from_dict({"audio": audio, "text": [""] * len(audio), "origin": origins})
    return table.cast_column("audio", datasets.Audio(decode=False))


__all__ = ["FURTHER_KINDS", "TRAINING_KINDS", "non_speech_signal", "non_speech_table"]

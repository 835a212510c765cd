"""Audio in which nobody speaks: to train a model to write nothing there, and to measure whether it does.

All of it is computed, none recorded, and the same for the same seed. Training takes [`TRAINING_KINDS`] only. What an
evaluation has besides, [`FURTHER_KINDS`], must never be trained on: its figures tell what a model does with sounds of a
kind that it has not met.
"""

import io
import os
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import soundfile
from datasets import Dataset

from .data import load_sources
from .data import prepare_dataset
from .metrics import format_table
from .metrics import normalize_text
from .metrics import score
from .transcription import bundled_recordings
from .transcription import make_pipeline
from .transcription import recognize

TRAINING_KINDS = ("zeros", "white_noise", "pink_noise", "brown_noise", "hum", "chords", "melody", "clicks")
FURTHER_KINDS = ("sweep", "wind", "bursts", "engine")  # for evaluation alone

LOWEST_NOISE = 20.0  # Hz; coloured noise is flat below, where it would be mostly a drift
A4 = 440.0  # Hz
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9))  # semitones: major, minor, pentatonic
CHORDS = ((0, 4, 7), (0, 3, 7), (0, 4, 7, 10), (0, 5, 7), (0, 7, 12))  # semitones above the root


CLIP_SECONDS = (1.0, 8.0)  # of the clips that are measured
EVALUATION_SEEDS = 1_000_000  # added to the seed, so that no clip repeats one of a training run with the same
TAIL_SECONDS = 10.0
TAILS = {  # what follows speech: a kind of sound and its level in dBFS
    "silence": ("zeros", 0.0),
    "noise, -60 dBFS": ("pink_noise", -60.0),
    "noise, -40 dBFS": ("pink_noise", -40.0),
}


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
    >>> from echo_hf.non_speech import non_speech_signal

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
    >>> from echo_hf.non_speech import non_speech_table

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
    return _make_table(signals, origins, sampling_rate)


def _make_table(signals: list[np.ndarray], origins: list[str], sampling_rate: int) -> Dataset:
    audio = []
    for signal in signals:
        file = io.BytesIO()
        soundfile.write(file, signal, sampling_rate, format="FLAC", subtype="PCM_16")
        audio.append({"bytes": file.getvalue(), "path": None})
    table = Dataset.from_dict({"audio": audio, "text": [""] * len(audio), "origin": origins})
    return table.cast_column("audio", datasets.Audio(decode=False))


# What a model makes of it --------------------------------------------------------------------------------------------


def measure_non_speech(
    model,
    processor,
    sources: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    count: int = 20,
    seed: int = 0,
    batch_size: int = 16,
    cache_dir: str | os.PathLike | None = None,
    **generate_kwargs,
) -> dict[str, Any]:
    """
    Counts the words that are written where nobody speaks: for clips that are not speech, and for speech that
    [`TAIL_SECONDS`] of silence or low noise follow.

    Three ways of asking stand side by side: `"model"`, whose `generate()` gets the features of the whole clip;
    `"no silence scaling"`, the same with `silence_scaling` switched off for the time, if the checkpoint has it; and
    `"pipeline"`, which leaves silence out by itself before the model is asked.

    Args:
        model ([`EchoForConditionalGeneration`] or [`EchoForCTC`]): the recogniser.
        processor ([`EchoProcessor`]): the model's.
        sources (*optional*): speech, as [`~echo_hf.data.load_sources`] takes it; the recordings that come with the
            package when not given. What was said does not matter.
        count (`int`, defaults to 20): clips of each kind, and recordings of speech at most, which are drawn.
        seed (`int`, defaults to 0): of all that is drawn. Clips of all kinds have the same durations and levels.
        batch_size (`int`, defaults to 16): clips at a time.
        cache_dir (`str`, *optional*): folder for features, as of [`~echo_hf.data.prepare_dataset`].
        generate_kwargs: passed on to `generate()`, e.g. `num_beams`; a CTC model takes none.

    Returns:
        `dict`: `"clips"` and `"tails"`, lists of rows.

            - A row of clips has `kind` (the last two rows sum up), `trainable` (whether the kind is one of
              [`TRAINING_KINDS`]), `clips`, `seconds` (of audio) and, under each way of asking, `not_empty` (share of
              clips with a text) and `words_per_minute` (of audio).
            - A row of tails has `tail`, `recordings` and, under each way, `words` (written without the tail), `edits`
              (word edit distance from the transcript without the tail to that with it), `insertions` (the edits that
              are words more) and `changed` (share of transcripts that are another text).

            Words are compared as [`~echo_hf.metrics.normalize_text`] leaves them.

    Raises:
        `ValueError`: a source cannot be used, or `count` is below 1.
    """
    rate, kinds = processor.feature_extractor.sampling_rate, (*TRAINING_KINDS, *FURTHER_KINDS)
    seed += EVALUATION_SEEDS
    clips = [non_speech_table(count, seed, (kind,), CLIP_SECONDS, sampling_rate=rate) for kind in kinds]
    speech = load_sources(bundled_recordings()[0].parent if sources is None else sources)
    if len(speech) > count:
        speech = speech.select(np.sort(np.random.default_rng(seed).choice(len(speech), count, replace=False)))
    table = datasets.concatenate_datasets([*clips, *_with_tails(speech, processor.feature_extractor, seed)])
    prepared = prepare_dataset(table, processor, allow_empty_text=True, cache_dir=cache_dir).dataset

    def ask_model():
        return recognize(model, processor, prepared, batch_size, **generate_kwargs)[0]

    def ask_pipeline():
        options = {"generate_kwargs": generate_kwargs} if generate_kwargs else {}
        audio = [audio["bytes"] for audio in table["audio"]]
        return [result["text"] for result in make_pipeline(model, processor)(audio, batch_size=batch_size, **options)]

    texts = {"model": ask_model()}
    if model.config.silence_scaling:
        with _without_silence_scaling(model.config):
            texts["no silence scaling"] = ask_model()
    texts["pipeline"] = ask_pipeline()

    # All lies in the order of the table: `count` clips of each kind, then the speech without a tail and with each.
    lengths = prepared["length"][:]
    frame_seconds = processor.feature_extractor.hop_length / rate
    first, further = len(kinds) * count, len(TRAINING_KINDS) * count
    groups = {kind: slice(index * count, (index + 1) * count) for index, kind in enumerate(kinds)}
    groups |= {"all for training": slice(0, further), "all never trained on": slice(further, first)}
    clip_rows = []
    for name, rows in groups.items():
        seconds = sum(lengths[rows]) * frame_seconds
        row = {"kind": name, "trainable": rows.stop <= further, "clips": rows.stop - rows.start}
        row["seconds"] = round(seconds, 2)
        clip_rows.append(row | {way: _count_words(written[rows], seconds) for way, written in texts.items()})
    tail_rows = []
    plain = slice(first, first + len(speech))
    for index, tail in enumerate(TAILS, start=1):
        rows = slice(first + index * len(speech), first + (index + 1) * len(speech))
        compared = {way: _compare(written[plain], written[rows]) for way, written in texts.items()}
        tail_rows.append({"tail": tail, "recordings": len(speech)} | compared)
    return {"clips": clip_rows, "tails": tail_rows}


def _with_tails(speech: Dataset, extractor, seed: int) -> list[Dataset]:
    """The speech as it is, then followed by each of the tails."""
    rate, generator = extractor.sampling_rate, np.random.default_rng(seed)
    waveforms = [extractor._read(row["audio"], row["origin"], None, resample=True) for row in speech]
    tables = [_make_table(waveforms, speech["origin"][:], rate)]
    for name, (kind, level) in TAILS.items():
        longer = [
            np.concatenate([waveform, non_speech_signal(kind, TAIL_SECONDS, generator, level, rate)])
            for waveform in waveforms
        ]
        tables.append(_make_table(longer, [f"{origin}, then {name}" for origin in speech["origin"]], rate))
    return tables


@contextmanager
def _without_silence_scaling(config) -> Iterator[None]:
    config.silence_scaling = False
    try:
        yield
    finally:
        config.silence_scaling = True


def _count_words(texts: list[str], seconds: float) -> dict[str, float]:
    words = sum(len(normalize_text(text).split()) for text in texts)
    return {
        "not_empty": sum(bool(text.strip()) for text in texts) / len(texts),
        "words_per_minute": words / seconds * 60.0,
    }


def _compare(plain: list[str], followed: list[str]) -> dict[str, float | int]:
    result = score(plain, followed)
    return {
        "words": result.words.total,
        "edits": result.words.errors,
        "insertions": result.words.insertions,
        "changed": 1.0 - result.exact / result.utterances,
    }


def format_non_speech(report: dict[str, Any]) -> str:
    """
    What [`measure_non_speech`] found, as two tables in Markdown. Cells have a figure for each way of asking, in the
    order that the heading says.
    """
    ways = [name for name, value in report["clips"][0].items() if isinstance(value, dict)]
    heading = " / ".join(ways)

    def cell(row: dict[str, Any], write: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(write(row[way]) for way in ways)

    clips = [
        {
            "kind": row["kind"],
            "for training": "yes" if row["trainable"] else "never",
            "clips": row["clips"],
            "seconds": f"{row['seconds']:.0f}",
            "clips with a text": cell(row, lambda found: f"{found['not_empty']:.0%}"),
            "words a minute": cell(row, lambda found: f"{found['words_per_minute']:.1f}"),
        }
        for row in report["clips"]
    ]
    tails = [
        {
            f"speech, then {TAIL_SECONDS:g} s of": row["tail"],
            "recordings": row["recordings"],
            "words without": cell(row, lambda found: str(found["words"])),
            "words edited (inserted)": cell(row, lambda found: f"{found['edits']} ({found['insertions']})"),
            "transcripts changed": cell(row, lambda found: f"{found['changed']:.0%}"),
        }
        for row in report["tails"]
    ]
    return f"In each cell: {heading}.\n\n{format_table(clips)}\n\n{format_table(tails)}"


__all__ = [
    "FURTHER_KINDS",
    "TRAINING_KINDS",
    "format_non_speech",
    "measure_non_speech",
    "non_speech_signal",
    "non_speech_table",
]

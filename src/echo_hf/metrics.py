"""Error rates of words, characters and tones, counted over a whole corpus; and how good an F0 tracker is.

Rates are sums of errors over sums of reference words (or characters), never means of the rates of utterances. The
alignment is jiwer's, which works offline and is imported where texts are scored; F0 needs numpy alone. Text is
normalised before it is compared; Transformers' Whisper `BasicTextNormalizer` is not used for that, because it deletes
whatever stands in brackets, turns apostrophes into spaces ("don't" becomes two words) and takes out combining marks,
without which Hindi or Thai is another text.
"""

import math
import re
import unicodedata
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Rate(NamedTuple):
    """What a rate is called, how [`Score.to_dict`] calls its errors and its references, and the unit of both."""

    name: str
    full_name: str
    errors: str
    total: str
    unit: str


RATES = {
    "wer": Rate("WER", "word error rate", "word_errors", "reference_words", "words"),
    "cer": Rate("CER", "character error rate", "character_errors", "reference_characters", "characters"),
    "tone_error_rate": Rate("tone error", "tone error rate", "tone_errors", "reference_tones", "tones"),
    "base_syllable_error_rate": Rate(
        "base-syllable error",
        "base-syllable error rate",
        "base_syllable_errors",
        "reference_base_syllables",
        "base syllables",
    ),
}

# A syllable with its tone, as in toned pinyin (`shang4`) and Jyutping (`baa1`): letters, and one digit at the end. The
# colon stands for the two dots of a u (`nu:3`, `lu:e4`).
TONED_SYLLABLE = re.compile(r"([^\W\d_]+(?::[^\W\d_]*)?)([0-9])")
UMLAUT = re.compile(r"\b([ln])u:(?=(?:e|an|n)?[0-9]\b)")
NO_TONE = "-"  # of a word that is no such syllable; no reference has it

# Typed for an apostrophe: typewriter, typographic and modifier letter (NFKC turns the full-width sign into the first).
APOSTROPHES = "'\u2019\u02bc"
# Tone letters (U+02E5 to U+02E9) are symbols to Unicode, but belong to the word in which they stand.
TONE_LETTERS = "\u02e5\u02e6\u02e7\u02e8\u02e9"


def has_half_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, as JSON may: no character, and nothing that UTF-8 can write."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def normalize_text(text: str) -> str:
    """
    Text as it is scored: Unicode NFKC, lower case, punctuation and symbols replaced by a space, whitespace collapsed.

    An apostrophe beside a letter or digit stays, in one spelling (`'`); letters, digits, combining marks and tone
    letters of every script stay. Numbers are not spelled out. Toned pinyin may have a colon for the dots of a `\u00fc`
    (`nu:3`), which becomes that letter.

    Args:
        text (`str`): what was said, or what was recognised.

    Returns:
        `str`: the normalised text, without whitespace at its ends; may be empty.

    Example:

    ```python
    >>> from echo_hf.metrics import normalize_text

    >>> normalize_text("  Don\u2019t PANIC -- it's 9\u2009o'clock!")
    "don't panic it's 9 o'clock"

    ```
    """
    # Lower case may undo composition (a capital I with a dot becomes two code points), hence NFKC after it.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    text = UMLAUT.sub("\\1\u00fc", text)
    kept = []
    for position, character in enumerate(text):
        if character in APOSTROPHES:
            neighbours = text[max(0, position - 1) : position] + text[position + 1 : position + 2]
            kept.append("'" if any(neighbour.isalnum() for neighbour in neighbours) else " ")
        elif unicodedata.category(character)[0] in "PS" and character not in TONE_LETTERS:
            kept.append(" ")
        else:
            kept.append(character)
    return " ".join("".join(kept).split())


@dataclass(frozen=True)
class ErrorCounts:
    """
    Errors of one kind, such as words or characters, summed over a corpus.

    Args:
        substitutions (`int`): units recognised as another one.
        deletions (`int`): units of the references that were not recognised.
        insertions (`int`): units recognised that no reference has.
        total (`int`): units in the references.
    """

    substitutions: int
    deletions: int
    insertions: int
    total: int

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors as a share of the reference units (may exceed 1); NaN when the references hold none."""
        return self.errors / self.total if self.total else math.nan


@dataclass(frozen=True)
class Score:
    """
    Error counts of a corpus.

    Tones and base syllables are counted where every word of the references is a syllable with its tone: letters and one
    digit, as in toned pinyin (`shang4 ren4`) and Jyutping (`baa1`). [`Score.wer`] is then the error rate of syllables
    with their tones. Tones are the sequence of the digits, base syllables that of what stands before them. Each
    sequence is aligned by itself, so neither has more errors than the words have.

    A recognised word that is not letters and one digit has no tone. A placeholder, which equals no tone, stands for it,
    so it is an error; as a base syllable it counts as it is. In place of "ma3", "ma" is an error of the tone alone,
    "mo3" one of the base syllable alone, "ma33" one of both.

    Args:
        words ([`ErrorCounts`]): counts of words; words are what whitespace separates.
        characters ([`ErrorCounts`]): counts of characters, the space between words being one.
        utterances (`int`): number of pairs compared.
        empty_references (`list[int]`):
            Positions of the pairs whose reference is empty once normalised. What was recognised there counts as
            insertions.
        exact (`int`): number of utterances recognised without an error.
        tones ([`ErrorCounts`], *optional*): counts of tones, where the references are toned syllables.
        base_syllables ([`ErrorCounts`], *optional*): counts of syllables without their tones, there too.
    """

    words: ErrorCounts
    characters: ErrorCounts
    utterances: int
    empty_references: list[int]
    exact: int
    tones: ErrorCounts | None = None
    base_syllables: ErrorCounts | None = None

    @property
    def wer(self) -> float:
        """Word error rate as a share (0.25 is 25%); NaN when no reference has a word."""
        return self.words.rate

    @property
    def cer(self) -> float:
        """Character error rate as a share; NaN when no reference has a character."""
        return self.characters.rate

    def to_dict(self) -> dict[str, float | int]:
        """Rates and counts under flat names, as a metrics dictionary; those of tones only where they were counted."""
        counts = dict(zip(RATES, (self.words, self.characters, self.tones, self.base_syllables)))
        counts = {name: count for name, count in counts.items() if count is not None}
        result = {name: count.rate for name, count in counts.items()}
        for name, count in counts.items():
            result |= {RATES[name].errors: count.errors, RATES[name].total: count.total}
        return result | {
            "word_substitutions": self.words.substitutions,
            "word_deletions": self.words.deletions,
            "word_insertions": self.words.insertions,
            "utterances": self.utterances,
            "exact_utterances": self.exact,
            "empty_references": len(self.empty_references),
        }


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalize: Callable[[str], str] | None = normalize_text,
) -> Score:
    """
    Compares recognised with spoken texts.

    Args:
        references (`Sequence[str]`): what was said, one text an utterance; may be empty (silence).
        hypotheses (`Sequence[str]`): what was recognised, in the same order.
        normalize (`Callable[[str], str]`, *optional*, defaults to [`normalize_text`]):
            Applied to every text first; `None` compares the texts as they are.

    Returns:
        [`Score`]: counts and rates over the corpus.

    Raises:
        `ValueError`: the two differ in length, or there is nothing to compare.
        `ImportError`: jiwer is not installed.

    Example:

    ```python
    >>> from echo_hf.metrics import score

    >>> result = score(["One, two, three.", ""], ["one too three", "uh"])
    >>> result.wer, result.words.errors, result.words.total
    (0.6666666666666666, 2, 3)

    >>> result = score(["shang4 ren4"], ["shang4 ren2"])
    >>> result.wer, result.tones.rate, result.base_syllables.rate
    (0.5, 0.5, 0.0)

    ```
    """
    try:
        import jiwer
    except ImportError as error:
        raise ImportError(f"Error rates need jiwer ({error}): `pip install jiwer`.") from error
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references cannot be compared with {len(hypotheses)} hypotheses.")
    if not len(references):
        raise ValueError("There is nothing to score: no utterances were given.")
    if normalize is not None:
        references = [normalize(text) for text in references]
        hypotheses = [normalize(text) for text in hypotheses]
    references, hypotheses = list(references), list(hypotheses)
    tones = base_syllables = None
    reference_words = [word for text in references for word in text.split()]
    if reference_words and all(map(TONED_SYLLABLE.fullmatch, reference_words)):
        reference_tones, reference_bases = zip(*map(_split_tones, references))
        recognized_tones, recognized_bases = zip(*map(_split_tones, hypotheses))
        tones = _count(jiwer.process_words(list(reference_tones), list(recognized_tones)))
        base_syllables = _count(jiwer.process_words(list(reference_bases), list(recognized_bases)))
    return Score(
        words=_count(jiwer.process_words(references, hypotheses)),
        characters=_count(jiwer.process_characters(references, hypotheses)),
        utterances=len(references),
        empty_references=[position for position, text in enumerate(references) if not text.split()],
        exact=sum(reference == hypothesis for reference, hypothesis in zip(references, hypotheses)),
        tones=tones,
        base_syllables=base_syllables,
    )


def _split_tones(text: str) -> tuple[str, str]:
    """The tones of a text, and its syllables without them; as many of each as it has words."""
    words = text.split()
    syllables = [TONED_SYLLABLE.fullmatch(word) for word in words]
    tones = [syllable[2] if syllable else NO_TONE for syllable in syllables]
    bases = [syllable[1] if syllable else word for syllable, word in zip(syllables, words)]
    return " ".join(tones), " ".join(bases)


def _count(output) -> ErrorCounts:
    # Only jiwer's counts are used: its own rate of a corpus without any reference word is 1 for any number of errors.
    return ErrorCounts(
        substitutions=output.substitutions,
        deletions=output.deletions,
        insertions=output.insertions,
        total=output.hits + output.substitutions + output.deletions,
    )


def decode_ids(tokenizer, token_ids: np.ndarray) -> list[str]:
    """
    Token ids of a batch as texts, without special tokens.

    Args:
        tokenizer: anything with `batch_decode` and `pad_token_id`, e.g. an `EchoTokenizer`.
        token_ids (`np.ndarray`): ids, shape `(batch, tokens)`; -100 stands for padding.

    Returns:
        `list[str]`: one text a row.
    """
    token_ids = np.asarray(token_ids)
    token_ids = np.where(token_ids == -100, tokenizer.pad_token_id, token_ids)
    return tokenizer.batch_decode(token_ids, skip_special_tokens=True)


def make_compute_metrics(
    tokenizer, normalize: Callable[[str], str] | None = normalize_text
) -> Callable[..., dict[str, float | int]]:
    """
    A `compute_metrics` for `Seq2SeqTrainer` with `predict_with_generate=True`.

    Args:
        tokenizer: the tokenizer of the labels; an `EchoProcessor` is not taken, its `tokenizer` is.
        normalize (`Callable[[str], str]`, *optional*, defaults to [`normalize_text`]):
            Applied to references and hypotheses; `None` compares them as they are.

    Returns:
        A function of an `EvalPrediction` (ids, shape `(utterances, tokens)`) that returns the flat dictionary of
        [`Score.to_dict`].

    Raises:
        `ValueError`: by the returned function, if predictions are logits and not ids, which the Trainer gives without
        `predict_with_generate`: teacher-forced, they would look far better than recognition is.
    """

    def compute_metrics(prediction) -> dict[str, float | int]:
        predicted = prediction.predictions
        if isinstance(predicted, tuple) or np.asarray(predicted).ndim != 2:
            raise ValueError(
                "Error rates need generated token ids of shape (utterances, tokens), got logits: set"
                " `predict_with_generate=True` in the Seq2SeqTrainingArguments."
            )
        references = decode_ids(tokenizer, prediction.label_ids)
        return score(references, decode_ids(tokenizer, predicted), normalize).to_dict()

    return compute_metrics


# F0 ------------------------------------------------------------------------------------------------------------------

GROSS_ERROR = 0.2  # an F0 that is off by a larger share of the reference is another pitch, not an imprecise one
PITCH_TOLERANCE = 50.0  # cents (a cent is a hundredth of a semitone): half a semitone
HIGHEST_HARMONIC = 3800.0  # Hz, of synthetic voices


def f0_metrics(reference: np.ndarray, estimate: np.ndarray) -> dict[str, float]:
    """
    Compares a tracker's F0 with the true one, frame by frame.

    | key | value |
    |---|---|
    | `gpe` | gross pitch error: share of the frames voiced in both whose F0 is off by more than 20% |
    | `vde` | voicing decision error: share of all frames voiced in one and unvoiced in the other |
    | `ffe` | F0 frame error: share of all frames with a gross pitch error or a voicing decision error |
    | `rpa` | raw pitch accuracy: share of the frames voiced in the reference whose estimate is within 50 cents |
    | `rca` | raw chroma accuracy: the same, an error of whole octaves forgiven |
    | `cents` | mean absolute error of the frames voiced in both without a gross error, `1200 abs(log2(f / f_ref))` |

    GPE as in Rabiner et al. (1976, https://doi.org/10.1109/TASSP.1976.1162846), VDE and FFE as in Chu and Alwan (2009,
    https://doi.org/10.1109/ICASSP.2009.4960497), RPA and RCA as in Poliner et al. (2007,
    https://doi.org/10.1109/TASL.2006.889797) with an unvoiced estimate counting as wrong.

    Args:
        reference (`np.ndarray`): true F0, shape `(frames,)`, Hz, 0 = unvoiced.
        estimate (`np.ndarray`): F0 of the tracker, shape `(frames,)`, Hz, 0 = unvoiced.

    Returns:
        `dict[str, float]`: the values of the table, shares from 0 to 1; NaN where there is no frame to count.

    Raises:
        `ValueError`: the two are not 1-D, differ in shape, or are empty.

    Example:

    ```python
    >>> import numpy as np
    >>> from echo_hf.metrics import f0_metrics

    >>> result = f0_metrics(np.array([0.0, 100.0, 100.0, 100.0]), np.array([90.0, 100.0, 200.0, 0.0]))
    >>> result["gpe"], result["vde"], result["ffe"]
    (0.5, 0.5, 0.75)

    ```
    """
    reference, estimate = np.asarray(reference, dtype=np.float64), np.asarray(estimate, dtype=np.float64)
    if reference.ndim != 1 or reference.shape != estimate.shape or not len(reference):
        raise ValueError(
            f"F0 of shapes {reference.shape} (reference) and {estimate.shape} (estimate) cannot be compared; both must"
            " be 1-D, of the same length and not empty."
        )
    voiced, heard = reference > 0, estimate > 0
    both = voiced & heard
    gross = both & (np.abs(estimate - reference) > GROSS_ERROR * reference)
    cents = np.zeros(len(reference))
    cents[both] = 1200.0 * np.log2(estimate[both] / reference[both])
    chroma = (cents + 600.0) % 1200.0 - 600.0  # to the nearest octave

    def share(frames, among):
        return float(np.count_nonzero(frames) / np.count_nonzero(among)) if among.any() else math.nan

    everything = np.ones(len(reference), dtype=bool)
    fine = both & ~gross
    return {
        "gpe": share(gross, both),
        "vde": share(voiced != heard, everything),
        "ffe": share(gross | (voiced != heard), everything),
        "rpa": share(both & (np.abs(cents) <= PITCH_TOLERANCE), voiced),
        "rca": share(both & (np.abs(chroma) <= PITCH_TOLERANCE), voiced),
        "cents": float(np.abs(cents[fine]).mean()) if fine.any() else math.nan,
    }


def synthetic_voice(f0: np.ndarray, sampling_rate: int = 16000, seed: int = 0, first_harmonic: int = 1) -> np.ndarray:
    """
    A voice-like sound with a known F0: harmonics up to 3.8 kHz under three formants that move as in running speech.

    Args:
        f0 (`np.ndarray`): shape `(samples,)`, Hz at every sample, 0 = silence.
        sampling_rate (`int`, defaults to 16000): Hz, at least 8000.
        seed (`int`, defaults to 0): of where the formants are.
        first_harmonic (`int`, defaults to 1): lowest harmonic that sounds; 2 leaves the fundamental out.

    Returns:
        `np.ndarray`: float64, shape `(samples,)`; a root mean square of 0.1 where it is voiced.
    """
    f0 = np.asarray(f0, dtype=np.float64)
    generator = np.random.default_rng(seed)
    times = np.arange(len(f0)) / sampling_rate
    # The centres of the formants wander between these (Hz), once or twice a second.
    lowest, highest = np.array([300.0, 900.0, 2300.0]), np.array([800.0, 2100.0, 3000.0])
    bandwidths, gains = np.array([80.0, 120.0, 180.0]), np.array([1.0, 0.5, 0.25])
    rates, phases = generator.uniform(0.7, 1.7, 3), generator.uniform(0.0, 2.0 * np.pi, 3)
    positions = 0.5 + 0.5 * np.sin(2.0 * np.pi * rates * times[:, None] + phases)
    centres = lowest + (highest - lowest) * positions  # (samples, formants)
    # Runs of voice begin and end within 10 ms.
    fade = np.hanning(2 * (sampling_rate // 200) + 3)[1:-1]  # an odd number: as much before as after
    loudness = np.convolve(f0 > 0, fade / fade.sum())[len(fade) // 2 :][: len(f0)] * (f0 > 0)
    cycles = np.cumsum(f0) / sampling_rate
    waveform = np.zeros(len(f0))
    lowest_f0 = f0[f0 > 0].min(initial=HIGHEST_HARMONIC)
    for harmonic in range(first_harmonic, int(HIGHEST_HARMONIC / lowest_f0) + 1):
        frequency = harmonic * f0
        resonance = 1.0 / (1.0 + ((frequency[:, None] - centres) / bandwidths) ** 2)
        amplitude = (0.1 + resonance @ gains) / harmonic**0.5 * (frequency < HIGHEST_HARMONIC)
        waveform += amplitude * np.sin(2.0 * np.pi * harmonic * cycles)
    waveform *= loudness
    power = np.mean(waveform[f0 > 0] ** 2) if (f0 > 0).any() else 1.0
    return 0.1 * waveform / np.sqrt(power)


def f0_test_signals(hop_length: int = 160) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """
    The signals on which trackers are compared: four synthetic voices with known F0, clean, in noise and band-limited.

    The voices (85 to 130 Hz, 110 to 150, 170 to 290 and 240 to 420 Hz) glide or have a vibrato of 5.5 Hz, for 2.5
    seconds each, with pauses and bursts of hissing between runs of voice. Noise is white, at a ratio of the power of
    the voiced parts to that of the noise up to 8 kHz. "telephone" keeps 300 to 3400 Hz; "no fundamental" leaves out
    the first harmonic. The same at every call.

    Args:
        hop_length (`int`, defaults to 160): samples from one frame to the next.

    Returns:
        `dict[str, tuple[np.ndarray, np.ndarray]]`: by name, a waveform at 16 kHz, shape `(samples,)`, and its F0,
        shape `(samples // hop_length + 1,)`, Hz, 0 = unvoiced.
    """
    rate = 16000  # Hz
    generator = np.random.default_rng(0)
    times = np.arange(int(2.5 * rate)) / rate  # seconds
    vibrato = np.sin(2.0 * np.pi * 5.5 * times)
    contours = [
        130.0 - 18.0 * times + 6.0 * np.sin(2.0 * np.pi * 0.9 * times),
        130.0 + 4.0 * vibrato + 12.0 * np.sin(2.0 * np.pi * 0.6 * times),
        230.0 + 55.0 * np.sin(2.0 * np.pi * 0.8 * times),
        330.0 + 12.0 * vibrato - 70.0 * np.cos(2.0 * np.pi * 0.4 * times),
    ]
    voiced = np.zeros(len(times), dtype=bool)
    for start, stop in [(0.15, 0.85), (1.0, 1.25), (1.45, 1.55), (1.7, 2.35)]:
        voiced |= (start <= times) & (times < stop)
    hiss = np.diff(generator.standard_normal(len(times) + 1)) * ((0.87 <= times) & (times < 0.97))
    f0 = np.concatenate([np.where(voiced, contour, 0.0) for contour in contours])
    silent = f0 == 0

    def speak(first_harmonic):
        runs = np.split(f0, len(contours))
        voices = [synthetic_voice(run, rate, seed, first_harmonic) for seed, run in enumerate(runs)]
        return np.concatenate(voices) + 0.02 * np.tile(hiss, len(contours))

    def add_noise(waveform, decibels):
        noise = generator.standard_normal(len(waveform))
        return waveform + noise * np.sqrt(np.mean(waveform[~silent] ** 2)) * 10.0 ** (-decibels / 20.0)

    def telephone(waveform):
        # Edges 100 Hz wide: steeper ones ring on in the pauses.
        frequencies = np.fft.rfftfreq(len(waveform), 1.0 / rate)
        gain = np.interp(frequencies, [200.0, 300.0, 3400.0, 3500.0], [0.0, 1.0, 1.0, 0.0])
        return np.fft.irfft(np.fft.rfft(waveform) * gain, len(waveform))

    clean = speak(first_harmonic=1)
    signals = {"clean": clean}
    signals |= {f"{decibels} dB": add_noise(clean, decibels) for decibels in (20, 10, 5, 0)}
    signals["no fundamental"] = speak(first_harmonic=2)
    signals["telephone"] = telephone(clean)
    signals["telephone, 10 dB"] = telephone(signals["10 dB"])
    frames = np.append(f0, 0.0)[::hop_length][: len(f0) // hop_length + 1]
    return {name: (waveform, frames) for name, waveform in signals.items()}


def format_table(rows: Sequence[dict[str, object]]) -> str:
    """Rows as a Markdown table, numbers to three digits; `None` and a missing cell are left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return str(value)

    lines = [columns, ["---"] * len(columns)] + [[cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


__all__ = [
    "RATES",
    "ErrorCounts",
    "Rate",
    "Score",
    "f0_metrics",
    "f0_test_signals",
    "format_table",
    "make_compute_metrics",
    "normalize_text",
    "score",
    "synthetic_voice",
]

"""Errors of words, characters and tones in recognized speech, counted over a corpus.

Rates are sums of errors over sums of reference units, not means over utterances. jiwer aligns the texts. Transformers'
Whisper `BasicTextNormalizer` is not used: it deletes text in brackets, splits "don't" and removes combining marks,
which changes Hindi and Thai words.

Nothing here imports Echo, so that the folder can be shared as it is.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Rate(NamedTuple):
    """The names of a rate, the keys of its errors and its reference units in [`Score.to_dict`], and the unit."""

    name: str
    full_name: str
    errors: str
    total: str
    unit: str


def _rate(name: str, full_name: str, unit: str) -> Rate:
    key = unit.replace(" ", "_")
    return Rate(name, full_name, f"{key.removesuffix('s')}_errors", f"reference_{key}", unit)


# By the key of the rate in `Score.to_dict`, in the order of the fields of `Score`.
RATES = {
    "wer": _rate("WER", "word error rate", "words"),
    "cer": _rate("CER", "character error rate", "characters"),
    "tone_error_rate": _rate("tone error", "tone error rate", "tones"),
    "base_syllable_error_rate": _rate("base-syllable error", "base-syllable error rate", "base syllables"),
    "base_word_error_rate": _rate("base-word error", "base-word error rate", "base words"),
    "base_character_error_rate": _rate("base-character error", "base-character error rate", "base characters"),
}

TONES = ("digits", "accents")  # how texts write tone, see `Score`

# A syllable and its tone in toned pinyin (`shang4`) or Jyutping (`baa1`): letters, then one digit. A colon stands for
# the dots of a u (`nu:3`, `lu:e4`).
TONED_SYLLABLE = re.compile(r"([^\W\d_]+(?::[^\W\d_]*)?)([0-9])")
UMLAUT = re.compile(r"\b([ln])u:(?=(?:e|an|n)?[0-9]\b)")
NO_TONE = "-"  # of a word that is no toned syllable, or of a vowel without a tone mark

# Grave, acute, circumflex, macron, double acute, caron, vertical line, double grave, and their contours (1DC4 to 1DC9).
TONE_MARKS = "\u0300\u0301\u0302\u0304\u030b\u030c\u030d\u030f\u1dc4\u1dc5\u1dc6\u1dc7\u1dc8\u1dc9"
# Letters with a tone even without a mark: vowels of Latin orthographies and of the IPA, but not y, which is a consonant
# in most orthographies that write tone.
VOWELS = frozenset(
    "aeiou\u00e6\u00f8\u0131\u0153\u01dd\u0250\u0251\u0252\u0254\u0258\u0259\u025b\u025c\u025e\u0264\u0268\u0269\u026a"
    "\u026f\u0275\u0276\u0289\u028a\u028c\u028f"
)
APOSTROPHES = "'\u2019\u02bc"  # typewriter, typographic, modifier letter
TONE_LETTERS = "\u02e5\u02e6\u02e7\u02e8\u02e9"  # symbols to Unicode, but part of a word

# Of one text, about 18 hours of speech. Native code that runs out of memory in an alignment ends the process.
MAX_CHARACTERS = 1_000_000


# Texts ---------------------------------------------------------------------------------------------------------------


def has_half_surrogate(text: str) -> bool:
    """Whether a text has half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def check_text(text: str, name: str) -> str:
    """Returns a text that can be scored; raises `ValueError` for what is no string, is longer than `MAX_CHARACTERS`, or
    has half of a surrogate pair. The message calls it `name`, such as `"references[3]"`."""
    if not isinstance(text, str):
        raise ValueError(
            f"{name} must be a string, got {str(text)[:50]!r} of type {type(text).__name__}; an empty string stands for"
            " silence."
        )
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} has {len(text):,} characters, but at most {MAX_CHARACTERS:,} can be aligned; split it into"
            " utterances."
        )
    if has_half_surrogate(text):
        raise ValueError(f"{name} has half of a surrogate pair, which is no character; remove or replace it.")
    return text


def check_texts(texts: Sequence[str], name: str) -> list[str]:
    """Returns texts as a list; raises `ValueError` for one text, for what has no order, and as [`check_text`]."""
    try:
        if isinstance(texts, (str, bytes, dict, set, frozenset)):
            raise TypeError("they have no order or are one text")
        texts = list(texts)
    except TypeError as error:
        raise ValueError(f"{name} must be a list of strings, one an utterance, got {type(texts).__name__}.") from error
    return [check_text(text, f"{name}[{position}]") for position, text in enumerate(texts)]


def normalize_text(text: str) -> str:
    """
    Text as it is scored: Unicode NFKC, lower case, punctuation and symbols replaced by a space, whitespace collapsed.

    Letters, digits, combining marks and tone letters stay, and so does an apostrophe beside a letter or digit, as `'`.
    Numbers are not spelled out. `nu:3` of toned pinyin becomes `n\u00fc3`.

    Example:

    ```python
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
            neighbors = text[max(0, position - 1) : position] + text[position + 1 : position + 2]
            kept.append("'" if any(neighbor.isalnum() for neighbor in neighbors) else " ")
        elif unicodedata.category(character)[0] in "PS" and character not in TONE_LETTERS:
            kept.append(" ")
        else:
            kept.append(character)
    return " ".join("".join(kept).split())


def split_toned_syllables(text: str) -> tuple[str, str]:
    """Tones and base syllables of words: of `"shang4 ren4"` `("4 4", "shang ren")`. The tone of a word that is not
    letters and one digit is `"-"`, its base syllable the word."""
    words = text.split()
    syllables = [TONED_SYLLABLE.fullmatch(word) for word in words]
    tones = [syllable[2] if syllable else NO_TONE for syllable in syllables]
    bases = [syllable[1] if syllable else word for syllable, word in zip(syllables, words)]
    return " ".join(tones), " ".join(bases)


def split_tone_marks(text: str) -> tuple[str, str]:
    """
    The tones of a text that writes them as combining accents, separated by spaces, and the text in NFC without them: of
    `"ng\u00e1 ot\u00e9"` two acute accents with a `"-"` between them, and `"nga ote"`.

    Every vowel has a tone, `"-"` without a mark (many languages do not mark the low tone), and so has any other letter
    with a mark, such as a syllabic nasal. Marks of quality stay: dots below or above, tilde, breve, cedilla.
    """
    tones, letters, has_tone = [], [], False
    for character in unicodedata.normalize("NFD", text):
        if character in TONE_MARKS:
            if not has_tone:
                tones.append("")
                has_tone = True
            tones[-1] = tones[-1].removeprefix(NO_TONE) + character
            continue
        letters.append(character)
        if not unicodedata.combining(character):  # a new letter
            has_tone = character.lower() in VOWELS
            if has_tone:
                tones.append(NO_TONE)
    return " ".join(tones), unicodedata.normalize("NFC", "".join(letters))


# Counts --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of one kind of unit, such as words, and the units in the references (`total`), summed over a corpus."""

    substitutions: int
    deletions: int
    insertions: int
    total: int

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors as a share of the reference units (may exceed 1); NaN without reference units."""
        return self.errors / self.total if self.total else math.nan


@dataclass(frozen=True)
class Score:
    """
    Error counts of a corpus. Each kind of unit is a sequence that is aligned by itself.

    Tone as digits (toned pinyin, Jyutping) is counted if every reference word is a toned syllable. A recognized word
    that is none has no tone, which is an error, and counts as a base syllable as it is: in place of "ma3", "ma" is an
    error of the tone alone, "mo3" one of the base syllable alone, "ma33" one of both. Neither sequence has more errors
    than the words have.

    Tone as accents (Mboshi, Yoruba, pinyin with marks) is counted if [`score`] is told so, see [`split_tone_marks`].
    Accents of stress or quality count as tone, so this is not for French or Vietnamese.

    Args:
        words ([`ErrorCounts`]): what whitespace separates.
        characters ([`ErrorCounts`]): the space between words is one.
        utterances (`int`): pairs compared.
        empty_references (`list[int]`): positions of empty normalized references. Words recognized there are insertions.
        exact (`int`): utterances without an error.
        tones ([`ErrorCounts`], *optional*): of syllables or vowels.
        base_syllables ([`ErrorCounts`], *optional*): syllables without the digits of their tones.
        base_words ([`ErrorCounts`], *optional*): words without the accents of their tones.
        base_characters ([`ErrorCounts`], *optional*): characters without the accents of their tones.
    """

    words: ErrorCounts
    characters: ErrorCounts
    utterances: int
    empty_references: list[int]
    exact: int
    tones: ErrorCounts | None = None
    base_syllables: ErrorCounts | None = None
    base_words: ErrorCounts | None = None
    base_characters: ErrorCounts | None = None

    @property
    def wer(self) -> float:
        """Word error rate as a share (0.25 is 25%); NaN when no reference has a word."""
        return self.words.rate

    @property
    def cer(self) -> float:
        """Character error rate as a share; NaN when no reference has a character."""
        return self.characters.rate

    def to_dict(self) -> dict[str, float | int]:
        """Rates and counts as a flat metrics dictionary; those of tones only where they were counted."""
        counts = {name: getattr(self, rate.unit.replace(" ", "_")) for name, rate in RATES.items()}
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
    tones: str = "digits",
) -> Score:
    """
    Compares recognized with spoken texts.

    Args:
        references (`Sequence[str]`): what was said, one text an utterance; may be empty (silence).
        hypotheses (`Sequence[str]`): what was recognized, in the same order.
        normalize (`Callable[[str], str]`, *optional*, defaults to [`normalize_text`]): applied to every text first.
        tones (`str`, defaults to `"digits"`): how the texts write tone, `"digits"` or `"accents"`; see [`Score`].

    Returns:
        [`Score`]: counts and rates over the corpus.

    Raises:
        `ValueError`: a text cannot be scored (see [`check_text`]), the two differ in length, there is nothing to
        compare, or `tones` is unknown.
        `ImportError`: jiwer is not installed.

    Example:

    ```python
    >>> result = score(["One, two, three.", ""], ["one too three", "uh"])
    >>> result.wer, result.words.errors, result.words.total
    (0.6666666666666666, 2, 3)

    >>> result = score(["shang4 ren4"], ["shang4 ren2"])
    >>> result.wer, result.tones.rate, result.base_syllables.rate
    (0.5, 0.5, 0.0)

    >>> result = score(["w\u00e1\u00e1 ng\u00e1"], ["w\u00e1a ng\u00e1"], tones="accents")
    >>> result.wer, result.tones.rate, result.base_words.rate
    (0.5, 0.3333333333333333, 0.0)

    ```
    """
    if tones not in TONES:
        raise ValueError(f"tones={tones!r} is unknown; choose from {', '.join(map(repr, TONES))}.")
    references, hypotheses = check_texts(references, "references"), check_texts(hypotheses, "hypotheses")
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references cannot be compared with {len(hypotheses)} hypotheses.")
    if not references:
        raise ValueError("There is nothing to score: no utterances were given.")
    if normalize is not None:  # checked again: compatibility characters become up to 18 each
        references = check_texts([normalize(text) for text in references], "normalized references")
        hypotheses = check_texts([normalize(text) for text in hypotheses], "normalized hypotheses")
    return Score(
        words=_count_words(references, hypotheses),
        characters=_count("process_characters", references, hypotheses),
        utterances=len(references),
        empty_references=[position for position, text in enumerate(references) if not text.split()],
        exact=sum(reference == hypothesis for reference, hypothesis in zip(references, hypotheses)),
        **(_count_digits if tones == "digits" else _count_accents)(references, hypotheses),
    )


def _count_digits(references: list[str], hypotheses: list[str]) -> dict[str, ErrorCounts]:
    words = [word for text in references for word in text.split()]
    if not words or not all(map(TONED_SYLLABLE.fullmatch, words)):
        return {}
    reference_tones, reference_bases = zip(*map(split_toned_syllables, references))
    hypothesis_tones, hypothesis_bases = zip(*map(split_toned_syllables, hypotheses))
    return {
        "tones": _count_words(reference_tones, hypothesis_tones),
        "base_syllables": _count_words(reference_bases, hypothesis_bases),
    }


def _count_accents(references: list[str], hypotheses: list[str]) -> dict[str, ErrorCounts]:
    reference_tones, reference_bases = zip(*map(split_tone_marks, references))
    hypothesis_tones, hypothesis_bases = zip(*map(split_tone_marks, hypotheses))
    return {
        "tones": _count_words(reference_tones, hypothesis_tones),
        "base_words": _count_words(reference_bases, hypothesis_bases),
        "base_characters": _count("process_characters", reference_bases, hypothesis_bases),
    }


def _count_words(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    # jiwer itself keeps a single tab or line break within a word.
    references, hypotheses = ([" ".join(text.split()) for text in texts] for texts in (references, hypotheses))
    return _count("process_words", references, hypotheses)


def _count(process: str, references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    try:
        import jiwer
    except ImportError as error:
        raise ImportError(f"Error rates need jiwer ({error}): `pip install jiwer`.") from error
    output = getattr(jiwer, process)(list(references), list(hypotheses))
    # jiwer's own rate of a corpus without reference units is 1 for any number of errors, and is not used.
    return ErrorCounts(
        substitutions=output.substitutions,
        deletions=output.deletions,
        insertions=output.insertions,
        total=output.hits + output.substitutions + output.deletions,
    )

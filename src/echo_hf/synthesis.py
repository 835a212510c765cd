"""Synthetic speech for pretraining: texts in, a folder of FLAC files and a manifest out.

The engines, espeak-ng and flite, are programs found on the PATH; each utterance is one run of one of them. What is
drawn for an utterance (engine, voice, pitch, rate, word gap) hangs on the seed, its text and how often the text came
before, and its file is named by all that is drawn. So the order of texts and the number of processes change nothing,
and a run that goes on after another keeps what is there.
"""

import bisect
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
from tqdm.auto import tqdm

from .feature_extraction_echo import resample_audio
from .metrics import has_half_surrogate
from .metrics import normalize_text

SAMPLING_RATE = 16000  # Hz, of what is written when nothing else is asked for
TIMEOUT = 60  # seconds that an engine may take for one text
SILENCE = 1e-3  # a peak below this, of 1, is no speech

# Voices of espeak-ng by language (ISO 639, as in manifests). Another language's voice is the language's own code.
ESPEAK_VOICES = {
    "en": ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan"),
    "es": ("es", "es-419"),
    "fr": ("fr-fr", "fr-be", "fr-ch"),
    "cmn": ("cmn-latn-pinyin",),  # reads characters as well; the voice "cmn" takes pinyin for English
    "yue": ("yue-latn-jyutping",),  # likewise
}
# Timbres of espeak-ng, which go with each of its voices.
ESPEAK_VARIANTS = tuple(f"m{n}" for n in range(1, 9)) + tuple(f"f{n}" for n in range(1, 6)) + ("klatt", "klatt2")
ESPEAK_PITCH = (20, 80)  # of 0 to 99; 50 is a variant's own
ESPEAK_RATE = (100, 200)  # words per minute, as the engine counts them
ESPEAK_GAP = (0, 8)  # pause between words in units of 10 ms at the engine's own rate

# Voices of flite, all English, with a range of mean F0 in Hz; rms takes no other than its own.
FLITE_VOICES = {"kal": (80, 160), "kal16": (80, 160), "awb": (105, 180), "rms": None, "slt": (140, 230)}
FLITE_STRETCH = (0.8, 1.5)  # of durations

ENGINES = ("espeak-ng", "flite")


@dataclass(frozen=True)
class Line:
    """A text and the language (ISO 639) it is in."""

    text: str
    language: str


@dataclass(frozen=True)
class Synthesis:
    """
    What [`synthesize`] did.

    Args:
        manifest (`Path`): the manifest that was written.
        utterances (`int`): lines in it.
        new (`int`): how many of them were spoken now; the files of the others were there.
        seconds (`float`): duration of all utterances together.
        skipped (`list[tuple[str, str]]`): text and reason of each that could not be spoken.
    """

    manifest: Path
    utterances: int
    new: int
    seconds: float
    skipped: list[tuple[str, str]]


# Texts ---------------------------------------------------------------------------------------------------------------


def read_lines(sources: Iterable[str | os.PathLike], language: str = "en") -> list[Line]:
    """
    Reads the texts of manifests and of text files.

    Args:
        sources (iterable of `str` or `os.PathLike`): a file named `.jsonl` is a manifest, whose rows hold `text` and
            may hold `language`; any other is text in UTF-8, one utterance a line. Empty lines are left out.
        language (`str`, defaults to `"en"`): of texts that do not say theirs.

    Returns:
        `list[Line]`: the texts in the order of the files, each without whitespace at its ends.

    Raises:
        `ValueError`: a file cannot be read, holds no text, or has a line that is no row of a manifest.
    """
    lines = []
    for path in map(Path, sources):
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
        found = []
        for number, row in enumerate(content.split("\n"), start=1):
            if not row.strip():
                continue
            if path.suffix == ".jsonl":
                found.append(_read_row(row, f"{path} line {number}", language))
            else:
                found.append(Line(row.strip(), language))
        if not found:
            raise ValueError(f"{path}: there are no texts in it.")
        lines += found
    return lines


def _read_row(row: str, origin: str, language: str) -> Line:
    try:
        value = json.loads(row)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}: not JSON ({error}). A manifest has one JSON object a line.") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError(f"{origin}: must be a JSON object with a string 'text'.")
    if not isinstance(value.get("language") or language, str):
        raise ValueError(f"{origin}: 'language' must be a code such as 'en', got {value['language']!r}.")
    if has_half_surrogate(value["text"]):
        raise ValueError(f"{origin}: 'text' has half of a surrogate pair, which is no character.")
    return Line(value["text"].strip(), value.get("language") or language)


def leave_out(lines: Iterable[Line], excluded: Iterable[Line]) -> list[Line]:
    """`lines` without those whose normalised text is that of an excluded line, in whatever language, or is empty."""
    known = {normalize_text(line.text) for line in excluded} | {""}
    return [line for line in lines if normalize_text(line.text) not in known]


def babble(
    lines: Sequence[Line],
    count: int,
    min_words: int = 3,
    max_words: int = 9,
    excluded: Iterable[Line] = (),
    seed: int = 0,
) -> list[Line]:
    """
    Makes up sentences of the words of others, language by language.

    Each word is drawn from those that follow the one before it, or (one time in two) the two before it, in `lines`, as
    often as they do. A sentence that would end too early goes on with the beginning of another.

    Args:
        lines (`Sequence[Line]`): the sentences to learn from. Each language gets its share of `count`.
        count (`int`): how many sentences to make.
        min_words (`int`, defaults to 3): fewest words of a sentence, as whitespace parts them.
        max_words (`int`, defaults to 9): most words of a sentence.
        excluded (iterable of `Line`): texts that must not be made, normalised: those of dev and test sets. Nor is a
            sentence of `lines` itself, nor one twice.
        seed (`int`, defaults to 0): the same gives the same sentences.

    Returns:
        `list[Line]`: `count` sentences, in the order of languages in `lines`.

    Raises:
        `ValueError`: the words do not give so many different sentences, or the numbers of words make no sense.
    """
    if not 1 <= min_words <= max_words:
        raise ValueError(f"A sentence of {min_words} to {max_words} words cannot be; give 1 <= min_words <= max_words.")
    known = {normalize_text(line.text) for line in (*lines, *excluded)} | {""}
    sentences: dict[str, list[list[str]]] = {}
    for line in lines:
        if line.text.split():
            sentences.setdefault(line.language, []).append(line.text.split())
    made: list[Line] = []
    shares = share_out(count, map(len, sentences.values()))
    for (language, examples), share in zip(sentences.items(), shares):
        chance = random.Random(f"babble {seed} {language}")
        followers = _count_followers(examples)
        wanted, attempts = len(made) + share, 0
        while len(made) < wanted:
            attempts += 1
            if attempts > 100 * share:
                raise ValueError(
                    f"Only {len(made) - wanted + share} of {share} new sentences of {min_words} to {max_words} words"
                    f" can be made of the {len(examples)} texts in {language!r}; give more texts, or ask for fewer or"
                    " longer sentences."
                )
            text = " ".join(_make_sentence(followers, chance, min_words, chance.randint(min_words, max_words)))
            normalized = normalize_text(text)
            if normalized not in known:
                known.add(normalized)
                made.append(Line(text, language))
    return made


def share_out(count: int, sizes: Iterable[int]) -> list[int]:
    """
    Shares by size, whole numbers that sum up to `count`.

    Examples:

    >>> share_out(7, [4, 3, 1])
    [3, 3, 1]
    """
    sums = [0, *itertools.accumulate(sizes)]
    return [count * after // sums[-1] - count * before // sums[-1] for before, after in itertools.pairwise(sums)]


def _count_followers(examples: list[list[str]]) -> dict[tuple, tuple[list, list[int]]]:
    """What follows one word and two, each as words with summed counts; None is before and after a sentence."""
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for words in examples:
        padded = [None, *words, None]
        for position in range(1, len(padded)):
            counts[(padded[position - 1],)][padded[position]] += 1
            if position > 1:
                counts[tuple(padded[position - 2 : position])][padded[position]] += 1
    return {
        history: (list(counter), list(itertools.accumulate(counter.values()))) for history, counter in counts.items()
    }


def _make_sentence(followers: dict, chance: random.Random, least: int, most: int) -> list[str]:
    words: list[str] = []
    history: tuple = (None,)
    while len(words) < most:
        length = min(len(history), chance.randint(1, 2))
        choices, sums = followers[history[-length:]]
        word = choices[bisect.bisect(sums, chance.randrange(sums[-1]))]
        if word is None:
            if len(words) >= least:
                break
            history = (None,)
            continue
        words.append(word)
        history = (*history, word)[-2:]
    return words


# Voices --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Utterance:
    """A line with all that was drawn for it."""

    line: Line
    engine: str
    speaker: str  # engine, voice and settings in words
    options: tuple[str, ...]  # of the engine, but for where to write
    sampling_rate: int = SAMPLING_RATE

    @property
    def name(self) -> str:
        drawn = [self.line.text, self.engine, *self.options]
        if self.sampling_rate != SAMPLING_RATE:
            drawn.append(self.sampling_rate)
        digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()
        return f"audio/{self.line.language}/{digest[:16]}.flac"


def _draw_espeak(line: Line, chance: random.Random) -> _Utterance:
    voice = chance.choice(ESPEAK_VOICES.get(line.language, (line.language,))) + "+" + chance.choice(ESPEAK_VARIANTS)
    pitch, rate, gap = (chance.randint(*bounds) for bounds in (ESPEAK_PITCH, ESPEAK_RATE, ESPEAK_GAP))
    # -z: no pause after the end; -b 1: the text is in UTF-8.
    options = ("-z", "-b", "1", "-v", voice, "-p", str(pitch), "-s", str(rate), "-g", str(gap), "--stdin")
    return _Utterance(line, "espeak-ng", f"espeak-ng {voice} pitch={pitch} rate={rate} gap={gap}", options)


def _draw_flite(line: Line, chance: random.Random) -> _Utterance:
    voice = chance.choice(tuple(FLITE_VOICES))
    stretch = round(chance.uniform(*FLITE_STRETCH), 2)
    options, speaker = ("--setf", f"duration_stretch={stretch}"), f"flite {voice} stretch={stretch}"
    if FLITE_VOICES[voice] is not None:
        f0 = chance.randint(*FLITE_VOICES[voice])
        options, speaker = (*options, "--setf", f"int_f0_target_mean={f0}"), f"{speaker} f0={f0}"
    return _Utterance(line, "flite", speaker, ("-voice", voice, *options, "-t", line.text))


def _draw(lines: Iterable[Line], engines: Sequence[str], seed: int) -> list[_Utterance]:
    utterances, times = [], Counter()
    for line in lines:
        times[line] += 1  # a text that stands there twice is spoken by two voices
        if not re.fullmatch("[A-Za-z]{2,3}(-[A-Za-z0-9]+)*", line.language):
            raise ValueError(f"{line.language!r} is no code of a language, such as 'en' ({line.text!r}).")
        speaking = [engine for engine in engines if engine != "flite" or line.language == "en"]
        if not speaking:
            raise ValueError(f"flite speaks English alone, not {line.language!r} ({line.text!r}); add espeak-ng.")
        chance = random.Random(f"voice {seed} {line.language} {times[line]} {line.text}")
        draw = {"espeak-ng": _draw_espeak, "flite": _draw_flite}[chance.choice(speaking)]
        utterances.append(draw(line, chance))
    return utterances


# Speech --------------------------------------------------------------------------------------------------------------


def synthesize(
    lines: Sequence[Line],
    output_dir: str | os.PathLike,
    engines: Sequence[str] = ENGINES,
    seed: int = 0,
    num_proc: int = 1,
    skip_broken: bool = False,
    show_progress: bool = False,
    sampling_rate: int = SAMPLING_RATE,
) -> Synthesis:
    """
    Speaks texts with many voices, and writes `train.jsonl` beside the audio.

    Its rows hold `audio` (path relative to `output_dir`; FLAC, mono), `text`, `language`, `speaker` (engine,
    voice and settings), `duration` (seconds) and `synthetic` (true).

    Args:
        lines (`Sequence[Line]`): what to speak.
        output_dir (`str` or `os.PathLike`): folder for audio and manifest. Audio that is there from a run before is
            kept; the manifest is written anew and names the utterances of this run alone.
        engines (`Sequence[str]`, defaults to both): `"espeak-ng"`, `"flite"`; each text takes one that speaks its
            language.
        seed (`int`, defaults to 0): of the voices and their settings.
        num_proc (`int`, defaults to 1): engines that run at a time.
        skip_broken (`bool`, defaults to `False`): whether a text that cannot be spoken is left out. Otherwise it is an
            error; what was spoken before stays.
        show_progress (`bool`, defaults to `False`): whether a bar shows on standard error.
        sampling_rate (`int`, defaults to 16000): Hz, of what is written; 8000 has the band of a telephone.

    Returns:
        [`Synthesis`].

    Raises:
        `ValueError`: there is no such engine, none speaks a language, a text cannot be spoken, the sampling rate is
            below 8000 Hz, or `output_dir` has a `train.jsonl` of other speech.
        `OSError`: an engine is not installed. The message says how to get it.
    """
    unknown = [engine for engine in engines if engine not in ENGINES]
    if unknown or not engines:
        raise ValueError(f"engines must be some of {', '.join(ENGINES)}, got {', '.join(engines) or 'none'}.")
    if sampling_rate < 8000:
        raise ValueError(f"sampling_rate must be at least 8000 Hz for speech to be understood, got {sampling_rate}.")
    utterances = [replace(utterance, sampling_rate=sampling_rate) for utterance in _draw(lines, engines, seed)]
    for engine in dict.fromkeys(utterance.engine for utterance in utterances):
        if shutil.which(engine) is None:
            raise FileNotFoundError(
                f"{engine} is not installed: `apt install {engine}` on Debian or Ubuntu, `brew install {engine}` on"
                f" macOS; or name another engine ({', '.join(other for other in ENGINES if other != engine)})."
            )
    output_dir = Path(output_dir)
    manifest = output_dir / "train.jsonl"
    check_replaceable(manifest, "synthetic")
    rows, skipped, seconds, new = [], [], 0.0, 0
    # Threads, since all but a small part of the work is the engine's, which is a process of its own.
    with ThreadPoolExecutor(num_proc) as pool:
        jobs = [pool.submit(_speak, utterance, output_dir) for utterance in utterances]
        try:
            for utterance, job in zip(utterances, tqdm(jobs, "Speaking", disable=not show_progress)):
                duration, is_new, problem = job.result()
                if problem is not None:
                    skipped.append((utterance.line.text, problem))
                    if not skip_broken:
                        raise ValueError(
                            f"{utterance.line.text!r} cannot be spoken by {utterance.speaker}: {problem}. Mend or"
                            " remove it, or leave it out with `skip_broken`."
                        )
                    continue
                rows.append(
                    {
                        "audio": utterance.name,
                        "text": utterance.line.text,
                        "language": utterance.line.language,
                        "speaker": utterance.speaker,
                        "duration": round(duration, 3),
                        "synthetic": True,
                    }
                )
                seconds += duration
                new += is_new
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not rows:
        reason = f": {skipped[0][0]!r}: {skipped[0][1]}" if skipped else ""
        raise ValueError(f"None of {len(lines)} texts could be spoken{reason}.")
    write_manifest(manifest, rows)
    return Synthesis(manifest, len(rows), new, seconds, skipped)


def _speak(utterance: _Utterance, output_dir: Path) -> tuple[float, bool, str | None]:
    """Duration in seconds, whether it was spoken now, and what is wrong."""
    path = output_dir / utterance.name
    if not utterance.line.text:
        return 0.0, False, "the text is empty"
    try:
        return soundfile.info(path).duration, False, None
    except (OSError, RuntimeError):  # it is not there, or damaged
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        spoken, finished = Path(folder, "spoken.wav"), Path(folder, "finished.flac")
        output = "-w" if utterance.engine == "espeak-ng" else "-o"
        try:
            done = subprocess.run(
                [utterance.engine, output, str(spoken), *utterance.options],
                input=utterance.line.text.encode(),
                capture_output=True,
                timeout=TIMEOUT,
            )
            if done.returncode:
                message = done.stderr.decode(errors="replace").strip()
                return 0.0, False, f"the engine says {message!r} (exit code {done.returncode})"
            waveform, rate = soundfile.read(spoken, dtype="float32", always_2d=True)
        except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
            return 0.0, False, f"no speech came out ({error})"
        waveform = waveform.mean(axis=1)
        if not len(waveform) or np.abs(waveform).max() < SILENCE:
            return 0.0, False, "what came out is silent"
        if rate != utterance.sampling_rate:
            waveform = resample_audio(waveform, rate, utterance.sampling_rate)
            waveform /= max(1.0, np.abs(waveform).max())  # between two samples there may be more than at them
        soundfile.write(finished, waveform, utterance.sampling_rate, subtype="PCM_16")
        finished.replace(path)  # so that a file that is there is whole
    return len(waveform) / utterance.sampling_rate, True, None


# Manifests -----------------------------------------------------------------------------------------------------------


def check_replaceable(manifest: str | os.PathLike, kind: str) -> None:
    """
    Checks that a manifest of speech that was made may be written anew, before the speech is made.

    Args:
        manifest (`str` or `os.PathLike`): the file, which need not be there.
        kind (`str`): what its rows have to be marked as, such as `"synthetic"`.

    Raises:
        `ValueError`: there is a manifest of other speech.
    """
    if not os.path.exists(manifest):
        return
    try:
        rows = [json.loads(line) for line in Path(manifest).read_text(encoding="utf-8").splitlines()]
        is_replaceable = all(row[kind] is True for row in rows)
    except (ValueError, LookupError, TypeError):
        is_replaceable = False
    if not is_replaceable:
        raise ValueError(f"{manifest} is no manifest of {kind} speech, and would be overwritten; take another folder.")


def write_manifest(manifest: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Writes rows as JSON lines, whole or not at all."""
    unfinished = Path(manifest).with_suffix(".part")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(manifest)


__all__ = [
    "Line",
    "Synthesis",
    "babble",
    "check_replaceable",
    "leave_out",
    "read_lines",
    "share_out",
    "synthesize",
    "write_manifest",
]

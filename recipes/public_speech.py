"""Speech read aloud that anybody may have, as a manifest to train on: Common Voice and LibriSpeech.

A source is a table of Common Voice, of its first edition (`cv-valid-dev.csv`, whose `filename` counts from the table's
folder) or of a later one (`validated.tsv`, whose `path` counts from the folder `clips` beside it), or a folder of
LibriSpeech, with a file of texts (`*.trans.txt`) beside the recordings of each chapter.

    python recipes/public_speech.py cv_corpus_v1/cv-valid-dev.csv cv_corpus_v1/cv-valid-test.csv \
        --output cv_corpus_v1/train.jsonl --exclude speechocean762/dev.jsonl speechocean762/test.jsonl
    python recipes/public_speech.py LibriSpeech/train-clean-5 --output LibriSpeech/train.jsonl

Left out, and counted: clips that more listeners rejected than accepted, recordings that are absent, cannot be decoded,
or are too short or long for their text, and texts that are excluded. Of LibriSpeech no part is read whose name says
`test` or `dev`, since figures on these are compared everywhere.

Sources: Ardila et al. 2020, "Common Voice: A Massively-Multilingual Speech Corpus" (https://arxiv.org/abs/1912.06670;
clips in the public domain, CC0); Panayotov et al. 2015, "Librispeech: an ASR corpus based on public domain audio
books" (https://www.openslr.org/12; CC BY 4.0).
"""

import argparse
import csv
import os
from collections import Counter
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile

from echo_hf.metrics import normalize_text
from echo_hf.synthesis import check_replaceable
from echo_hf.synthesis import read_lines
from echo_hf.synthesis import write_manifest

SECONDS = (0.5, 20.0)  # of a recording
LETTERS_PER_SECOND = (2, 28)  # outside of these the recording is cut off, or mostly not speech


@dataclass(frozen=True)
class Recording:
    """A file, what is said in it and by whom (empty where nobody tells), and whether its listeners rejected it."""

    path: Path
    text: str
    speaker: str = ""
    is_rejected: bool = False


def read_common_voice(table: str | os.PathLike) -> Iterator[Recording]:
    """
    The clips of a table of Common Voice, in its order.

    Raises:
        `ValueError`: the table cannot be read, or a row lacks a column.
    """
    table = Path(table)
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            # The later editions set nothing in quotation marks, so that one in a sentence is a part of it.
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if table.suffix == ".tsv" else {}
            rows = list(csv.DictReader(file, **dialect))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: cannot be read as a table of Common Voice ({error}).") from error
    for number, row in enumerate(rows, start=2):
        try:
            is_first_edition = "filename" in row
            path = table.parent / (row["filename"] if is_first_edition else Path("clips", row["path"]))
            text = row["text" if is_first_edition else "sentence"].strip()
            is_rejected = int(row["down_votes"]) > int(row["up_votes"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{table} line {number}: {error!r}; a row has `filename` and `text`, or `path` and `sentence`, and the "
                "whole numbers `up_votes` and `down_votes`."
            ) from error
        yield Recording(path, text, row.get("client_id") or "", is_rejected)


def read_librispeech(folder: str | os.PathLike) -> Iterator[Recording]:
    """
    The recordings below a folder of LibriSpeech, by name. Their texts are in capitals, and become lower case.

    Raises:
        `ValueError`: no file of texts is below the folder, one of `test` or `dev` is, or a line has no text.
    """
    folder = Path(folder)
    tables = sorted(folder.rglob("*.trans.txt"))
    if not tables:
        raise ValueError(
            f"{folder}: no `*.trans.txt` is below it; give a folder of LibriSpeech, such as `train-clean-5`."
        )
    for table in tables:
        part = table.absolute().parents[2].name  # above speaker and chapter; what is above it says nothing
        if part.startswith(("test-", "dev-")):
            raise ValueError(f"{table}: {part} is there to evaluate; give a folder of a `train` part.")
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
            name, _, text = line.strip().partition(" ")
            if not text:
                raise ValueError(f"{table} line {number}: {line!r} is no name with a text behind a space.")
            yield Recording(table.with_name(f"{name}.flac"), text.lower(), name.partition("-")[0])


def problem_of(recording: Recording, held_out: set[str]) -> tuple[str | None, float]:
    """Why a recording is left out, or `None`, and its seconds, of which one left out unheard has none."""
    text = normalize_text(recording.text)
    if recording.is_rejected:
        return "rejected", 0.0
    if text in held_out:
        return "excluded", 0.0
    if not recording.path.is_file():
        return "absent", 0.0
    try:
        seconds = soundfile.info(recording.path).duration
    except soundfile.LibsndfileError:
        return "broken", 0.0
    (shortest, longest), (fewest, most) = SECONDS, LETTERS_PER_SECOND
    if shortest <= seconds <= longest and fewest * seconds <= len(text) <= most * seconds:
        return None, seconds
    return "unlikely", seconds


def write(
    sources: Iterable[str | os.PathLike], output: str | os.PathLike, language: str = "en", excluded: Iterable[str] = ()
) -> Counter:
    """
    Writes the manifest `output`, whole, whose paths count from its folder.

    Args:
        sources (iterable of `str` or `os.PathLike`): tables of Common Voice and folders of LibriSpeech.
        output (`str` or `os.PathLike`): the manifest.
        language (`str`, defaults to `"en"`): of all of them.
        excluded (iterable of `str`): texts to leave out, compared as they are scored.

    Returns:
        `Counter`: how many recordings were `written`, and how many left out for which reason.

    Raises:
        `ValueError`: a source cannot be read, nothing remains, or `output` is a manifest of other speech.
    """
    check_replaceable(output, "public")
    rows, counts, held_out = [], Counter(), {normalize_text(text) for text in excluded}
    for source in sources:
        read = read_librispeech if os.path.isdir(source) else read_common_voice
        for recording in read(source):
            problem, seconds = problem_of(recording, held_out)
            counts[problem or "written"] += 1
            if problem is None:
                audio = Path(os.path.relpath(recording.path, Path(output).parent)).as_posix()
                row = {"audio": audio, "text": recording.text, "language": language, "duration": round(seconds, 3)}
                rows.append(row | ({"speaker": recording.speaker} if recording.speaker else {}) | {"public": True})
    if not rows:
        raise ValueError(
            f"No recording remains ({describe(counts) or 'no rows'}); are the recordings beside their texts?"
        )
    write_manifest(output, rows)
    return counts


def describe(counts: Counter) -> str:
    """How many recordings were left out for which reason, in words; empty where none was."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != "written")


def main(arguments: list[str] | None = None) -> None:
    """Writes a manifest and prints what was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="tables of Common Voice (.csv, .tsv) and folders of LibriSpeech")
    parser.add_argument("--output", required=True, help="the manifest, a .jsonl")
    parser.add_argument("--language", default="en", help="of the recordings (default: en)")
    parser.add_argument("--exclude", nargs="+", default=[], help="manifests or files with texts to leave out")
    options = parser.parse_args(arguments)
    try:
        excluded = [line.text for line in read_lines(options.exclude)]
        counts = write(options.sources, options.output, options.language, excluded)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{options.output}: {counts['written']} recordings; left out {describe(counts) or 0}")


if __name__ == "__main__":
    main()

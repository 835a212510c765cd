"""Speech with transcripts: found, checked, turned into features once, and made into batches.

Whatever the source, a manifest, a folder or a dataset, its rows become one table with the columns `audio` (undecoded,
as `datasets` keeps it), `text`, `origin` (what an error message calls the row) and all that the source has besides.
What can be checked without decoding audio is checked before the first feature is computed. Features lie on disk under
the fingerprint of the audio files used, extractor settings and extractor code, source by source, so F0 is computed
once, whichever batch size or seed a run uses, and whatever other source it is trained with; where other files of a
source are left out, the source is computed again.
"""

import hashlib
import inspect
import json
import math
import os
import random
import stat
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets import IterableDataset
from datasets.utils.file_utils import xopen
from filelock import FileLock
from transformers.utils import logging

from .feature_extraction_echo import open_audio
from .metrics import has_half_surrogate
from .transcription import AUDIO_EXTENSIONS
from .transcription import find_audio_files

logger = logging.get_logger(__name__)

# A source that ends so is meant as a file. Names of datasets on the Hub may have dots, too.
FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".arrow", ".parquet", ".zip", *AUDIO_EXTENSIONS)
MAX_JOINED_SECONDS = 20.0  # of utterances that a collator joins
MAX_TEXT_LENGTH = 100_000  # characters of a transcript, more than are said in an hour
NAMED_AT_MOST = 5  # examples in a message that reports many rows


# Sources -------------------------------------------------------------------------------------------------------------


def load_sources(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    split: str | None = None,
    name: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
) -> Dataset:
    """
    Reads one or more sources of speech with transcripts and puts them one after the other. No audio is decoded.

    Args:
        sources (`str`, `os.PathLike` or a sequence of these): each is one of
            - a manifest: a file of JSON lines, `{"audio": "clips/1.flac", "text": "hello"}`, paths relative to its
              folder, or a pipe with such lines, paths relative to the current folder;
            - a folder with a `metadata.jsonl` manifest (which may say `file_name` for `audio`), or with audio files
              and beside each a `.txt` of the same name;
            - a folder written by `Dataset.save_to_disk`, or the name of a dataset on the Hub.
        split (`str`, *optional*): split of a `datasets` source, e.g. `"train"`.
        name (`str`, *optional*): configuration of a dataset on the Hub, e.g. a language.
        audio_column (`str`, *optional*): column with the audio; `"audio"` (or `"file_name"`) when not given.
        text_column (`str`, *optional*): column with the transcript; `"text"` when not given.

    Returns:
        `datasets.Dataset`: columns `audio` (undecoded: `{"bytes", "path"}`), `text`, `origin`, `source` (as given) and
        the sources' others. A column that has different types in two sources becomes text.

    Raises:
        `ValueError`: a source does not exist, is empty, lacks a column, or has a line that is not JSON; or a transcript
            has more than 100000 characters.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    if not sources:
        raise ValueError("No source of speech was given: name a manifest, a folder or a dataset.")
    tables = []
    for source in map(str, sources):
        table = _load_source(source, split, name, audio_column, text_column)
        _refuse_long_texts(table)
        table = table.remove_columns("source") if "source" in table.column_names else table
        tables.append(table.add_column("source", [source] * len(table)))
    for column in {column for table in tables for column in table.column_names}:
        types = {str(table.features[column]) for table in tables if column in table.column_names}
        if len(types - {str(datasets.Value("null"))}) > 1:
            tables = [_as_text(table, column) if column in table.column_names else table for table in tables]
    return datasets.concatenate_datasets(tables)


def _refuse_long_texts(table: Dataset) -> None:
    for row, text in enumerate(table["text"]):
        if problem := _length_problem(text):
            raise ValueError(f"{table['origin'][row]}: {problem}. Is it the transcript of this recording?")


def _length_problem(text: str | None) -> str | None:
    """Why a transcript is too long to be one, or None."""
    if text is None or len(text) <= MAX_TEXT_LENGTH:
        return None
    return f"the text has {len(text):,} characters, and a transcript has at most {MAX_TEXT_LENGTH:,}"


def _as_text(table: Dataset, column: str) -> Dataset:
    if isinstance(table.features[column], datasets.Value):
        return table.cast_column(column, datasets.Value("string"))
    # A list or an object, which `cast_column` takes for no text.
    texts = [value if value is None else str(_plain(value)) for value in table[column]]
    return table.remove_columns(column).add_column(column, texts)


def _load_source(
    source: str, split: str | None, name: str | None, audio_column: str | None, text_column: str | None
) -> Dataset:
    if "://" in source:
        raise ValueError(f"{source} is a URL. Download it first, e.g. `curl -L URL --output FILE`.")
    path = Path(source).expanduser()
    if path.is_file() or path.is_fifo():
        return _read_manifest(path, audio_column, text_column)
    if path.is_dir() and not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
        if (path / "metadata.jsonl").is_file():
            return _read_manifest(path / "metadata.jsonl", audio_column, text_column)
        return _read_folder(path)
    if path.is_dir():
        table = datasets.load_from_disk(str(path))
    elif path.exists():
        raise ValueError(f"{source} is a terminal or another device. Name a file, a folder or a dataset.")
    elif path.suffix.lower() in FILE_SUFFIXES or path.is_absolute() or len(path.parts) > 2:
        raise ValueError(f"{source}: no such file or folder.")
    else:
        try:
            table = datasets.load_dataset(source, name, split=split)
        except (OSError, ValueError) as error:  # what `datasets` raises for an unknown name, split or configuration
            raise ValueError(
                f"{source}: no file or folder here, and not loaded from the Hub either: {error}"
            ) from error
    if isinstance(table, dict):
        if split not in table:
            raise ValueError(f"{source}: choose one of its splits ({', '.join(table)}), got {split!r}.")
        table = table[split]
    return _from_dataset(table, source, audio_column or "audio", text_column or "text")


def _from_dataset(table: Dataset, source: str, audio_column: str, text_column: str) -> Dataset:
    if not isinstance(table, Dataset):
        raise ValueError(
            f"{source}: a {type(table).__name__} cannot be used; features are computed once, for all rows."
        )
    for column in (audio_column, text_column):
        if column not in table.column_names:
            raise ValueError(
                f"{source}: there is no column {column!r} among {', '.join(table.column_names)}; say which columns hold"
                " the audio and the text."
            )
    if not len(table):
        raise ValueError(f"{source}: the dataset has no rows.")
    if getattr(table.features[text_column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{source}: column {text_column!r} must hold strings, not {table.features[text_column]}.")
    table = table.cast_column(audio_column, datasets.Audio(decode=False))
    # The columns get the names used here; whatever else had such a name gives way.
    for old, new in ((audio_column, "audio"), (text_column, "text")):
        if old != new:
            table = table.remove_columns([new] if new in table.column_names else []).rename_column(old, new)
    if "origin" in table.column_names:
        table = table.remove_columns("origin")
    return table.add_column("origin", [f"{source} row {row}" for row in range(len(table))])


def _read_manifest(path: Path, audio_column: str | None, text_column: str | None) -> Dataset:
    rows, origins = [], []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row, origin = json.loads(line), f"{path} line {number}"
                    if not isinstance(row, dict):
                        raise ValueError(f"{origin}: must be a JSON object such as {{'audio': ..., 'text': ...}}.")
                    rows.append(row)
                    origins.append(origin)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number}: not JSON ({error}). A manifest has one JSON object a line.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); a manifest is a text file of JSON lines.") from error
    if not rows:
        raise ValueError(f"{path}: the manifest is empty.")
    if audio_column is None:
        audio_column = "audio" if "audio" in rows[0] or "file_name" not in rows[0] else "file_name"
    text_column = text_column or "text"
    for row, origin in zip(rows, origins):
        for column in (audio_column, text_column):
            if not isinstance(row.get(column), str):
                found = f"it has {', '.join(row)}" if column not in row else f"got {row[column]!r}"
                raise ValueError(f"{origin}: {column!r} must be a string; {found}.")
        for column, value in row.items():
            if isinstance(value, str) and has_half_surrogate(value):
                raise ValueError(f"{origin}: {column!r} has half of a surrogate pair, which is no character.")
    folder = Path.cwd() if path.is_fifo() else path.parent.absolute()  # a pipe lies in no folder of recordings
    columns = dict.fromkeys(column for row in rows for column in row if column not in (audio_column, text_column))
    return _make_table(
        paths=[str(folder / row[audio_column]) for row in rows],
        texts=[row[text_column] for row in rows],
        origins=[f"{origin} ({row[audio_column]})" for row, origin in zip(rows, origins)],
        extra={column: [_plain(row.get(column)) for row in rows] for column in columns},
    )


def _plain(value: Any) -> Any:
    # Lists and objects of an extra column may differ in shape from line to line, which no table can hold, nor does one
    # hold integers of more than 64 bits.
    is_large = isinstance(value, int) and not -(2**63) <= value < 2**63
    return json.dumps(value, default=str) if isinstance(value, (list, dict)) or is_large else value


def _read_folder(folder: Path) -> Dataset:
    files = find_audio_files(folder)
    if not files:
        manifests = ", ".join(str(path) for path in sorted(folder.glob("*.jsonl")))
        hint = f" Did you mean one of its manifests: {manifests}?" if manifests else ""
        raise ValueError(f"{folder}: no audio files ({', '.join(AUDIO_EXTENSIONS)}) in this folder.{hint}")
    without = [path for path in files if not path.with_suffix(".txt").is_file()]
    if without:
        raise ValueError(
            f"{folder}: {len(without)} of {len(files)} audio files have no text beside them; needed are"
            f" {_name(path.with_suffix('.txt') for path in without)}, or a metadata.jsonl for the folder."
        )
    return _make_table(
        paths=[str(path.absolute()) for path in files],
        texts=[_read_text(path.with_suffix(".txt")) for path in files],
        origins=[str(path) for path in files],
        extra={},
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from error


def _make_table(paths: list[str], texts: list[str], origins: list[str], extra: dict[str, list]) -> Dataset:
    columns: dict[str, list] = {"audio": paths, "text": texts, "origin": origins}
    for column, values in extra.items():
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [value if value is None else str(value) for value in values]
        columns.setdefault(column, values)
    return Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))


def _name(items: Iterable[Any]) -> str:
    """The first few of many items, for a message."""
    items = [str(item) for item in items]
    more = f" and {len(items) - NAMED_AT_MOST} more" if len(items) > NAMED_AT_MOST else ""
    return "; ".join(items[:NAMED_AT_MOST]) + more


# Features ------------------------------------------------------------------------------------------------------------


@dataclass
class PreparedData:
    """
    What [`prepare_dataset`] gives.

    Args:
        dataset (`datasets.Dataset`):
            `input_features` (float32, `(frames, channels)`), `length` (frames), `labels` (token ids as the tokenizer
            gives them), `audio` (path, or `None` for audio in memory), `text`, `origin` and the source's other columns.
        skipped (`list[tuple[str, str]]`): origin and reason of each row left out.
        seconds (`float`): duration of the audio in `dataset`.
    """

    dataset: Dataset
    skipped: list[tuple[str, str]]
    seconds: float


def prepare_dataset(
    table: Dataset,
    processor,
    max_label_length: int | None = None,
    min_seconds: float | None = None,
    max_seconds: float | None = None,
    skip_broken: bool = False,
    allow_empty_text: bool = False,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> PreparedData:
    """
    Checks a table of speech, then computes its features, or takes them from the cache.

    Args:
        table (`datasets.Dataset`): as [`load_sources`] gives it.
        processor ([`EchoProcessor`]): its feature extractor and its tokenizer are used. Audio is resampled as needed.
        max_label_length (`int`, *optional*): longest transcript in tokens, begin and end of sequence counted.
        min_seconds (`float`, *optional*): shorter audio is left out.
        max_seconds (`float`, *optional*): longer audio is left out.
        skip_broken (`bool`, defaults to `False`):
            Whether a row that cannot be used (audio missing or broken, no text, too long a text) is reported and left
            out. Otherwise it is an error.
        allow_empty_text (`bool`, defaults to `False`): whether audio without words, such as silence, can be used.
        num_proc (`int`, *optional*): number of processes that compute features; this process alone when not given.
        cache_dir (`str`, *optional*): folder for features; `echo_hf` in the cache of `datasets` when not given.

    Returns:
        [`PreparedData`].

    Raises:
        `ValueError`: rows cannot be used, the message names the first of them; or no row is left.
    """
    labels = processor.tokenizer([text or "" for text in table["text"]])["input_ids"]
    origins = table["origin"][:]
    files, problems, outside = _check_rows(
        table, labels, max_label_length, min_seconds or 0.0, max_seconds or math.inf, allow_empty_text
    )
    _report(origins, problems, skip_broken)

    keep = [index for index in range(len(table)) if index not in problems and index not in outside]
    if not keep:
        raise ValueError(f"None of the {len(table)} utterances can be used: {_describe(origins, problems | outside)}.")
    sources = table["source"][:] if "source" in table.column_names else [None] * len(table)
    # Each source by itself, and each time it is named, so that what was computed of it alone serves beside others.
    times, part_of = Counter(), {}
    for index in keep:
        times[sources[index], origins[index]] += 1
        part_of[index] = sources[index], times[sources[index], origins[index]]
    features = datasets.concatenate_datasets(
        [
            _compute_features(
                table.select(rows).select_columns(["audio"]),
                processor.feature_extractor,
                [files[index].identity for index in rows],
                num_proc,
                Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "echo_hf",
            )
            for rows in (list(part) for _, part in groupby(keep, key=part_of.__getitem__))
        ]
    )
    undecodable = {keep[row]: message for row, message in enumerate(features["problem"]) if message}
    _report(origins, undecodable, skip_broken)

    others = table.select(keep).remove_columns(
        [name for name in ("audio", "labels", "length", "input_features") if name in table.column_names]
    )
    others = others.flatten_indices(keep_in_memory=True)
    others = others.add_column("audio", [files[index].path for index in keep])
    others = others.add_column("labels", [labels[index] for index in keep])
    prepared = datasets.concatenate_datasets([others, features.remove_columns("problem")], axis=1)
    if undecodable:
        prepared = prepared.select([row for row, index in enumerate(keep) if index not in undecodable])
        if not len(prepared):
            raise ValueError(f"None of the {len(table)} utterances can be used: {_describe(origins, undecodable)}.")
    left_out = dict(sorted((problems | outside | undecodable).items()))
    if outside:
        logger.warning(f"{len(outside)} of {len(table)} utterances left out: {_describe(origins, outside)}.")
    return PreparedData(
        dataset=prepared.with_format("numpy", columns=["input_features"], output_all_columns=True),
        skipped=[(origins[index], reason) for index, reason in left_out.items()],
        seconds=sum(files[index].seconds for index in keep if index not in undecodable),
    )


@dataclass(frozen=True)
class _AudioFile:
    """What the header of an undecoded audio entry says: duration, what the fingerprint knows it by, what is wrong."""

    path: str | None
    seconds: float = 0.0
    identity: str = ""
    problem: str | None = None


def _check_rows(
    table: Dataset,
    labels: list[list[int]],
    max_label_length: int | None,
    min_seconds: float,
    max_seconds: float,
    allow_empty_text: bool,
) -> tuple[list[_AudioFile], dict[int, str], dict[int, str]]:
    """The file of each row; which rows cannot be used and why; which are too short or too long. Decodes no audio."""
    files, problems, outside = [], {}, {}
    rows = table.select_columns(["audio", "text"])
    for index, row in enumerate(datasets.utils.tqdm(rows, desc="Checking audio files", leave=False)):
        file, text = _inspect(row["audio"]), row["text"]
        files.append(file)
        if file.problem is not None:
            problems[index] = file.problem
        elif not min_seconds <= file.seconds <= max_seconds:
            outside[index] = f"{file.seconds:.2f} s is too {'short' if file.seconds < min_seconds else 'long'}"
        elif problem := _text_problem(text, labels[index], max_label_length, allow_empty_text):
            problems[index] = problem
    return files, problems, outside


def _text_problem(
    text: str | None, labels: list[int], max_label_length: int | None, allow_empty_text: bool = False
) -> str | None:
    """Why a transcript cannot be used, or None."""
    if text is None:
        return "there is no text"
    if problem := _length_problem(text):
        return problem
    if not text.strip() and not allow_empty_text:
        return "the text is empty"
    if max_label_length is not None and len(labels) > max_label_length:
        return f"the text has {len(labels)} tokens, the model takes {max_label_length} (`max_target_positions`)"
    return None


def _inspect(audio: dict[str, Any] | None) -> _AudioFile:
    if audio is None:
        return _AudioFile(None, problem="there is no audio")
    data, path = audio["bytes"], audio["path"]
    try:
        if data is None:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # to read a pipe may take for ever, and a device may have no end
                return _AudioFile(path, problem=f"{path} is not a regular file")
            identity = f"{path} {status.st_size} {status.st_mtime_ns}"
        else:
            identity = hashlib.sha256(data).hexdigest()
    except FileNotFoundError:
        return _AudioFile(path, problem=f"there is no file {path}")
    except (OSError, TypeError, ValueError) as error:  # neither bytes nor path; NUL within a path
        return _AudioFile(path, problem=f"the audio cannot be read: {error}")
    try:
        with open_audio(path if data is None else data) as (header, _):
            num_frames, rate = header.frames, header.samplerate
    except (OSError, ValueError) as error:
        return _AudioFile(path, problem=str(error))
    if not num_frames:
        return _AudioFile(path, problem="the audio is empty")
    return _AudioFile(path, num_frames / rate, identity)


def _report(origins: list[str], problems: dict[int, str], skip_broken: bool) -> None:
    if not problems:
        return
    message = f"{len(problems)} of {len(origins)} utterances cannot be used: {_describe(origins, problems)}."
    if not skip_broken:
        raise ValueError(f"{message} Mend or remove them, or leave them out with `skip_broken`.")
    logger.warning(f"{message} They are skipped.")


def _describe(origins: list[str], reasons: dict[int, str]) -> str:
    return _name(f"{origins[index]}: {reason.rstrip('.')}" for index, reason in sorted(reasons.items()))


def _compute_features(
    table: Dataset, extractor, identities: list[str], num_proc: int | None, cache_dir: Path
) -> Dataset:
    cache_dir.mkdir(parents=True, exist_ok=True)
    # The fingerprint is made here: the one that `datasets` makes of a function hangs on how Python pickles the
    # extractor, and it does not see which audio file changed.
    fingerprint = features_fingerprint(extractor, identities)
    # `datasets` writes under another name and renames, so that a file is whole; the lock saves doing the same twice.
    with FileLock(cache_dir / f"features-{fingerprint}.lock"):
        return table.map(
            _extract,
            batched=True,
            batch_size=16,
            writer_batch_size=64,
            remove_columns=table.column_names,
            features=datasets.Features(
                {
                    "input_features": datasets.Array2D((None, extractor.feature_size), "float32"),
                    "length": datasets.Value("int32"),
                    "problem": datasets.Value("string"),
                }
            ),
            fn_kwargs={"extractor": extractor},
            num_proc=num_proc if num_proc is not None and num_proc > 1 else None,
            cache_file_name=str(cache_dir / f"features-{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            load_from_cache_file=True,
            desc="Computing features",
        )


def features_fingerprint(extractor, identities: Iterable[str]) -> str:
    """
    A name for the features of some audio: the same in every process, another whenever the features may differ.

    Args:
        extractor ([`EchoFeatureExtractor`]): its settings count, and so does the code of its module and of F0's. The
            versions of the libraries beneath do not.
        identities (`Iterable[str]`): one string an utterance, in order, that changes with the audio.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    aside = ("auto_map", "processor_class", "resample", "return_attention_mask")  # nothing that changes a value
    settings = {key: value for key, value in extractor.to_dict().items() if key not in aside}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    ours = [
        kind for kind in type(extractor).__mro__ if kind.__module__.split(".")[0] not in ("transformers", "builtins")
    ]
    modules = [Path(inspect.getfile(kind)) for kind in ours]
    for path in (*modules, *(path.with_name("pitch_echo.py") for path in modules)):
        digest.update(path.read_bytes() if path.is_file() else b"")
    for identity in identities:
        digest.update(identity.encode() + b"\n")
    return digest.hexdigest()[:32]


def _extract(batch: dict[str, list], extractor) -> dict[str, list]:
    """What cannot be decoded has no frames and says why: an error here would cost the features of all others."""
    features, problems = [], []
    for audio in batch["audio"]:
        try:
            values = np.asarray(extractor(audio, resample=True)["input_features"][0], dtype=np.float32)
            problem = None
        except (OSError, RuntimeError, ValueError) as error:
            values, problem = np.zeros((0, extractor.feature_size), dtype=np.float32), str(error)
        features.append(values)
        problems.append(problem)
    return {"input_features": features, "length": [len(values) for values in features], "problem": problems}


# Streams -------------------------------------------------------------------------------------------------------------


def stream_dataset(
    dataset: IterableDataset,
    processor,
    audio_column: str = "audio",
    text_column: str = "text",
    max_label_length: int | None = None,
    min_seconds: float | None = None,
    max_seconds: float | None = None,
    skip_broken: bool = False,
) -> IterableDataset:
    """
    Features and labels of a stream, computed as they are asked for and kept nowhere: for speech that is too much for
    the disk, or not all there yet. Every epoch computes them again; [`prepare_dataset`] does it once.

    Args:
        dataset (`datasets.IterableDataset`): of `load_dataset(..., streaming=True)` or `to_iterable_dataset()`.
        processor ([`EchoProcessor`]): its feature extractor and its tokenizer are used. Audio is resampled as needed.
        audio_column (`str`, defaults to `"audio"`): column with audio, or with paths of audio files.
        text_column (`str`, defaults to `"text"`): column with the transcript.
        max_label_length (`int`, *optional*): longest transcript in tokens, begin and end of sequence counted.
        min_seconds (`float`, *optional*): shorter audio is left out.
        max_seconds (`float`, *optional*): longer audio is left out.
        skip_broken (`bool`, defaults to `False`): whether a row that cannot be used is left out in silence. Otherwise
            it is an error.

    Returns:
        `datasets.IterableDataset`: `input_features` (float32, `(frames, channels)`), `length` (frames) and `labels`.
        It has as many shards as `dataset`, which are shared out over the workers of a `DataLoader`. Train on its
        `.repeat(None)` with `max_steps`: resuming, the Trainer passes over as many batches as it had, and an epoch of
        unknown length it takes for one of `max_steps`.

    Raises:
        `ValueError`: `dataset` is no stream, or lacks a column; when iterated, a row cannot be used.
    """
    if not isinstance(dataset, IterableDataset):
        raise ValueError(f"A {type(dataset).__name__} is not a stream; make it one with `to_iterable_dataset()`.")
    if dataset.column_names is None:  # known from the first row on, such as after `map`
        dataset = dataset._resolve_features()
    for column in (audio_column, text_column):
        if column not in dataset.column_names:
            raise ValueError(f"The stream has no column {column!r}, but {', '.join(dataset.column_names)}.")
    limits = (max_label_length, min_seconds or 0.0, max_seconds or math.inf)
    return dataset.cast_column(audio_column, datasets.Audio(decode=False)).map(
        _extract_stream,
        batched=True,
        batch_size=1,  # so that a row can be left out
        remove_columns=dataset.column_names,
        fn_kwargs={
            "processor": processor,
            "columns": (audio_column, text_column),
            "limits": limits,
            "skip_broken": skip_broken,
        },
    )


def _extract_stream(batch: dict[str, list], processor, columns, limits, skip_broken: bool) -> dict[str, list]:
    """One row, or none."""
    (audio,), (text,) = (batch[column] for column in columns)
    max_label_length, min_seconds, max_seconds = limits
    file = _AudioFile(None)
    if audio is not None and audio["bytes"] is None and "://" in (audio["path"] or ""):  # a file on the Hub, say
        try:
            with xopen(audio["path"], "rb") as remote:
                audio = {"bytes": remote.read(), "path": audio["path"]}
        except (OSError, ValueError, KeyError) as error:  # KeyError: no such member of an archive
            file = _AudioFile(audio["path"], problem=f"the audio cannot be fetched: {error}")
    if file.problem is None:
        file = _inspect(audio)
    labels = processor.tokenizer("" if _length_problem(text) else text or "")["input_ids"]
    problem, features = file.problem, None
    is_inside = problem is None and min_seconds <= file.seconds <= max_seconds
    if is_inside:
        problem = _text_problem(text, labels, max_label_length)
    if is_inside and problem is None:
        try:
            features = np.asarray(processor.feature_extractor(audio, resample=True)["input_features"][0], np.float32)
        except (OSError, RuntimeError, ValueError) as error:
            problem = str(error)
    if problem is not None and not skip_broken:
        origin = file.path or f"The audio of {text!r}"
        raise ValueError(f"{origin}: {problem.rstrip('.')}. Mend or remove it, or leave it out with `skip_broken`.")
    if features is None:
        return {"input_features": [], "length": [], "labels": []}
    return {"input_features": [features], "length": [len(features)], "labels": [labels]}


# Batches -------------------------------------------------------------------------------------------------------------


@dataclass
class EchoDataCollator:
    """
    Makes a batch of rows of [`prepare_dataset`], or of any rows with `input_features` and `labels`; other columns are
    left aside.

    Features are padded by the extractor. Labels are padded with -100, which no loss counts, and lose a begin of
    sequence at their front: the model puts its `decoder_start_token_id` there itself when it shifts them.

    Args:
        processor ([`EchoProcessor`]): its feature extractor pads, its tokenizer says what the begin of sequence is.
        pad_to_multiple_of (`int`, *optional*): frames are padded up to a multiple of this, for fixed shapes.
        perturb (`Callable`, *optional*):
            What is done to the features of the utterances before, such as [`VoicePerturbation.batch`]: it takes a list
            of them, each `(frames, channels)`, and a `random.Random` to draw from, and returns as many, each
            `(other frames, channels)`. For training only.
        join (`float`, defaults to 0.0):
            Probability that the utterances of a batch are joined: those of a language, as many as were drawn and as
            `max_joined_seconds` hold, one behind the other, their texts parted by a space; so the batch has fewer and
            longer rows. Rows need `text` and `labels`; those without a `language` are taken to be of one.
        max_joined_seconds (`float`, defaults to 20.0): longest audio that joining may make.
        max_label_length (`int`, *optional*): longest transcript in tokens that joining may make.
        seed (`int`, defaults to 0): of what is drawn.
        epoch (`int`, *optional*, defaults to 0): likewise; [`EchoTrainer`] sets it. `None`, as for a stream, which may
            repeat itself within an epoch: `perturb` gets no `random.Random`, and all is drawn anew each time.

    Returns (`__call__`):
        `dict[str, torch.Tensor]`: `input_features` `(batch, frames, channels)`, `attention_mask` `(batch, frames)` and,
        if the rows have them, `labels` `(batch, tokens)`.

    Raises:
        `ValueError`: utterances are to be joined, and rows have no `text` or `labels`, or the accumulated phase, which
            would begin anew within a row.
    """

    processor: Any
    pad_to_multiple_of: int | None = None
    perturb: Callable[[list[np.ndarray], random.Random | None], list[np.ndarray]] | None = None
    join: float = 0.0
    max_joined_seconds: float = MAX_JOINED_SECONDS
    max_label_length: int | None = None
    seed: int = 0
    epoch: int | None = 0

    def __post_init__(self):
        if self.join and "phase" in self.processor.feature_extractor.feature_groups:
            raise ValueError("The feature group 'phase' cannot be joined; leave it or `join` out.")

    @property
    def draws(self) -> bool:
        """Whether chance has a part in its batches."""
        return self.perturb is not None or self.join > 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.join and any(row.get(name) is None for row in rows for name in ("text", "labels")):
            raise ValueError(
                "Utterances are joined with their texts, and a row has no `text` or no `labels`: a stream has no texts,"
                " and a Trainer leaves them out unless `remove_unused_columns` is false. Or leave `join` out."
            )
        features = [np.asarray(row["input_features"], dtype=np.float32) for row in rows]
        chance = None
        if self.draws and self.epoch is not None:
            # Loaders fetch batches ahead, in whatever process. So chance hangs on the batch itself, and not on what was
            # drawn before it: a run that is resumed hears what it would have heard.
            lengths = [len(utterance) for utterance in features]
            said = [np.asarray(row["labels"]).tolist() for row in rows if row.get("labels") is not None]
            chance = random.Random(f"{self.seed} {self.epoch} {lengths} {said}")
        if self.perturb is not None:
            features = self.perturb(features, chance)
        if self.join and (chance or random).random() < self.join:
            rows, features = self._join(rows, features, chance or random)
        padded = self.processor.feature_extractor.pad(
            {"input_features": features},
            padding=True,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors="pt",
        )
        batch = dict(padded)
        if all(row.get("labels") is not None for row in rows):
            begin = self.processor.tokenizer.bos_token_id
            labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
            labels = [ids[1:] if len(ids) and ids[0] == begin else ids for ids in labels]
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return batch

    def _join(self, rows: list[dict[str, Any]], features: list[np.ndarray], chance) -> tuple[list, list]:
        """Fewer and longer rows, each with `labels` alone, and their features."""
        extractor, tokenizer = self.processor.feature_extractor, self.processor.tokenizer
        limit = round(self.max_joined_seconds * extractor.sampling_rate / extractor.hop_length)
        most = chance.randint(2, max(2, limit // max(map(len, features))))

        def language(index: int) -> str:
            return str(rows[index].get("language"))

        def fits(indices: list[int]) -> bool:
            # Each has a begin and an end of sequence of its own, of which a joined one keeps two; spaces are fewer.
            tokens = sum(len(rows[index]["labels"]) for index in indices)
            if self.max_label_length is not None and tokens > self.max_label_length:
                return False
            return sum(len(features[index]) for index in indices) <= limit

        # Those of a source side by side, as they may be of one speaker.
        order = sorted(range(len(rows)), key=lambda index: (language(index), str(rows[index].get("source"))))
        joined, joined_features = [], []
        for _, indices in groupby(order, key=language):
            parts: list[int] = []
            for index in [*indices, None]:
                if parts and (index is None or len(parts) == most or not fits([*parts, index])):
                    text = " ".join(rows[part]["text"] for part in parts if rows[part]["text"])
                    labels = tokenizer(text)["input_ids"] if len(parts) > 1 else rows[parts[0]]["labels"]
                    joined.append({"labels": labels})
                    joined_features.append(np.concatenate([features[part] for part in parts]))
                    parts = []
                parts.append(index)
        return joined, joined_features


__all__ = [
    "EchoDataCollator",
    "PreparedData",
    "features_fingerprint",
    "load_sources",
    "prepare_dataset",
    "stream_dataset",
]

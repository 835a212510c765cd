"""Features of speech, computed once and kept on disk, or computed as a stream is read.

What can be checked without decoding audio is checked before the first feature is computed. Features lie on disk under
the fingerprint of the audio files used, extractor settings and extractor code, source by source. So F0 is computed
once, whichever batch size or seed a run uses, and whatever other source it is trained with. Where other files of a
source are left out, the source is computed again.
"""

import hashlib
import inspect
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from datasets.utils.file_utils import xopen
from filelock import FileLock
from transformers.utils import logging

from ..feature_extraction_echo import open_audio
from ..metrics import MAX_CHARACTERS
from .sources import length_problem, name_some

logger = logging.get_logger(__name__)


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
    # The tokenizer's native code ends the process when memory runs out: of a text too long to use only the start.
    labels = processor.tokenizer([(text or "")[:MAX_CHARACTERS] for text in table["text"]])["input_ids"]
    origins = table["origin"][:]
    files, problems, outside = _check_rows(
        table, labels, max_label_length, min_seconds or 0.0, max_seconds or math.inf, allow_empty_text
    )
    _report(origins, problems, skip_broken)

    keep = [index for index in range(len(table)) if index not in problems and index not in outside]
    if not keep:
        raise ValueError(f"None of the {len(table)} utterances can be used: {_describe(origins, problems | outside)}.")
    folder = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "echo_hf"
    parts = [
        _compute_features(
            table.select(rows).select_columns(["audio"]),
            processor.feature_extractor,
            [files[index].identity for index in rows],
            num_proc,
            folder,
        )
        for rows in _rows_by_source(table, keep)
    ]
    features = datasets.concatenate_datasets(parts)
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


def _rows_by_source(table: Dataset, keep: list[int]) -> list[list[int]]:
    """The rows to keep, each source by itself, and each time it is named, so that what was computed of it alone serves
    beside others."""
    sources = table["source"][:] if "source" in table.column_names else [None] * len(table)
    origins = table["origin"][:]
    times, part_of = Counter(), {}
    for index in keep:
        times[sources[index], origins[index]] += 1
        part_of[index] = sources[index], times[sources[index], origins[index]]
    return [list(part) for _, part in groupby(keep, key=part_of.__getitem__)]


def _text_problem(
    text: str | None, labels: list[int], max_label_length: int | None, allow_empty_text: bool = False
) -> str | None:
    """Why a transcript cannot be used, or None."""
    if text is None:
        return "there is no text"
    if problem := length_problem(text):
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
    return name_some(f"{origins[index]}: {reason.rstrip('.')}" for index, reason in sorted(reasons.items()))


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
    beside = ("pitch_echo.py", "autocorrelation_echo.py")
    for path in (*modules, *(path.with_name(name) for path in modules for name in beside)):
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
    labels = processor.tokenizer((text or "")[:MAX_CHARACTERS])["input_ids"]
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
        origin = file.path or f"The audio of {text if text is None else text[:50]!r}"
        raise ValueError(f"{origin}: {problem.rstrip('.')}. Mend or remove it, or leave it out with `skip_broken`.")
    if features is None:
        return {"input_features": [], "length": [], "labels": []}
    return {"input_features": [features], "length": [len(features)], "labels": [labels]}


__all__ = ["PreparedData", "features_fingerprint", "prepare_dataset", "stream_dataset"]

"""Features of speech, computed once and kept on disk.

What can be checked without decoding audio is checked before the first feature is computed. Features lie on disk by the
fingerprint of the audio files used, the extractor's settings and its code, source by source. So F0 is computed once,
for any batch size, seed and mixture of sources. A source is computed again when other files of it are left out.
"""

import hashlib
import inspect
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from filelock import FileLock
from transformers.utils import logging

from ..feature_extraction_echo import open_audio
from ..metrics import MAX_CHARACTERS
from .sources import length_problem, name_some

logger = logging.get_logger(__name__)


@dataclass
class PreparedData:
    """
    What [`prepare_dataset`] returns.

    Args:
        dataset (`datasets.Dataset`):
            `input_features` (float32, `(frames, channels)`), `length` (frames), `labels` (token ids of the tokenizer),
            `audio` (path, or `None` for audio in memory), `text`, `origin` and the source's other columns.
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
    Checks a table of speech and computes its features, or takes them from the cache.

    Args:
        table (`datasets.Dataset`): of [`load_sources`].
        processor ([`EchoProcessor`]): its feature extractor and its tokenizer are used. Audio is resampled as needed.
        max_label_length (`int`, *optional*): longest transcript in tokens, begin and end of sequence counted.
        min_seconds, max_seconds (`float`, *optional*): shorter and longer audio is left out.
        skip_broken (`bool`, defaults to `False`):
            Whether a row that cannot be used (audio missing or broken, no text, too long a text) is reported and left
            out. Otherwise it is an error.
        allow_empty_text (`bool`, defaults to `False`): whether audio without words, such as silence, can be used.
        num_proc (`int`, *optional*): number of processes that compute features; this process alone when not given.
        cache_dir (`str`, *optional*): folder for features; `echo_hf` in the cache of `datasets` when not given.

    Raises:
        `ValueError`: rows cannot be used (the message names the first of them), or no row is left.
    """
    # The tokenizer's native code ends the process when memory runs out.
    labels = processor.tokenizer([(text or "")[:MAX_CHARACTERS] for text in table["text"]])["input_ids"]
    origins = table["origin"][:]
    limits = (max_label_length, min_seconds or 0.0, max_seconds or math.inf, allow_empty_text)
    rows = datasets.utils.tqdm(table.select_columns(["audio", "text"]), desc="Checking audio files", leave=False)
    checked = [_check(row["audio"], row["text"], ids, *limits) for row, ids in zip(rows, labels)]
    problems = {index: row.problem for index, row in enumerate(checked) if row.problem}
    outside = {index: row.outside for index, row in enumerate(checked) if row.outside}
    _report(origins, problems, skip_broken)

    keep = [index for index in range(len(table)) if index not in problems and index not in outside]
    if not keep:
        raise ValueError(f"None of the {len(table)} utterances can be used: {_describe(origins, problems | outside)}.")
    folder = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "echo_hf"
    parts = []
    for part in _rows_by_source(table, keep):
        audio, identities = table.select(part).select_columns(["audio"]), [checked[index].identity for index in part]
        parts.append(_compute_features(audio, processor.feature_extractor, identities, num_proc, folder))
    features = datasets.concatenate_datasets(parts)
    undecodable = {keep[row]: message for row, message in enumerate(features["problem"]) if message}
    _report(origins, undecodable, skip_broken)
    if len(undecodable) == len(keep):
        raise ValueError(f"None of the {len(table)} utterances can be used: {_describe(origins, undecodable)}.")
    if outside:
        logger.warning(f"{len(outside)} of {len(table)} utterances left out: {_describe(origins, outside)}.")

    replaced = {"audio", "labels", "length", "input_features"}.intersection(table.column_names)
    others = table.select(keep).remove_columns(list(replaced)).flatten_indices(keep_in_memory=True)
    others = others.add_column("audio", [checked[index].path for index in keep])
    others = others.add_column("labels", [labels[index] for index in keep])
    prepared = datasets.concatenate_datasets([others, features.remove_columns("problem")], axis=1)
    if undecodable:
        prepared = prepared.select([row for row, index in enumerate(keep) if index not in undecodable])
    return PreparedData(
        dataset=prepared.with_format("numpy", columns=["input_features"], output_all_columns=True),
        skipped=[(origins[index], reason) for index, reason in sorted((problems | outside | undecodable).items())],
        seconds=sum(checked[index].seconds for index in keep if index not in undecodable),
    )


# Checks --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Checked:
    """What is known of undecoded audio. `identity` changes with it; `problem` and `outside` say why it is left out."""

    path: str | None
    seconds: float = 0.0
    identity: str = ""
    problem: str | None = None
    outside: str | None = None


def _check(
    audio: dict[str, Any] | None,
    text: str | None,
    labels: list[int],
    max_label_length: int | None,
    min_seconds: float,
    max_seconds: float,
    allow_empty_text: bool,
) -> _Checked:
    checked = _inspect(audio)
    if checked.problem is not None:
        return checked
    if not min_seconds <= checked.seconds <= max_seconds:
        side = "short" if checked.seconds < min_seconds else "long"
        return replace(checked, outside=f"{checked.seconds:.2f} s is too {side}")
    if text is None:
        problem = "there is no text"
    elif not text.strip() and not allow_empty_text:
        problem = "the text is empty"
    else:
        problem = length_problem(text)
    if problem is None and max_label_length is not None and len(labels) > max_label_length:
        problem = f"the text has {len(labels)} tokens, the model takes {max_label_length} (`max_target_positions`)"
    return replace(checked, problem=problem)


def _inspect(audio: dict[str, Any] | None) -> _Checked:
    if audio is None:
        return _Checked(None, problem="there is no audio")
    data, path = audio["bytes"], audio["path"]
    try:
        if data is None:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
                return _Checked(path, problem=f"{path} is not a regular file")
            identity = f"{path} {status.st_size} {status.st_mtime_ns}"
        else:
            identity = hashlib.sha256(data).hexdigest()
    except FileNotFoundError:
        return _Checked(path, problem=f"there is no file {path}")
    except (OSError, TypeError, ValueError) as error:  # neither bytes nor path; NUL within a path
        return _Checked(path, problem=f"the audio cannot be read: {error}")
    try:
        with open_audio(path if data is None else data) as (header, _):
            seconds = header.frames / header.samplerate
    except (OSError, ValueError) as error:
        return _Checked(path, problem=str(error))
    return _Checked(path, seconds, identity, None if seconds else "the audio is empty")


def _report(origins: list[str], problems: dict[int, str], skip_broken: bool) -> None:
    if not problems:
        return
    message = f"{len(problems)} of {len(origins)} utterances cannot be used: {_describe(origins, problems)}."
    if not skip_broken:
        raise ValueError(f"{message} Mend or remove them, or leave them out with `skip_broken`.")
    logger.warning(f"{message} They are skipped.")


def _describe(origins: list[str], reasons: dict[int, str]) -> str:
    return name_some(f"{origins[index]}: {reason.rstrip('.')}" for index, reason in sorted(reasons.items()))


# Features ------------------------------------------------------------------------------------------------------------


def _rows_by_source(table: Dataset, keep: list[int]) -> list[list[int]]:
    """The rows to keep in a part for each source, and for each time that it is named, which share its features."""
    sources = table["source"][:] if "source" in table.column_names else [None] * len(table)
    origins = table["origin"][:]
    times, part_of = Counter(), {}
    for index in keep:
        times[sources[index], origins[index]] += 1
        part_of[index] = sources[index], times[sources[index], origins[index]]
    return [list(part) for _, part in groupby(keep, key=part_of.__getitem__)]


def _compute_features(
    table: Dataset, extractor, identities: list[str], num_proc: int | None, cache_dir: Path
) -> Dataset:
    cache_dir.mkdir(parents=True, exist_ok=True)
    # `datasets` has a fingerprint of its own, which depends on how Python pickles the extractor and does not see that
    # an audio file changed.
    fingerprint = features_fingerprint(extractor, identities)
    # `datasets` renames a file when it is whole. The lock keeps two processes from computing the same.
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
    A name for the features of some audio, 32 hexadecimal digits: the same in every process, another when the features
    may differ.

    Args:
        extractor ([`EchoFeatureExtractor`]): its settings and code count, versions of libraries do not.
        identities (`Iterable[str]`): one string an utterance, in order, that changes with the audio.
    """
    without_effect = ("auto_map", "processor_class", "resample", "return_attention_mask")
    settings = {key: value for key, value in extractor.to_dict().items() if key not in without_effect}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    classes = [
        kind for kind in type(extractor).__mro__ if kind.__module__.split(".")[0] not in ("transformers", "builtins")
    ]
    modules = [Path(inspect.getfile(kind)) for kind in classes]
    pitch = [path.with_name(name) for path in modules for name in ("pitch_echo.py", "autocorrelation_echo.py")]
    for path in modules + pitch:
        digest.update(path.read_bytes() if path.is_file() else b"")
    for identity in identities:
        digest.update(identity.encode() + b"\n")
    return digest.hexdigest()[:32]


def _extract(batch: dict[str, list], extractor) -> dict[str, list]:
    """Audio that cannot be decoded has no frames and a problem: an error would discard the features of all others."""
    features, problems = zip(*(_features(extractor, audio) for audio in batch["audio"]))
    return {"input_features": list(features), "length": [len(values) for values in features], "problem": list(problems)}


def _features(extractor, audio: dict[str, Any]) -> tuple[np.ndarray, str | None]:
    try:
        return np.asarray(extractor(audio, resample=True)["input_features"][0], dtype=np.float32), None
    except (OSError, RuntimeError, ValueError) as error:
        return np.zeros((0, extractor.feature_size), dtype=np.float32), str(error)


__all__ = ["PreparedData", "features_fingerprint", "prepare_dataset"]

"""Speech with transcripts from manifests, folders and datasets, as one checked table. No audio is decoded."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from ..inference import AUDIO_EXTENSIONS, find_audio_files
from ..metrics import MAX_CHARACTERS, has_half_surrogate

# A source with such an ending is a file. Names of datasets on the Hub may have dots, too.
FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".arrow", ".parquet", ".zip", *AUDIO_EXTENSIONS)
NAMED_AT_MOST = 5  # examples in a message that reports many rows


def load_sources(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    split: str | None = None,
    name: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
) -> Dataset:
    """
    Reads sources of speech with transcripts and concatenates them.

    Args:
        sources (`str`, `os.PathLike` or a sequence of these): each is one of
            - a manifest: a file of JSON lines, `{"audio": "clips/1.flac", "text": "hello"}`, paths relative to its
              folder, or a pipe with such lines, paths relative to the current folder;
            - a folder with a `metadata.jsonl` manifest (with `file_name` or `audio`), or with audio files and beside
              each a `.txt` of the same name;
            - a folder written by `Dataset.save_to_disk`, or the name of a dataset on the Hub.
        split (`str`, *optional*): split of a `datasets` source, e.g. `"train"`.
        name (`str`, *optional*): configuration of a dataset on the Hub, e.g. a language.
        audio_column (`str`, *optional*): column with the audio; `"audio"` (or `"file_name"`) when not given.
        text_column (`str`, *optional*): column with the transcript; `"text"` when not given.

    Returns:
        `datasets.Dataset`: columns `audio` (undecoded: `{"bytes", "path"}`), `text`, `origin` (names the row in error
        messages), `source` (as given) and the sources' others. A column of different types in two sources becomes text.

    Raises:
        `ValueError`: a source does not exist, is empty, lacks a column, or has a line that is not JSON; or a transcript
            has more than `MAX_CHARACTERS` characters.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    if not sources:
        raise ValueError("No source of speech was given: name a manifest, a folder or a dataset.")
    tables = []
    for source in map(str, sources):
        table = _load_source(source, split, name, audio_column, text_column)
        for row, text in enumerate(table["text"]):
            if problem := length_problem(text):
                raise ValueError(f"{table['origin'][row]}: {problem}. Is it the transcript of this recording?")
        tables.append(_set_column(table, "source", [source] * len(table)))
    for column in {column for table in tables for column in table.column_names}:
        types = {str(table.features[column]) for table in tables if column in table.column_names}
        if len(types - {str(datasets.Value("null"))}) > 1:
            tables = [_as_text(table, column) if column in table.column_names else table for table in tables]
    return datasets.concatenate_datasets(tables)


def length_problem(text: str | None) -> str | None:
    """Why a transcript is too long to be one, or None."""
    if text is None or len(text) <= MAX_CHARACTERS:
        return None
    return f"the text has {len(text):,} characters, and a transcript has at most {MAX_CHARACTERS:,}"


def name_some(items: Iterable[Any]) -> str:
    """The first few of many items, for a message."""
    items = [str(item) for item in items]
    more = f" and {len(items) - NAMED_AT_MOST} more" if len(items) > NAMED_AT_MOST else ""
    return "; ".join(items[:NAMED_AT_MOST]) + more


def _set_column(table: Dataset, column: str, values: list) -> Dataset:
    return table.remove_columns([column] if column in table.column_names else []).add_column(column, values)


def _as_text(table: Dataset, column: str) -> Dataset:
    if isinstance(table.features[column], datasets.Value):
        return table.cast_column(column, datasets.Value("string"))
    # `cast_column` makes no text of a list or an object.
    return _set_column(table, column, [value if value is None else str(_plain(value)) for value in table[column]])


def _load_source(
    source: str, split: str | None, name: str | None, audio_column: str | None, text_column: str | None
) -> Dataset:
    if "://" in source:
        raise ValueError(f"{source} is a URL. Download it first, e.g. `curl -L URL --output FILE`.")
    path = Path(source).expanduser()
    if path.is_file() or path.is_fifo():
        return _read_manifest(path, audio_column, text_column)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            table = datasets.load_from_disk(str(path))
        elif (path / "metadata.jsonl").is_file():
            return _read_manifest(path / "metadata.jsonl", audio_column, text_column)
        else:
            return _read_folder(path)
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
    for old, new in ((audio_column, "audio"), (text_column, "text")):
        if old != new:  # another column of that name gives way
            table = table.remove_columns([new] if new in table.column_names else []).rename_column(old, new)
    return _set_column(table, "origin", [f"{source} row {row}" for row in range(len(table))])


def _read_manifest(path: Path, audio_column: str | None, text_column: str | None) -> Dataset:
    rows = _read_rows(path)
    if not rows:
        raise ValueError(f"{path}: the manifest is empty.")
    first = next(iter(rows.values()))
    if audio_column is None:
        audio_column = "file_name" if "file_name" in first and "audio" not in first else "audio"
    text_column = text_column or "text"
    for origin, row in rows.items():
        for column in (audio_column, text_column):
            if not isinstance(row.get(column), str):
                found = f"it has {', '.join(row)}" if column not in row else f"got {row[column]!r}"
                raise ValueError(f"{origin}: {column!r} must be a string; {found}.")
        for column, value in row.items():
            if isinstance(value, str) and has_half_surrogate(value):
                raise ValueError(f"{origin}: {column!r} has half of a surrogate pair, which is no character.")
    folder = Path.cwd() if path.is_fifo() else path.parent.absolute()
    others = dict.fromkeys(
        column for row in rows.values() for column in row if column not in (audio_column, text_column)
    )
    return _make_table(
        paths=[str(folder / row[audio_column]) for row in rows.values()],
        texts=[row[text_column] for row in rows.values()],
        origins=[f"{origin} ({row[audio_column]})" for origin, row in rows.items()],
        others={column: [_plain(row.get(column)) for row in rows.values()] for column in others},
    )


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a manifest by what an error message calls them."""
    rows = {}
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                origin = f"{path} line {number}"
                if line.strip():
                    rows[origin] = json.loads(line)
                    if not isinstance(rows[origin], dict):
                        raise ValueError(f"{origin}: must be a JSON object such as {{'audio': ..., 'text': ...}}.")
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}: not JSON ({error}). A manifest has one JSON object a line.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); a manifest is a text file of JSON lines.") from error
    return rows


def _plain(value: Any) -> Any:
    # A table holds neither lists and objects of varying shape nor integers of more than 64 bits.
    is_large = isinstance(value, int) and not -(2**63) <= value < 2**63
    return json.dumps(value, default=str) if isinstance(value, (list, dict)) or is_large else value


def _read_folder(folder: Path) -> Dataset:
    files = find_audio_files(folder)
    if not files:
        manifests = ", ".join(str(path) for path in sorted(folder.glob("*.jsonl")))
        hint = f" Did you mean one of its manifests: {manifests}?" if manifests else ""
        raise ValueError(f"{folder}: no audio files ({', '.join(AUDIO_EXTENSIONS)}) in this folder.{hint}")
    text_files = [path.with_suffix(".txt") for path in files]
    missing = [path for path in text_files if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(files)} audio files have no text beside them; needed are"
            f" {name_some(missing)}, or a metadata.jsonl for the folder."
        )
    return _make_table(
        paths=[str(path.absolute()) for path in files],
        texts=[_read_text(path) for path in text_files],
        origins=[str(path) for path in files],
        others={},
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from error


def _make_table(paths: list[str], texts: list[str], origins: list[str], others: dict[str, list]) -> Dataset:
    columns: dict[str, list] = {"audio": paths, "text": texts, "origin": origins}
    for column, values in others.items():
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [value if value is None else str(value) for value in values]
        columns.setdefault(column, values)
    return Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))


__all__ = ["load_sources"]

"""`echo-hf transcribe`: transcripts of audio files, as text, JSON lines or subtitles."""

import json
from dataclasses import replace
from pathlib import Path

from .options import (
    add_both,
    add_decoding,
    add_format,
    add_skip_broken,
    generate_options,
    new_parser,
    seconds,
    skip_or_stop,
)
from .output import printable, tell, write

SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}  # of --format, for files

EXAMPLES = """\
examples:
  echo-hf transcribe                               the recordings that come with the package
  echo-hf transcribe talk.flac interviews/         a file, and all audio in a folder and below
  echo-hf transcribe --checkpoint my-model --format json *.wav > transcripts.jsonl
  echo-hf transcribe lecture.mp3 --timestamps word
  echo-hf transcribe film.flac --format srt > film.srt
  echo-hf transcribe recordings/ --format vtt --output_dir subtitles
"""


def add_parser(commands) -> None:
    """Adds the command."""
    parser = new_parser(
        commands,
        "transcribe",
        arguments="[FILE_OR_FOLDER ...] [--checkpoint FOLDER]",
        help="write what is said in audio files",
        description=(
            "Write what is said in audio files of any sampling rate: WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF.\n"
            "Long recordings are cut at pauses. Each line of output is a path and its text; --format gives JSON lines\n"
            "or subtitles."
        ),
        epilog=EXAMPLES,
    )
    parser.add_argument("paths", nargs="*", help="files and folders (the recordings that come with the package)")
    add_decoding(parser, batch_size=8)
    add_skip_broken(parser)
    parser.add_argument("--timestamps", choices=["segment", "word"], help="segment or word: write when each was said")
    add_format(
        parser,
        list(SUFFIXES),
        help="text (the default); json: JSON lines with path, text, seconds and, with --timestamps, chunks; srt, vtt:"
        " subtitles of up to 6 seconds each, or as --timestamps says",
    )
    add_both(parser, "output_dir", help="folder for one file a recording, instead of standard output")
    add_both(parser, "chunk_length_s", type=seconds, help="longest segment in seconds (20); 0 cuts nothing")


def run(options) -> int:
    """Transcribes the files."""
    from ..inference import bundled_recordings, expand_paths, load_recognizer, make_pipeline, transcribe_files
    from ..subtitles import group_cues

    format = options.format or "text"
    files = expand_paths(options.paths or bundled_recordings())
    outputs = {}
    if options.output_dir:
        outputs = _output_files(options.output_dir, files, SUFFIXES[format])
    elif len(files) > 1 and format in ("srt", "vtt"):
        raise ValueError(f"Subtitles of {len(files)} files need a file each. Name a folder with --output_dir.")
    model, processor = load_recognizer(options.checkpoint, options.device)
    if options.chunk_length_s is not None and model.config.model_type != "echo":
        raise ValueError(f"--chunk_length_s does not apply to {type(model).__name__}, which has a window. Omit it.")
    # By default, subtitles are groups of words.
    is_grouped = options.timestamps is None and format in ("srt", "vtt")
    transcripts = transcribe_files(
        make_pipeline(model, processor),
        files,
        options.batch_size,
        generate_options(options, model),
        "word" if is_grouped else options.timestamps,
        show_progress=True,
        **({} if options.chunk_length_s is None else {"chunk_length_s": options.chunk_length_s}),
    )
    num_broken = 0
    for transcript in transcripts:
        if transcript.error is not None:
            num_broken += 1
            skip_or_stop(transcript, options.skip_broken)
            continue
        if is_grouped:
            transcript = replace(transcript, chunks=group_cues(transcript.chunks))
        if outputs:
            outputs[transcript.path].write_text(_content(transcript, format, prefix=""), encoding="utf-8")
        else:
            write(_content(transcript, format, prefix=f"{printable(transcript.path)}: "), end="")
    if outputs and num_broken < len(files):
        tell(f"{len(files) - num_broken} transcripts are in {options.output_dir}.")
    if num_broken:
        tell(f"{num_broken} of {len(files)} files were skipped.")
    return 1 if num_broken == len(files) else 0


def _output_files(folder: str, files: list[Path], suffix: str) -> dict[Path, Path]:
    """The file for the transcript of each recording, in a new or existing folder. One that lies beside its recording
    may be the text to train on, and is an error."""
    outputs: dict[Path, Path] = {}
    taken: dict[str, Path] = {}
    for path in files:
        other = taken.setdefault(path.stem, path)
        if other is not path:
            raise ValueError(
                f"{other} and {path} would have the same transcript in {folder}. Rename one, or give each a folder of"
                " its own."
            )
        outputs[path] = Path(folder) / f"{path.stem}{suffix}"
        if outputs[path].exists() and outputs[path].parent.resolve() == path.parent.resolve():
            raise ValueError(f"{outputs[path]} stands beside its recording already. Name another folder.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return outputs


def _content(transcript, format: str, prefix: str) -> str:
    """A transcript in a format, with its line breaks; `prefix` begins each line of text."""
    from ..subtitles import format_time, to_srt, to_vtt

    if format == "srt":
        return to_srt(transcript.chunks)
    if format == "vtt":
        return to_vtt(transcript.chunks)
    if format == "json":
        line = {name: getattr(transcript, name) for name in ("text", "seconds", "chunks")}
        line = {name: value for name, value in line.items() if value is not None}
        return json.dumps({"path": str(transcript.path), **line}, ensure_ascii=False) + "\n"
    if transcript.chunks is None:
        return f"{prefix}{transcript.text}\n"
    return "".join(
        f"{prefix}[{format_time(chunk['start'])} --> {format_time(chunk['end'])}] {chunk['text']}\n"
        for chunk in transcript.chunks
    )

"""Inference with a checkpoint: on prepared utterances, in length-sorted batches, or on audio files of any length.

For prepared data there are two controls: `"zeroed"` replaces every feature, F0 too, by 0 at the same length, and
`"shuffled"` gives every utterance the features of another one. A model that uses the audio has high error rates with
both; one that only knows which texts are likely does not.

Transcribing files needs nothing that the package's base install lacks, such as `datasets`.
"""

import os
import stat
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig
from transformers.pipelines.automatic_speech_recognition import AutomaticSpeechRecognitionPipeline
from transformers.utils import logging

from .checkpoint import load_model_and_processor
from .configuration_echo import EchoConfig
from .feature_extraction_echo import open_audio
from .generation_echo import find_cut_off
from .pipeline_echo import LONGEST_SEGMENT, EchoAutomaticSpeechRecognitionPipeline
from .processing_echo import EchoProcessor
from .segmentation_echo import read_blocks
from .whisper_echo import EchoWhisperConfig, EchoWhisperForConditionalGeneration, EchoWhisperProcessor

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

ASSETS = Path(__file__).parent / "assets"
BUNDLED_CHECKPOINT = ASSETS / "checkpoint"
BUNDLED_RECORDINGS = ASSETS / "recordings"

CONTROLS = ("zeroed", "shuffled")

# Formats that soundfile reads by itself, in folders; a file that is named is tried whatever it is called.
AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
# Audio, and video with sound, that it does not read.
OTHER_EXTENSIONS = (
    *(".m4a", ".m4b", ".aac", ".wma", ".amr", ".3gp", ".webm", ".weba", ".mka", ".ape", ".wv", ".ac3", ".dts", ".ra"),
    *(".mp4", ".m4v", ".mov", ".mkv", ".avi", ".wmv", ".flv", ".mpg", ".mpeg"),
)
NAMED_AT_MOST = 5  # files in a message that reports many
LARGEST_PIPE = 1 << 31  # bytes of a pipe, all of which are held in memory
PIPE_BLOCK = 1 << 20  # bytes read from it at a time


def load_checkpoint(checkpoint: str | Path | None = None, device: str | None = None, **overrides):
    """
    A model in evaluation mode on its device, and its processor.

    Args:
        checkpoint (`str`, *optional*): folder, or name on the Hub; the checkpoint that comes with the package if not
            given.
        device (`str`, *optional*): e.g. `"cpu"` or `"cuda"`; the accelerator if there is one, when not given.
        overrides: fields of the config to change, such as `silence_scaling=False` to measure what a mechanism does.

    Returns:
        [`EchoForConditionalGeneration`] or, if the checkpoint is of that class, [`EchoForCTC`]; and [`EchoProcessor`].

    Raises:
        `ValueError`: there is no such checkpoint, or it is not of this model, not complete or damaged; see
            [`~echo_hf.checkpoint.load_model_and_processor`].
    """
    checkpoint = BUNDLED_CHECKPOINT if checkpoint is None else checkpoint
    if checkpoint == BUNDLED_CHECKPOINT and not (BUNDLED_CHECKPOINT / "config.json").is_file():
        raise ValueError("This installation came without its checkpoint; name one, a folder or a name on the Hub.")
    return place(*load_model_and_processor(checkpoint, **overrides), device)


def config_class_of(checkpoint: str | Path | None = None) -> type[EchoConfig] | type[EchoWhisperConfig]:
    """The class of the config of a checkpoint that [`load_recognizer`] loads."""
    try:
        saved = {} if checkpoint is None else PreTrainedConfig.get_config_dict(checkpoint)[0]
    except (OSError, ValueError):  # which loading explains
        saved = {}
    return EchoWhisperConfig if saved.get("model_type") == EchoWhisperConfig.model_type else EchoConfig


def load_recognizer(checkpoint: str | Path | None = None, device: str | None = None, **overrides):
    """
    As [`load_checkpoint`], and of a Whisper with pitch too.

    Returns:
        What [`load_checkpoint`] returns, or [`EchoWhisperForConditionalGeneration`] and [`EchoWhisperProcessor`].
    """
    if config_class_of(checkpoint) is EchoConfig:
        return load_checkpoint(checkpoint, device, **overrides)
    model = EchoWhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, **overrides)
    return place(model, EchoWhisperProcessor.from_pretrained(checkpoint), device)


def place(model, processor, device: str | None = None):
    """The model on the device, or on the accelerator if there is one, ready to recognize; and its processor."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator is not None else "cpu"
    try:
        model = model.to(device).eval()
        torch.ones(1, device=device).item()  # which a device without data, "meta", does not have
    except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: PyTorch is built without the device
        raise ValueError(f"The model cannot run on {device!r}: {' '.join(str(error).split())}") from error
    return model, processor


def make_pipeline(model, processor) -> AutomaticSpeechRecognitionPipeline:
    """The speech recognition pipeline of a model, where the model is, and its processor; of [`load_recognizer`]."""
    pipeline = EchoAutomaticSpeechRecognitionPipeline(
        model=model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor, device=model.device
    )
    pipeline._generation_defaults = {}  # of a Whisper, too, the model's generation_config alone decides
    return pipeline


def recognize(
    model,
    processor: EchoProcessor,
    dataset: "Dataset",
    batch_size: int = 16,
    control: str | None = None,
    seed: int = 0,
    **generate_kwargs,
) -> tuple[list[str], int]:
    """
    Texts of prepared utterances, by free-running generation (or the best path of a CTC model).

    Args:
        model: [`EchoForConditionalGeneration`] or [`EchoForCTC`].
        processor ([`EchoProcessor`]): the model's.
        dataset (`datasets.Dataset`): as [`~echo_hf.data.prepare_dataset`] makes it.
        batch_size (`int`, defaults to 16): utterances at a time; those of like length go together.
        control (`str`, *optional*): `"zeroed"` or `"shuffled"`, see above.
        seed (`int`, defaults to 0): which other utterance each gets when shuffled.
        generate_kwargs: passed on to `generate()`, e.g. `num_beams`; a CTC model takes none.

    Returns:
        `list[str]`: the texts, in the order of `dataset`; and `int`: how many were cut off at the longest length.

    Raises:
        `ValueError`: the control is not known, there is no other utterance to shuffle with, or a CTC model is given
            settings of `generate()`.
    """
    if generate_kwargs and not model.can_generate():
        raise ValueError(f"A CTC model generates nothing, and takes no {', '.join(generate_kwargs)}; leave them out.")
    if control is not None and control not in CONTROLS:
        raise ValueError(f"control must be one of {', '.join(CONTROLS)}, got {control!r}.")
    source = np.arange(len(dataset))  # which utterance's features each utterance gets
    if control == "shuffled":
        if len(dataset) < 2:
            raise ValueError("shuffled: a single utterance has no other one to take features from.")
        # In random order, each takes the features of the next: nobody keeps its own.
        order = np.random.default_rng(seed).permutation(len(dataset))
        source[order] = np.roll(order, -1)
    lengths = np.asarray(dataset["length"])[source]
    positions = np.argsort(-lengths, kind="stable")  # the longest first: what does not fit into memory fails at once
    texts, cut_off = [""] * len(dataset), 0
    features = dataset.select_columns(["input_features"])
    for start in tqdm(
        range(0, len(positions), batch_size),
        desc=f"Recognizing ({control or 'as recorded'})",
        leave=False,
        disable=None,  # where standard error is no terminal
    ):
        batch_positions = positions[start : start + batch_size]
        rows = [np.asarray(features[int(row)]["input_features"], np.float32) for row in source[batch_positions]]
        batch = processor.feature_extractor.pad(
            {"input_features": rows}, padding=True, return_attention_mask=True, return_tensors="pt"
        )
        if control == "zeroed":
            batch["input_features"] = torch.zeros_like(batch["input_features"])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        if model.can_generate():
            ids = model.generate(**batch, **generate_kwargs)
            cut_off += int(find_cut_off(ids, model.generation_config).sum())
            batch_texts = processor.batch_decode(ids, skip_special_tokens=True)
        else:
            with torch.inference_mode():
                logits = model(**batch).logits
            frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1)).tolist()
            if not all(torch.isfinite(row[:length]).all() for row, length in zip(logits, frames)):
                raise ValueError("The model's output has NaN or infinite values. Take another checkpoint.")
            paths = logits.argmax(-1)
            batch_texts = [processor.decode_ctc(path[:length]) for path, length in zip(paths, frames)]
        for position, text in zip(batch_positions, batch_texts):
            texts[position] = text
    return texts, cut_off


def find_audio_files(folder: str | os.PathLike) -> list[Path]:
    """Audio files in a folder and the folders in it, by their extension, in the order of their paths.

    Files and folders whose name begins with a dot are left out: some systems put notes beside files under such names. A
    warning tells which audio is left out because soundfile does not read it.
    """
    folder = Path(folder)
    found, others = [], []
    for path in folder.rglob("*"):
        extension = path.suffix.lower()
        if extension not in AUDIO_EXTENSIONS and extension not in OTHER_EXTENSIONS:
            continue
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            (found if extension in AUDIO_EXTENSIONS else others).append(path)
    if others:
        _warn_of_unread(folder, sorted(others))
    return sorted(found)


def _warn_of_unread(folder: Path, paths: list[Path]) -> None:
    by_extension = defaultdict(list)
    for path in paths:
        by_extension[path.suffix.lower()].append(str(path.relative_to(folder)))
    named = "; ".join(
        f"{len(names)} {extension} ({', '.join(names[:NAMED_AT_MOST])}{', ...' if len(names) > NAMED_AT_MOST else ''})"
        for extension, names in by_extension.items()
    )
    logger.warning(
        f"{folder}: left out, since soundfile does not read such files: {named}. Convert them first, e.g."
        " `ffmpeg -i INPUT -ac 1 OUTPUT.wav`."
    )


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """
    Audio files that paths stand for: a file or a pipe for itself, a folder for the audio files in it and below; each
    once.

    Raises:
        `ValueError`: there is no such file or folder, or no audio in a folder; or it is a URL or a device. The message
            names it.
    """
    files = []
    for given in paths:
        if "://" in str(given):
            raise ValueError(f"{given} is a URL. Download it first, e.g. `curl -L URL --output FILE`.")
        path = Path(given)
        if path.is_dir():
            found = find_audio_files(path)
            if not found:
                raise ValueError(f"{path}: no audio files in this folder ({', '.join(sorted(AUDIO_EXTENSIONS))}).")
            files += found
            continue
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{path}: no such file or folder.") from error
        except (OSError, ValueError) as error:  # ValueError: NUL within a name
            raise ValueError(f"{path}: cannot be opened ({error}).") from error
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise ValueError(f"{path} is a terminal or another device. Name a file, or send audio through a pipe.")
        files.append(path)
    return list(dict.fromkeys(files))


def bundled_recordings() -> list[Path]:
    """
    The recordings that come with the package.

    Raises:
        `ValueError`: this installation has none.
    """
    files = find_audio_files(BUNDLED_RECORDINGS)
    if not files:
        raise ValueError("This installation came without recordings; name files or folders.")
    return files


@dataclass(frozen=True)
class Transcript:
    """
    What was recognized in one file.

    Args:
        path (`Path`): the file.
        text (`str`, *optional*): what was recognized; `None` if the file could not be used.
        seconds (`float`, *optional*): its duration.
        chunks (`list[dict]`, *optional*): its segments or words, each with `"text"`, `"start"` and `"end"` (seconds);
            with timestamps.
        error (`str`, *optional*): why it could not be used.
    """

    path: Path
    text: str | None = None
    seconds: float | None = None
    chunks: list[dict[str, Any]] | None = None
    error: str | None = None


def transcribe_files(
    pipeline: EchoAutomaticSpeechRecognitionPipeline,
    files: list[Path],
    batch_size: int = 8,
    generate_kwargs: dict[str, Any] | None = None,
    timestamps: str | None = None,
    chunk_length_s: float = LONGEST_SEGMENT,
    show_progress: bool = False,
) -> Iterator[Transcript]:
    """
    Transcripts of audio files of any length and sampling rate, in their order, as soon as each is done.

    Files that are no longer than a segment go through the model together, and of a longer one its segments. No more
    than `batch_size` segments are in memory. A file that cannot be used gives a [`Transcript`] with its `error`, and
    does not keep the others from being transcribed.

    Args:
        pipeline: of [`make_pipeline`].
        files (`list[Path]`): audio files.
        batch_size (`int`, defaults to 8): segments at a time.
        generate_kwargs (`dict`, *optional*): for `generate()`.
        timestamps (`str`, *optional*): `"segment"` or `"word"`: what to tell the times of.
        chunk_length_s (`float`, defaults to 20): longest segment in seconds; 0: a file is never cut. Not used with a
            Whisper, which moves its own window along the file.
        show_progress (`bool`, defaults to `False`): whether a bar on standard error, if that is a terminal, tells how
            much of the audio is done.

    Raises:
        `ValueError`: the kind of timestamps is not known.
    """
    kinds = {None: None, "segment": True, "word": "word"}
    if timestamps not in kinds:
        raise ValueError(f"timestamps must be 'segment' or 'word', got {timestamps!r}.")
    options = {"batch_size": batch_size, "return_timestamps": kinds[timestamps]}
    if isinstance(pipeline, EchoAutomaticSpeechRecognitionPipeline):
        options["chunk_length_s"] = chunk_length_s
        transcribe_long = _transcribe_long
    else:
        chunk_length_s = pipeline.feature_extractor.chunk_length
        transcribe_long = _transcribe_long_by_whisper
    if generate_kwargs:
        options["generate_kwargs"] = generate_kwargs
    rate = pipeline.feature_extractor.sampling_rate
    with _ProgressBar(files, show_progress) as bar:

        def finish(waiting: list[tuple[Path, np.ndarray | str]]) -> Iterator[Transcript]:
            done = list(_transcribe_together(pipeline, waiting, options))
            bar.advance(sum(transcript.seconds or 0.0 for transcript in done))
            bar.clear()  # it would stand in the way of what the caller writes
            yield from done

        waiting: list[tuple[Path, np.ndarray | str]] = []  # with samples, or why there are none
        for path in files:
            bar.set_postfix_str("".join(c if c.isprintable() else "?" for c in path.name), refresh=False)
            try:
                source = open_pipe(path)
                samples = read_short(source, rate, chunk_length_s)
            except (OSError, ValueError) as error:
                samples = str(error)
            if samples is None:
                yield from finish(waiting)
                waiting = []
                transcript = transcribe_long(pipeline, path, source, options, bar)
                bar.clear()
                yield transcript
                continue
            waiting.append((path, samples))
            if len(waiting) == batch_size:
                yield from finish(waiting)
                waiting = []
        yield from finish(waiting)


class _ProgressBar(tqdm):
    """Seconds of audio done, of those that the files' headers claim. If they claim too few, the bar loses its end."""

    def __init__(self, files: list[Path], show: bool):
        show = show and sys.stderr.isatty()
        super().__init__(
            disable=not show,
            total=round(sum(map(_claimed_seconds, files))) if show else None,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} s of audio [{elapsed}<{remaining}{postfix}]",
        )
        self.seconds = 0.0

    def advance(self, seconds: float):
        self.seconds += seconds
        self.update(round(self.seconds) - self.n)


def _claimed_seconds(path: Path) -> float:
    """Duration as the file's header has it, for the progress bar alone: it may be wrong."""
    try:
        with open_audio(path) as (file, _):
            return file.frames / file.samplerate
    except (OSError, ValueError):
        return 0.0


def open_pipe(path: Path) -> Path | bytes:
    """
    What to read audio from: the path of a file, or all bytes of a pipe, which can be read only once.

    Raises:
        `ValueError`: more than 2 GiB come through the pipe.
    """
    if not path.is_fifo():
        return path
    blocks, num_bytes = [], 0
    with open(path, "rb") as pipe:
        while block := pipe.read(PIPE_BLOCK):
            blocks.append(block)
            num_bytes += len(block)
            if num_bytes > LARGEST_PIPE:
                raise ValueError(f"More than {LARGEST_PIPE >> 20} MiB come through {path}. Write them to a file first.")
    return b"".join(blocks)


def read_short(source: Path | bytes, rate: int, longest: float) -> np.ndarray | None:
    """Samples of [`open_pipe`]'s source at `rate` (Hz), or None if it is longer than `longest` seconds (0: none is)."""
    blocks, num_samples = [np.zeros(0, np.float32)], 0
    for block in read_blocks(source, rate):
        blocks.append(block)
        num_samples += len(block)
        if longest and num_samples > longest * rate:
            return None
    return np.concatenate(blocks)


def _transcribe_together(pipeline, waiting: list[tuple[Path, np.ndarray | str]], options) -> Iterator[Transcript]:
    rate = pipeline.feature_extractor.sampling_rate
    recordings = [samples for _, samples in waiting if not isinstance(samples, str)]
    try:
        batch = [{"raw": samples, "sampling_rate": rate} for samples in recordings]
        results = list(pipeline(batch, **options)) if batch else []
    except ValueError:  # one of them: alone, each shows whether it is the one
        results = []
        for samples in recordings:
            try:
                results.append(pipeline({"raw": samples, "sampling_rate": rate}, **options))
            except ValueError as error:
                results.append(str(error))
    remaining = iter(results)
    for path, samples in waiting:
        result = samples if isinstance(samples, str) else next(remaining)
        if isinstance(result, str):
            yield Transcript(path, error=result)
        else:
            yield _transcript(path, len(samples) / rate, result)


def _transcribe_long(pipeline, path: Path, source: Path | bytes, options, bar) -> Transcript:
    seconds = 0.0

    def progress(more: float):
        nonlocal seconds
        seconds += more
        bar.advance(more)

    try:
        result = pipeline(str(source) if isinstance(source, Path) else source, progress=progress, **options)
    except (OSError, ValueError) as error:
        return Transcript(path, error=str(error))
    return _transcript(path, seconds, result)


def _transcribe_long_by_whisper(pipeline, path: Path, source: Path | bytes, options, bar) -> Transcript:
    """By windows that end where a segment does, which Whisper's times tell; all of the file is in memory."""
    rate, timestamps = pipeline.feature_extractor.sampling_rate, options["return_timestamps"]
    try:
        samples = read_short(source, rate, 0)
        audio = {"raw": samples, "sampling_rate": rate}
        result = pipeline(audio, **{**options, "return_timestamps": timestamps or True})
    except (OSError, ValueError) as error:
        return Transcript(path, error=str(error))
    bar.advance(len(samples) / rate)
    if timestamps is None:
        del result["chunks"]
    return _transcript(path, len(samples) / rate, result)


def _transcript(path: Path, seconds: float, result: dict[str, Any]) -> Transcript:
    chunks = None
    if "chunks" in result:
        chunks = [
            {"text": chunk["text"].strip(), "start": start, "end": seconds if end is None else end}
            for chunk in result["chunks"]
            for start, end in [chunk["timestamp"]]  # Whisper leaves an end open that it did not hear
        ]
    return Transcript(path, result["text"], round(seconds, 3), chunks)


__all__ = [
    "Transcript",
    "config_class_of",
    "expand_paths",
    "find_audio_files",
    "load_checkpoint",
    "load_recognizer",
    "make_pipeline",
    "place",
    "recognize",
    "transcribe_files",
]

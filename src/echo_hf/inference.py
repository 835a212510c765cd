"""Inference with a checkpoint: on prepared utterances, or on audio files of any length.

Prepared utterances have two controls: `"zeroed"` replaces every feature, F0 too, by 0 (for a Whisper, by that of
silence), and `"shuffled"` gives every utterance the features of another one. A model that uses the audio has high error
rates with both.

Transcribing files needs the base install alone, without `datasets`.
"""

import os
import stat
import sys
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

from .checkpoint import load_model_and_processor, load_whisper_and_processor
from .configuration_echo import EchoConfig
from .feature_extraction_echo import open_audio
from .generation_echo import find_cut_off
from .pipeline_echo import LONGEST_SEGMENT, EchoAutomaticSpeechRecognitionPipeline
from .processing_echo import EchoProcessor
from .segmentation_echo import read_blocks
from .whisper_echo import EchoWhisperConfig, EchoWhisperFeatureExtractor, EchoWhisperForConditionalGeneration

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

ASSETS = Path(__file__).parent / "assets"
BUNDLED_CHECKPOINT = ASSETS / "checkpoint"
BUNDLED_RECORDINGS = ASSETS / "recordings"

CONTROLS = ("zeroed", "shuffled")

# Formats of soundfile, which are looked for in folders. A file that is named is tried whatever its extension.
AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
# Audio, and video with sound, that soundfile does not read.
OTHER_EXTENSIONS = (
    *(".m4a", ".m4b", ".aac", ".wma", ".amr", ".3gp", ".webm", ".weba", ".mka", ".ape", ".wv", ".ac3", ".dts", ".ra"),
    *(".mp4", ".m4v", ".mov", ".mkv", ".avi", ".wmv", ".flv", ".mpg", ".mpeg"),
)
NAMED_AT_MOST = 5  # files in a message that reports many
LARGEST_PIPE = 1 << 31  # bytes of a pipe, all of which are held in memory
LENGTHS = ("max_new_tokens", "max_length")  # settings of generate(), of which the first counts
WHISPER_PROMPT = 4  # tokens: start, language, task, no timestamps


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
    return place(*load_whisper_and_processor(checkpoint, **overrides), device)


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
        dataset (`datasets.Dataset`): of [`~echo_hf.data.prepare_dataset`].
        batch_size (`int`, defaults to 16): utterances at a time, sorted by length.
        control (`str`, *optional*): `"zeroed"` or `"shuffled"`, see above.
        seed (`int`, defaults to 0): of the shuffling.
        generate_kwargs: for `generate()`, e.g. `num_beams`; a CTC model takes none.

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
    source = np.arange(len(dataset))  # the utterance whose features each utterance gets
    if control == "shuffled":
        if len(dataset) < 2:
            raise ValueError("shuffled: a single utterance has no other one to take features from.")
        order = np.random.default_rng(seed).permutation(len(dataset))
        source[order] = np.roll(order, -1)
    lengths = np.asarray(dataset["length"])[source]
    positions = np.argsort(-lengths, kind="stable")  # the longest first, so that a lack of memory shows at once
    texts, num_cut_off = [""] * len(dataset), 0
    features = dataset.select_columns(["input_features"])
    batches = np.split(positions, range(batch_size, len(positions), batch_size))
    for batch_positions in tqdm(batches, f"Recognizing ({control or 'as recorded'})", leave=False, disable=None):
        rows = [np.asarray(features[int(row)]["input_features"], np.float32) for row in source[batch_positions]]
        batch = processor.feature_extractor.pad(
            {"input_features": rows}, padding=True, return_attention_mask=True, return_tensors="pt"
        )
        if control == "zeroed":
            batch["input_features"] = _zeroed(batch["input_features"], processor.feature_extractor)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        if model.can_generate():
            ids = model.generate(**batch, **generate_kwargs)
            if isinstance(model, EchoWhisperForConditionalGeneration):
                num_cut_off += _count_cut_off(ids, model, generate_kwargs)
            else:
                num_cut_off += int(find_cut_off(ids, model.generation_config).sum())
            batch_texts = processor.batch_decode(ids, skip_special_tokens=True)
        else:
            batch_texts = _best_paths(model, processor, batch)
        for position, text in zip(batch_positions, batch_texts):
            texts[position] = text
    return texts, num_cut_off


def _count_cut_off(ids: torch.Tensor, model, given: dict[str, Any]) -> int:
    """How many texts of a Whisper are as long as they may be; `generate` returns neither its prompt nor the end."""
    limits = [*(given.get(name) for name in LENGTHS), *(getattr(model.generation_config, name) for name in LENGTHS)]
    longest = next((limit for limit in limits if limit is not None), model.config.max_target_positions)
    longest = min(longest, model.config.max_target_positions - WHISPER_PROMPT)
    return int(((ids != model.generation_config.pad_token_id).sum(-1) >= longest).sum())


def _zeroed(features: torch.Tensor, extractor) -> torch.Tensor:
    """Features as zeroed audio has them: 0 for an Echo, and for a Whisper those of silence, which are not 0."""
    if not isinstance(extractor, EchoWhisperFeatureExtractor):
        return torch.zeros_like(features)
    silence = extractor({"array": np.zeros(extractor.n_samples), "sampling_rate": extractor.sampling_rate})
    return extractor.pad(silence)["input_features"].expand_as(features)


def _best_paths(model, processor: EchoProcessor, batch: dict[str, torch.Tensor]) -> list[str]:
    with torch.inference_mode():
        logits = model(**batch).logits
    frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1)).tolist()
    if not all(torch.isfinite(row[:length]).all() for row, length in zip(logits, frames)):
        raise ValueError("The model's output has NaN or infinite values. Take another checkpoint.")
    return [processor.tokenizer.decode_ctc(path[:length]) for path, length in zip(logits.argmax(-1), frames)]


def find_audio_files(folder: str | os.PathLike) -> list[Path]:
    """Audio files in a folder and below, by their extension, sorted. Hidden files and folders are left out, and so is
    audio that soundfile does not read, of which a warning tells.
    """
    folder = Path(folder)
    found, others = [], []
    for path in sorted(folder.rglob("*")):
        name, extension = path.relative_to(folder), path.suffix.lower()
        if extension not in AUDIO_EXTENSIONS + OTHER_EXTENSIONS or not path.is_file():
            continue
        if not any(part.startswith(".") for part in name.parts):
            found.append(path) if extension in AUDIO_EXTENSIONS else others.append(str(name))
    if others:
        more = ", ..." if len(others) > NAMED_AT_MOST else ""
        logger.warning(
            f"{folder}: {len(others)} files are left out, since soundfile does not read them:"
            f" {', '.join(others[:NAMED_AT_MOST])}{more}. Convert them first, e.g."
            " `ffmpeg -i INPUT -ac 1 OUTPUT.wav`."
        )
    return found


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """
    The files and pipes that are named, and the audio files of the folders that are named, each once.

    Raises:
        `ValueError`: there is no such file or folder, or no audio in a folder; or it is a URL or a device.
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
    """The recordings that come with the package; raises `ValueError` if this installation has none."""
    files = find_audio_files(BUNDLED_RECORDINGS)
    if not files:
        raise ValueError("This installation came without recordings; name files or folders.")
    return files


@dataclass(frozen=True)
class Transcript:
    """
    The transcript of a file.

    Args:
        path (`Path`): the file.
        text (`str`, *optional*): what was recognized; `None` if the file could not be used.
        seconds (`float`, *optional*): its duration.
        chunks (`list[dict]`, *optional*): with timestamps, its segments or words: `"text"`, `"start"` and `"end"`
            (seconds).
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

    A batch has files that are no longer than a segment, or segments of one longer file. No more than `batch_size`
    segments are in memory. A file that cannot be used has a [`Transcript`] with its `error`.

    Args:
        pipeline: of [`make_pipeline`].
        files (`list[Path]`): audio files.
        batch_size (`int`, defaults to 8): segments at a time.
        generate_kwargs (`dict`, *optional*): for `generate()`.
        timestamps (`str`, *optional*): `"segment"` or `"word"`: what `chunks` are.
        chunk_length_s (`float`, defaults to 20): longest segment in seconds; 0: a file is never cut. Not used with a
            Whisper, which moves its own window along the file.
        show_progress (`bool`, defaults to `False`): whether to show a progress bar if standard error is a terminal.

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
            bar.clear()  # before the caller writes
            yield from done

        waiting: list[tuple[Path, np.ndarray | str]] = []  # each with its samples, or the error
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
    """Seconds of audio done, of those that the files' headers claim."""

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
    """Duration by the file's header, which may be wrong."""
    try:
        with open_audio(path) as (file, _):
            return file.frames / file.samplerate
    except (OSError, ValueError):
        return 0.0


def open_pipe(path: Path) -> Path | bytes:
    """The path of a file, or all bytes of a pipe, which can be read only once; raises `ValueError` above 2 GiB."""
    if not path.is_fifo():
        return path
    content = bytearray()
    with open(path, "rb") as pipe:
        while block := pipe.read(1 << 20):
            content += block
            if len(content) > LARGEST_PIPE:
                raise ValueError(f"More than {LARGEST_PIPE >> 20} MiB come through {path}. Write them to a file first.")
    return bytes(content)


def read_short(source: Path | bytes, rate: int, longest: float) -> np.ndarray | None:
    """Samples of the audio at `rate` (Hz), or None if it is longer than `longest` seconds (0: no limit)."""
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
    except ValueError:  # of one of them
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
            {"text": chunk["text"].strip(), "start": min(start, seconds), "end": min(end, seconds)}
            for chunk in result["chunks"]
            # A Whisper may leave an end open, or put it behind the recording.
            for start, end in [(time if time is not None else seconds for time in chunk["timestamp"])]
        ]
    return Transcript(path, result["text"].strip(), round(seconds, 3), chunks)  # Whisper begins with a space


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

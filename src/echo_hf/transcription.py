"""Recognising many utterances with a finished checkpoint: prepared data in length-sorted batches, or files one by one.

For prepared data there are two controls. A model that listens does badly on both; one that only knows which texts are
likely does not: `"zeroed"` replaces every feature, F0 too, by 0 at the same length, `"shuffled"` gives every utterance
the features of another one.

Transcribing files needs nothing that the package's base install lacks, such as `datasets`.
"""

import os
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .checkpoint import load_model_and_processor
from .feature_extraction_echo import load_audio
from .pipeline_echo import EchoAutomaticSpeechRecognitionPipeline
from .processing_echo import EchoProcessor

if TYPE_CHECKING:
    from datasets import Dataset

ASSETS = Path(__file__).parent / "assets"
BUNDLED_CHECKPOINT = ASSETS / "checkpoint"
BUNDLED_RECORDINGS = ASSETS / "recordings"

CONTROLS = ("zeroed", "shuffled")

# Formats that soundfile reads by itself, in folders; a file that is named is tried whatever it is called.
AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")


def load_checkpoint(checkpoint: str | Path | None = None, device: str | None = None):
    """
    A model, ready to recognise, and its processor.

    Args:
        checkpoint (`str`, *optional*): folder, or name on the Hub; the checkpoint that comes with the package if not
            given.
        device (`str`, *optional*): e.g. `"cpu"` or `"cuda"`; the accelerator if there is one, when not given.

    Returns:
        [`EchoForConditionalGeneration`] or, if the checkpoint is of that class, [`EchoForCTC`]; and [`EchoProcessor`].

    Raises:
        `ValueError`: there is no such checkpoint, or it is not of this model, not complete or damaged; see
            [`~echo_hf.checkpoint.load_model_and_processor`].
    """
    checkpoint = BUNDLED_CHECKPOINT if checkpoint is None else checkpoint
    if checkpoint == BUNDLED_CHECKPOINT and not (BUNDLED_CHECKPOINT / "config.json").is_file():
        raise ValueError("This installation came without its checkpoint; name one, a folder or a name on the Hub.")
    model, processor = load_model_and_processor(checkpoint)
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator is not None else "cpu"
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without that device
        raise ValueError(f"The model cannot run on {device!r}: {error}") from error


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
        `ValueError`: the control is not known, or there is no other utterance to shuffle with.
    """
    from .data import EchoDataCollator

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
    collator = EchoDataCollator(processor)
    texts, cut_off = [""] * len(dataset), 0
    features = dataset.select_columns(["input_features"])
    for start in tqdm(
        range(0, len(positions), batch_size), desc=f"Recognising ({control or 'as recorded'})", leave=False
    ):
        batch_positions = positions[start : start + batch_size]
        batch = collator([features[int(source[position])] for position in batch_positions])
        if control == "zeroed":
            batch["input_features"] = torch.zeros_like(batch["input_features"])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        batch["input_features"] = batch["input_features"].to(model.dtype)
        if model.can_generate():
            ids = model.generate(**batch, **generate_kwargs)
            ends = torch.as_tensor(model.config.eos_token_id, device=ids.device)
            cut_off += int((~torch.isin(ids, ends).any(-1)).sum())
            batch_texts = processor.batch_decode(ids, skip_special_tokens=True)
        else:
            with torch.inference_mode():
                paths = model(**batch).logits.argmax(-1)
            frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1)).tolist()
            batch_texts = [processor.decode_ctc(path[:length]) for path, length in zip(paths, frames)]
        for position, text in zip(batch_positions, batch_texts):
            texts[position] = text
    return texts, cut_off


def find_audio_files(folder: str | os.PathLike) -> list[Path]:
    """Audio files in a folder and the folders in it, by their extension, in the order of their paths."""
    return sorted(
        path for path in Path(folder).rglob("*") if path.suffix.lower() in AUDIO_EXTENSIONS and path.is_file()
    )


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """
    Audio files that paths stand for: a file for itself, a folder for the audio files in it and below.

    Raises:
        `ValueError`: there is no such file or folder, or no audio in a folder; the message names it.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = find_audio_files(path)
            if not found:
                raise ValueError(f"{path}: no audio files in this folder.")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder.")
    return files


@dataclass(frozen=True)
class Transcript:
    """
    What was recognised in one file.

    Args:
        path (`Path`): the file.
        text (`str`, *optional*): what was recognised; `None` if the file could not be used.
        seconds (`float`, *optional*): its duration.
        error (`str`, *optional*): why it could not be used.
    """

    path: Path
    text: str | None = None
    seconds: float | None = None
    error: str | None = None


def transcribe_files(
    pipeline: EchoAutomaticSpeechRecognitionPipeline,
    files: list[Path],
    batch_size: int = 8,
    generate_kwargs: dict[str, Any] | None = None,
) -> Iterator[Transcript]:
    """
    Transcripts of audio files of any sampling rate, in their order, as soon as a batch is done.

    A file that cannot be used gives a [`Transcript`] with its `error`, and does not keep the others of its batch from
    being transcribed.
    """
    options = {"generate_kwargs": generate_kwargs} if generate_kwargs else {}
    for start in range(0, len(files), batch_size):
        done: dict[Path, Transcript] = {}
        recordings: dict[Path, dict[str, Any]] = {}
        for path in files[start : start + batch_size]:
            try:
                samples, rate = load_audio(path)
                recordings[path] = {"raw": samples, "sampling_rate": rate}
            except (OSError, ValueError) as error:
                done[path] = Transcript(path, error=str(error))
        try:
            # Copies, as the pipeline may take out of a dict what it reads.
            batch = [dict(recording) for recording in recordings.values()]
            results = pipeline(batch, batch_size=batch_size, **options) if batch else []
        except ValueError:  # one of them: alone, each shows whether it is the one
            results = [_transcribe_alone(pipeline, recording, options) for recording in recordings.values()]
        for (path, recording), result in zip(recordings.items(), results):
            seconds = len(recording["raw"]) / recording["sampling_rate"]
            done[path] = Transcript(path, result.get("text"), round(seconds, 3), result.get("error"))
        yield from (done[path] for path in files[start : start + batch_size])


def _transcribe_alone(pipeline, recording: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    try:
        return pipeline(dict(recording), **options)
    except ValueError as error:
        return {"error": str(error)}


__all__ = ["Transcript", "expand_paths", "find_audio_files", "load_checkpoint", "recognize", "transcribe_files"]

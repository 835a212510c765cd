"""Training from arguments to a finished checkpoint, on top of Transformers' `Seq2SeqTrainer`.

Nothing is trained by hand here: the model's own loss, `generate()` for every word error rate that is reported, and the
Trainer's checkpoints. What this module adds is the preparation: tokenizer, extractor and config that fit each other,
the checks that would otherwise fail late, and one setting that must not reach the Trainer. Its label smoothing computes
the loss from the logits alone, and the CTC part would be lost; so `label_smoothing_factor` goes to the model's config.
"""

import copy
import json
import math
import platform
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import Seq2SeqTrainingArguments, TrainerCallback, set_seed
from transformers.utils import logging

from .. import __version__
from ..analysis.tensorboard import DiagnosticsCallback, require_tensorboard
from ..configuration_echo import EchoConfig
from ..data.augmentation import VoicePerturbation
from ..data.collator import MAX_JOINED_SECONDS, EchoDataCollator
from ..data.features import PreparedData, prepare_dataset
from ..data.non_speech import non_speech_table
from ..data.sources import load_sources
from ..data.whisper import WhisperDataCollator, WhisperPreparation
from ..metrics import make_compute_metrics, normalize_text
from ..processing_echo import EchoProcessor
from .arguments import DataArguments, ModelArguments
from .checkpoints import (
    CheckpointAveraging,
    check_checkpoint,
    explain_write_error,
    find_last_checkpoint,
    is_write_error,
)
from .model import build_model_and_processor
from .model_card import SUMMARY_FILE, CardArguments
from .trainer import EchoTrainer, check_hub_strategy
from .whisper import check_arguments, is_whisper

logger = logging.get_logger(__name__)


def count_beyond_ctc(data: PreparedData, config: EchoConfig) -> int:
    """Utterances with more tokens than encoder frames to emit them at (repeated tokens need a blank between them)."""
    stride = math.prod(config.stem_strides)
    special = {config.pad_token_id, config.bos_token_id, *config.ends_of_sequence}
    count = 0
    for length, labels in zip(data.dataset["length"], data.dataset["labels"]):
        tokens = [token for token in labels if token not in special]
        repeats = sum(first == second for first, second in pairwise(tokens))
        count += len(tokens) + repeats > math.ceil(length / stride)
    return count


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: Seq2SeqTrainingArguments,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    card_arguments: CardArguments | None = None,
) -> dict[str, Any]:
    """
    Trains a model and leaves a complete checkpoint in `output_dir`: weights, config, generation config, processor and
    the code for `trust_remote_code`, with `train_results.json`, `eval_results.json`, `trainer_state.json`,
    `run_summary.json` and a model card beside them. With `push_to_hub` it is pushed at the end.

    Args:
        model_arguments ([`ModelArguments`]): what is trained.
        data_arguments ([`DataArguments`]): on what.
        training_arguments (`Seq2SeqTrainingArguments`): how; see `TRAINING_DEFAULTS`.
        resume (`bool`, defaults to `False`): whether to go on from the last checkpoint in `output_dir`.
        callbacks (`list[TrainerCallback]`, *optional*): more callbacks for the Trainer.
        card_arguments ([`CardArguments`], *optional*): what the model card says beside what was measured.

    Returns:
        `dict[str, Any]`: the summary that `run_summary.json` holds.

    Raises:
        `ValueError`: data cannot be used, settings do not fit each other, there is no checkpoint to resume from, or
            `output_dir` holds another run; or the last checkpoint is damaged.
        `OSError`: the disk is full, or what was trained could not be pushed; it is saved then.
    """
    started = time.monotonic()
    output_dir = Path(training_arguments.output_dir)
    if training_arguments.push_to_hub:
        check_hub_strategy(training_arguments)
    if data_arguments.diagnostics:
        require_tensorboard()
    for name in ("non_speech_share", "join"):
        if not 0 <= getattr(data_arguments, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(data_arguments, name)}.")
    if data_arguments.average_checkpoints:
        averaging = CheckpointAveraging(data_arguments.average_checkpoints)
        averaging.check(training_arguments)
        callbacks = [*(callbacks or []), averaging]
    checkpoint = find_last_checkpoint(output_dir)
    if resume and checkpoint is None:
        raise ValueError(f"There is no checkpoint to resume from in {output_dir}; start without --resume.")
    if not resume and checkpoint is not None:
        raise ValueError(
            f"{output_dir} holds a run already ({checkpoint.name}): go on with it by --resume, or take another folder."
        )
    if not resume and (output_dir / "config.json").is_file():
        raise ValueError(f"{output_dir} holds a model already; take another folder.")
    # Set before the model is made, so that its weights follow from the seed.
    set_seed(training_arguments.seed)
    # The model's own loss smooths, as it knows CTC; the Trainer is not to do it again.
    label_smoothing = training_arguments.label_smoothing_factor
    given_arguments, training_arguments = training_arguments, copy.copy(training_arguments)
    training_arguments.label_smoothing_factor = 0.0
    started_from = model_arguments.model_name_or_path
    whisper = is_whisper(str(checkpoint) if resume else started_from)
    if whisper:
        check_arguments(model_arguments, data_arguments, given_arguments)

    train_table = load_table(data_arguments, data_arguments.train_data, data_arguments.train_split)
    eval_table = None
    if data_arguments.eval_data:
        eval_table = load_table(data_arguments, data_arguments.eval_data, data_arguments.eval_split)
        _warn_of_overlap(train_table, eval_table)
    if resume:
        check_checkpoint(checkpoint)
        # The tokenizer above all must be the one that the weights have learned.
        model_arguments = ModelArguments(
            model_name_or_path=str(checkpoint), attn_implementation=model_arguments.attn_implementation
        )
        label_smoothing = 0.0 if whisper else EchoConfig.from_pretrained(checkpoint).label_smoothing
    model, processor = build_model_and_processor(
        model_arguments, [text or "" for text in train_table["text"]], label_smoothing
    )

    options = {
        "max_label_length": model.config.max_target_positions,
        "skip_broken": data_arguments.skip_broken,
        "num_proc": data_arguments.num_proc,
        "cache_dir": data_arguments.cache_dir,
    }
    preparation = WhisperPreparation(processor) if whisper else processor
    longest = data_arguments.max_seconds
    if whisper:  # what its window does not hold would be cut off, text and all
        longest = min(longest or math.inf, processor.feature_extractor.chunk_length)
    # Of several processes one computes the features, and the others wait for its cache.
    train_data = prepare_dataset(
        train_table,
        preparation,
        min_seconds=data_arguments.min_seconds,
        max_seconds=longest,
        **options,
    )
    num_recorded = len(train_data.dataset)
    if data_arguments.non_speech_share:
        train_data = add_non_speech(
            train_data, data_arguments.non_speech_share, processor, training_arguments.seed, **options
        )
    eval_data = None
    if eval_table is not None:
        eval_data = prepare_dataset(eval_table, preparation, max_seconds=longest if whisper else None, **options)
    if not whisper and model.config.ctc_loss_weight > 0 and (beyond := count_beyond_ctc(train_data, model.config)):
        logger.warning(
            f"{beyond} of {len(train_data.dataset)} utterances have more tokens than encoder frames, and the CTC loss"
            " leaves them out. Subwords are fewer tokens (token_unit); smaller stem_strides give more frames."
        )

    if data_arguments.diagnostics:
        callbacks = [*(callbacks or []), DiagnosticsCallback((eval_data or train_data).dataset, processor)]
    if whisper:
        collator = train_collator = WhisperDataCollator(
            preparation.feature_extractor, model.config.decoder_start_token_id
        )
    else:
        collator = EchoDataCollator(processor)
        train_collator = make_train_collator(processor, data_arguments, training_arguments.seed, model)
    trainer = EchoTrainer(
        model=model,
        args=training_arguments,
        data_collator=collator,
        train_collator=train_collator,
        train_dataset=train_data.dataset,
        eval_dataset=eval_data.dataset if eval_data else None,
        processing_class=processor,
        compute_metrics=make_compute_metrics(processor.tokenizer) if training_arguments.predict_with_generate else None,
        callbacks=callbacks,
        card_arguments=card_arguments,
    )
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    # As the Trainer calls it itself: otherwise it would push at once, before the model is evaluated.
    try:
        trainer.save_model(_internal_call=True)
    except Exception as error:
        if is_write_error(error):
            raise explain_write_error(error, output_dir) from error
        raise
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = {}
    if eval_data:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    summary = {
        "output_dir": str(output_dir),
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 2),
        "resumed_from": checkpoint.name if resume else None,
        "base_model": started_from if started_from and not Path(started_from).exists() else None,
        # The Trainer notes the best whether or not it takes it.
        "best_checkpoint": trainer.state.best_model_checkpoint if training_arguments.load_best_model_at_end else None,
        "seconds": round(time.monotonic() - started, 1),
        "train": {
            **_describe(train_data, data_arguments.train_data),
            "without_speech": len(train_data.dataset) - num_recorded,
        },
        "eval": _describe(eval_data, data_arguments.eval_data) if eval_data else None,
        "train_loss": result.metrics["train_loss"],
        "metrics": {key.removeprefix("eval_"): value for key, value in metrics.items()},
        "versions": {
            "echo_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    if trainer.is_world_process_zero():
        (output_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        trainer.create_model_card()
    if training_arguments.push_to_hub:
        try:
            commit = trainer.push_to_hub()
            if commit is not None:  # the first of several processes, which is the one that pushes
                summary["pushed_to"] = str(commit.repo_url)
        except Exception as error:  # of the connection, the Hub or the file system; what was trained is safe from each
            raise OSError(
                f"The model is trained and saved in {output_dir}, but could not be pushed: {error}. Push it later with:"
                f" hf upload {trainer.hub_model_id} {output_dir} . --exclude 'checkpoint-*'"
            ) from error
    return summary


def make_train_collator(processor: EchoProcessor, arguments: DataArguments, seed: int, model) -> EchoDataCollator:
    """The collator of training batches, which perturbs and joins as the arguments say."""
    perturb = VoicePerturbation(
        processor.feature_extractor,
        tempo=arguments.tempo_perturbation,
        voice=arguments.voice_perturbation,
        channel=arguments.channel_perturbation,
        f0_drop=arguments.f0_drop,
        pause=arguments.pause,
    )
    return EchoDataCollator(
        processor,
        perturb=perturb.batch if perturb.is_active else None,
        join=arguments.join,
        max_joined_seconds=min(MAX_JOINED_SECONDS, arguments.max_seconds or MAX_JOINED_SECONDS),
        max_label_length=model.config.max_target_positions,
        seed=seed,
    )


def add_non_speech(data: PreparedData, share: float, processor: EchoProcessor, seed: int, **options) -> PreparedData:
    """
    The data with clips added that hold no speech and have an empty text, so that a model learns to write nothing there.

    Args:
        data ([`PreparedData`]): to train on.
        share (`float`): clips to add for each utterance, above 0.
        processor ([`EchoProcessor`]): as in [`prepare_dataset`].
        seed (`int`): of the clips.
        options: of [`prepare_dataset`].
    """
    count = math.ceil(share * len(data.dataset))
    table = non_speech_table(count, seed, sampling_rate=processor.feature_extractor.sampling_rate)
    added = prepare_dataset(table, processor, allow_empty_text=True, **options)
    # What the clips do not have, such as a language, is None for them.
    return PreparedData(
        dataset=datasets.concatenate_datasets([data.dataset, added.dataset]),
        skipped=data.skipped,
        seconds=data.seconds + added.seconds,
    )


def load_table(arguments: DataArguments, sources: list[str], split: str) -> datasets.Dataset:
    """The utterances of `sources` as [`load_sources`] reads them, with texts normalised if `arguments` say so."""
    table = load_sources(sources, split, arguments.dataset_config, arguments.audio_column, arguments.text_column)
    if arguments.normalize_text:
        texts = [text if text is None else normalize_text(text) for text in table["text"]]
        table = table.remove_columns("text").add_column("text", texts)
    return table


def _warn_of_overlap(train_table, eval_table) -> None:
    def paths_of(table) -> list[str]:
        return [entry["path"] for entry in table["audio"] if entry and entry["path"] and entry["bytes"] is None]

    paths = set(paths_of(train_table))
    shared = sum(path in paths for path in paths_of(eval_table))
    if shared:
        logger.warning(
            f"{shared} of {len(eval_table)} recordings to evaluate on are trained on too; the word error rate on them"
            " says nothing about new speech."
        )


def _describe(data: PreparedData, sources: list[str]) -> dict[str, Any]:
    return {
        "sources": list(sources),
        "from_hub": [source for source in sources if not Path(source).expanduser().exists()],
        "utterances": len(data.dataset),
        "hours": round(data.seconds / 3600, 3),
        "skipped": len(data.skipped),
    }


__all__ = ["train"]

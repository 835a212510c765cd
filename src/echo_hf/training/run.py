"""Training from arguments to a finished checkpoint, on top of Transformers' `Seq2SeqTrainer`.

Nothing is trained by hand here: the model's own loss, `generate()` for every word error rate that is reported, and the
Trainer's checkpoints. What this module adds is the preparation: tokenizer, extractor and config that fit each other,
the checks that would otherwise fail late, and one setting that must not reach the Trainer. Its label smoothing computes
the loss from the logits alone, and the CTC part would be lost; so `label_smoothing_factor` goes to the model's config.
"""

import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedConfig, Seq2SeqTrainingArguments, TrainerCallback, set_seed
from transformers.utils import logging

from .. import __version__
from ..data.features import PreparedData
from ..data.sources import load_sources
from ..metrics import make_compute_metrics, normalize_text
from .arguments import AugmentationArguments, DataArguments, ModelArguments
from .checkpoints import (
    check_checkpoint,
    explained_write_errors,
    find_last_checkpoint,
)
from .model import build_model_and_processor
from .model_card import SUMMARY_FILE, CardArguments
from .preparation import EchoPreparation, Speech
from .trainer import EchoTrainer, check_hub_strategy
from .whisper import WhisperPreparation, is_whisper

logger = logging.get_logger(__name__)


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: Seq2SeqTrainingArguments,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    card_arguments: CardArguments | None = None,
    augmentation_arguments: AugmentationArguments | None = None,
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
        augmentation_arguments ([`AugmentationArguments`], *optional*): how training speech is changed, if it is.

    Returns:
        `dict[str, Any]`: the summary that `run_summary.json` holds.

    Raises:
        `ValueError`: data cannot be used, settings do not fit each other, there is no checkpoint to resume from, or
            `output_dir` holds another run; or the last checkpoint is damaged.
        `OSError`: the disk is full, or what was trained could not be pushed; it is saved then.
    """
    started = time.monotonic()
    augmentation = augmentation_arguments or AugmentationArguments()
    output_dir = Path(training_arguments.output_dir)

    check_settings(training_arguments, augmentation)
    checkpoint = find_start(output_dir, resume)
    base = model_arguments.model_name_or_path
    kind = WhisperPreparation if is_whisper(checkpoint or base) else EchoPreparation
    kind.check_arguments(model_arguments, augmentation, training_arguments)
    set_seed(training_arguments.seed)  # before the model is made, so that its weights follow from the seed
    train_table, eval_table = load_tables(data_arguments)
    model, processor, training_arguments = build_start(model_arguments, training_arguments, train_table, checkpoint)
    preparation = kind(model, processor, data_arguments, augmentation, training_arguments.seed)
    train_collator = preparation.build_train_collator()  # whose settings are checked before features are computed
    speech = preparation.prepare(train_table, eval_table)
    trainer = EchoTrainer(
        model=model,
        args=training_arguments,
        data_collator=preparation.build_collator(),
        train_collator=train_collator,
        train_dataset=speech.train.dataset,
        eval_dataset=speech.eval.dataset if speech.eval else None,
        processing_class=processor,
        compute_metrics=make_compute_metrics(processor.tokenizer) if training_arguments.predict_with_generate else None,
        callbacks=callbacks,
        card_arguments=card_arguments,
    )
    with explained_write_errors(output_dir):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
        trainer.save_model(_internal_call=True)  # or it would push at once, before the model is evaluated
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate() if speech.eval else {}
    if metrics:
        trainer.save_metrics("eval", metrics)

    summary = summarize(trainer, speech, data_arguments, result.metrics["train_loss"], metrics)
    summary |= {
        "resumed_from": checkpoint.name if resume else None,
        "base_model": None if base is None or Path(base).exists() else base,  # a name on the Hub
        "seconds": round(time.monotonic() - started, 1),
    }
    if trainer.is_world_process_zero():
        (output_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        trainer.create_model_card()
    if training_arguments.push_to_hub:
        push(trainer, summary)
    return summary


# Before training -----------------------------------------------------------------------------------------------------


def check_settings(training: Seq2SeqTrainingArguments, augmentation: AugmentationArguments) -> None:
    """
    Refuses what cannot be before anything is read, and warns of what is slow.

    Raises:
        `ValueError`: settings do not fit each other.
    """
    check_hub_strategy(training)
    for name in ("non_speech_share", "join"):
        if not 0 <= getattr(augmentation, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(augmentation, name)}.")
    if training.bf16 and training.device.type == "cpu" and not has_bfloat16():
        logger.warning(
            "bf16: this processor has no instructions for bfloat16 (avx512_bf16, amx_bf16), and a step may take four"
            " times as long as in float32. Leave bf16 out."
        )


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 by itself; assumed where PyTorch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})()
    return any(value is True and name.endswith("bf16") for name, value in capabilities.items())


def find_start(output_dir: Path, resume: bool) -> Path | None:
    """
    The checkpoint that a run goes on from, if it is resumed.

    Raises:
        `ValueError`: there is none, or it is damaged; or a new run would write into the folder of another.
    """
    checkpoint = find_last_checkpoint(output_dir)
    if resume and checkpoint is None:
        raise ValueError(f"There is no checkpoint to resume from in {output_dir}; start without --resume.")
    if not resume and checkpoint is not None:
        raise ValueError(
            f"{output_dir} holds a run already ({checkpoint.name}): go on with it by --resume, or take another folder."
        )
    if not resume and (output_dir / "config.json").is_file():
        raise ValueError(f"{output_dir} holds a model already; take another folder.")
    if resume:
        check_checkpoint(checkpoint)
    return checkpoint


def load_tables(arguments: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The utterances to train on and to evaluate on, as [`load_sources`] reads them, with texts normalized if
    `arguments` say so."""

    def load(sources: list[str], split: str) -> datasets.Dataset:
        table = load_sources(sources, split, arguments.dataset_config, arguments.audio_column, arguments.text_column)
        if arguments.normalize_text:
            texts = [text if text is None else normalize_text(text) for text in table["text"]]
            table = table.remove_columns("text").add_column("text", texts)
        return table

    train_table, eval_table = load(arguments.train_data, arguments.train_split), None
    if arguments.eval_data:
        eval_table = load(arguments.eval_data, arguments.eval_split)
        _warn_of_overlap(train_table, eval_table)
    return train_table, eval_table


def build_start(
    arguments: ModelArguments, training: Seq2SeqTrainingArguments, table: datasets.Dataset, checkpoint: Path | None
) -> tuple[Any, Any, Seq2SeqTrainingArguments]:
    """The model and the processor that training starts with, and the Trainer's arguments without label smoothing, which
    the model's own loss does, as it knows CTC."""
    label_smoothing = training.label_smoothing_factor
    training = copy.copy(training)
    training.label_smoothing_factor = 0.0
    if checkpoint is not None:
        # The tokenizer above all must be the one that the weights have learned.
        arguments = ModelArguments(
            model_name_or_path=str(checkpoint), attn_implementation=arguments.attn_implementation
        )
        label_smoothing = PreTrainedConfig.get_config_dict(checkpoint)[0].get("label_smoothing", 0.0)
    texts = [text or "" for text in table["text"]]
    return *build_model_and_processor(arguments, texts, label_smoothing), training


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


# After training ------------------------------------------------------------------------------------------------------


def summarize(
    trainer: EchoTrainer, speech: Speech, data: DataArguments, train_loss: float, metrics: dict[str, float]
) -> dict[str, Any]:
    """What was trained on what, and how well it does, for `run_summary.json`."""
    state, settings = trainer.state, trainer.args
    return {
        "output_dir": str(settings.output_dir),
        "parameters": trainer.model.num_parameters(),
        "steps": state.global_step,
        "epochs": round(state.epoch or 0.0, 2),
        # The Trainer notes the best whether or not it takes it.
        "best_checkpoint": state.best_model_checkpoint if settings.load_best_model_at_end else None,
        "train": {**_describe(speech.train, data.train_data), "without_speech": speech.without_speech},
        "eval": _describe(speech.eval, data.eval_data) if speech.eval else None,
        "train_loss": train_loss,
        "metrics": {key.removeprefix("eval_"): value for key, value in metrics.items()},
        "versions": {
            "echo_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def push(trainer: EchoTrainer, summary: dict[str, Any]) -> None:
    """
    Pushes the run's folder, and notes in the summary where to.

    Raises:
        `OSError`: it could not be pushed; the message says how to do so later.
    """
    try:
        commit = trainer.push_to_hub()
    except Exception as error:  # of the connection, the Hub or the file system; what was trained is safe from each
        folder = trainer.args.output_dir
        raise OSError(
            f"The model is trained and saved in {folder}, but could not be pushed: {error}. Push it later with:"
            f" hf upload {trainer.hub_model_id} {folder} . --exclude 'checkpoint-*'"
        ) from error
    if commit is not None:  # the first of several processes, which is the one that pushes
        summary["pushed_to"] = str(commit.repo_url)


def _describe(data: PreparedData, sources: list[str]) -> dict[str, Any]:
    return {
        "sources": list(sources),
        "from_hub": [source for source in sources if not Path(source).expanduser().exists()],
        "utterances": len(data.dataset),
        "hours": round(data.seconds / 3600, 3),
        "skipped": len(data.skipped),
    }


__all__ = ["train"]

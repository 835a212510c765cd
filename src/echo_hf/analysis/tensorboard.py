"""Diagnostics of a model in training, written into TensorBoard."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..data.collator import EchoDataCollator
from . import attention, figures
from .diagnostics import EchoDiagnostics


class DiagnosticsCallback(TrainerCallback):
    """
    Writes diagnostics into TensorBoard, as the run `diagnostics` beside the Trainer's own, at the start and at every
    evaluation (every saving, without evaluation): the scalars of [`EchoDiagnostics`] on the first utterances of a
    dataset, and pictures of the first one that fits into a picture: angles, similarity, bias, alignment.

    Args:
        dataset (`datasets.Dataset`): of [`~echo_hf.data.prepare_dataset`].
        processor ([`EchoProcessor`]): the model's.
        num_utterances (`int`, defaults to 8): number of utterances.

    Raises:
        `ImportError`: tensorboard or matplotlib is not installed.
    """

    def __init__(self, dataset, processor, num_utterances: int = 8):
        require_tensorboard()
        rows = dataset.select(range(min(num_utterances, len(dataset))))
        self.tokenizer = processor.tokenizer
        extractor = processor.feature_extractor
        longest = figures.LONGEST_PICTURE * extractor.sampling_rate // extractor.hop_length
        fitting = (
            row for row in rows if len(row["input_features"]) <= longest and len(row["labels"]) <= attention.MOST_TOKENS
        )
        self.drawn = next(fitting, None)
        self.batch = EchoDataCollator(processor)([rows[index] for index in range(len(rows))])
        self.writer = None
        self.last_step = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            root = os.environ.get("TENSORBOARD_LOGGING_DIR") or Path(args.output_dir) / "runs"
            # A resumed run writes again what lies after its checkpoint.
            self.writer = SummaryWriter(Path(root) / "diagnostics", purge_step=state.global_step)
            self._write(model, state.global_step)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._write(model, state.global_step)

    def on_save(self, args, state, control, model=None, **kwargs):
        if args.eval_strategy == "no":
            self._write(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not args.load_best_model_at_end:  # otherwise the model is of another step now
            self._write(model, state.global_step)
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _write(self, model, step: int) -> None:
        if self.writer is None or step == self.last_step:  # another process writes, or training is over
            return
        self.last_step = step
        was_training = model.training
        model.eval()
        try:
            batch = {name: tensor.to(model.device) for name, tensor in self.batch.items()}
            with EchoDiagnostics(model) as diagnostics, torch.no_grad():
                model(**batch)
            for name, value in flatten(diagnostics.to_dict()):
                self.writer.add_scalar(name, value, step)
            if self.drawn is None:
                return
            features = torch.as_tensor(self.drawn["input_features"], dtype=torch.float32)
            alignment = attention.plot_alignment(model, features, self.tokenizer, text=self.drawn["text"])
            self.writer.add_figure("alignment", alignment, step)
            if diagnostics.measurements.f0.count:
                self.writer.add_figure("angles", attention.plot_angles(model, features), step)
                self.writer.add_figure("similarity", attention.plot_similarity(model, features), step)
                self.writer.add_figure("bias", attention.plot_pitch_bias(model, features), step)
        finally:
            model.train(was_training)


def require_tensorboard() -> None:
    """Raises `ImportError` if a package that [`DiagnosticsCallback`] needs is not installed."""
    for package in ("tensorboard", "matplotlib"):
        try:
            __import__(package)
        except ImportError as error:
            raise ImportError(
                f"Diagnostics of training need {package} ({error}): `pip install '.[train,plot]'` in the clone."
            ) from error


def flatten(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested dictionaries with their keys joined by slashes, without None."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        elif value is not None:
            yield f"{prefix}{key}", value


__all__ = ["DiagnosticsCallback"]

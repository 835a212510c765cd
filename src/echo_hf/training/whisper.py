"""The Whisper with pitch that a run starts with, and what it cannot be trained with."""

import math
from dataclasses import fields
from pathlib import Path

import datasets
import torch
from transformers import AutoProcessor, PreTrainedConfig, Seq2SeqTrainingArguments, WhisperForConditionalGeneration

from ..checkpoint import load_whisper_and_processor, parse_overrides
from ..conversion import add_pitch
from ..data.features import prepare_dataset
from ..data.whisper import WhisperDataCollator, WhisperFrameProcessor
from ..whisper_echo import (
    EchoWhisperConfig,
    EchoWhisperFeatureExtractor,
    EchoWhisperForConditionalGeneration,
    EchoWhisperProcessor,
)
from .arguments import WHISPER_LEARNING_RATE, AugmentationArguments, ModelArguments
from .preparation import Preparation, Speech

MODEL_TYPES = ("whisper", EchoWhisperConfig.model_type)
HIGHEST_LEARNING_RATE = 1e-4
FROM_SCRATCH = ("preset", "size", "token_unit", "vocab_size", "feature_groups")


def is_whisper(checkpoint: str | Path | None) -> bool:
    """Whether a folder or a name on the Hub is a Whisper, with pitch or without; what is not found is none."""
    if checkpoint is None:
        return False
    try:
        return PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type") in MODEL_TYPES
    except (OSError, ValueError):  # which loading the model will explain
        return False


def build_whisper(arguments: ModelArguments) -> tuple[EchoWhisperForConditionalGeneration, EchoWhisperProcessor]:
    """
    A Whisper with pitch and its processor: of a checkpoint that has pitch, or of one that gets it here.

    Args:
        arguments ([`ModelArguments`]): `config_overrides` are fields of [`EchoWhisperConfig`].

    Raises:
        `ValueError`: the checkpoint or a setting cannot be used.
    """
    name = arguments.model_name_or_path
    overrides = parse_overrides(arguments.config_overrides, EchoWhisperConfig)
    if PreTrainedConfig.get_config_dict(name)[0]["model_type"] == EchoWhisperConfig.model_type:
        if arguments.window is not None:
            raise ValueError(f"window: {name} has pitch and a window already; leave it out.")
        model, processor = load_whisper_and_processor(name, may_lack=True, **overrides)
    else:
        switches = {key: overrides.pop(key) for key in EchoWhisperConfig.__annotations__ if key in overrides}
        whisper = WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32, **overrides)
        model, processor = add_pitch(whisper, AutoProcessor.from_pretrained(name), arguments.window, **switches)
    if arguments.f0_method is not None:
        settings = {**processor.feature_extractor.to_dict(), "f0_method": arguments.f0_method}
        processor.feature_extractor = EchoWhisperFeatureExtractor.from_dict(settings)
    is_multilingual = getattr(model.generation_config, "is_multilingual", False)
    if is_multilingual and arguments.language is None and processor.tokenizer.language is None:
        # Labels would have neither language nor task, and the model would unlearn to write them.
        raise ValueError(f"language: {name} knows many. Give the one of the texts, e.g. --language en.")
    if arguments.language is not None:
        if not is_multilingual:
            raise ValueError(f"language: {name} knows no languages but its own; leave it out.")
        processor.tokenizer.set_prefix_tokens(arguments.language, task="transcribe", predict_timestamps=False)
        model.generation_config.language, model.generation_config.task = arguments.language, "transcribe"
    # Sinusoids, which Whisper does not train; the library forgets that when it loads a checkpoint.
    model.model.encoder.embed_positions.requires_grad_(False)
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    # Not in the file, since they are tied; else the Trainer warns that they are missing when it loads the best weights.
    model._keys_to_ignore_on_save = set(model.all_tied_weights_keys)
    return model, processor


class WhisperPreparation(Preparation):
    """Prepares speech for a Whisper: what its window does not hold is left out, since it would be cut off, text and
    all."""

    def __init__(self, model, processor, *args):
        super().__init__(model, processor, *args)
        self.frame_processor = WhisperFrameProcessor(processor)

    @classmethod
    def check_arguments(
        cls,
        model: ModelArguments,
        augmentation: AugmentationArguments,
        training: Seq2SeqTrainingArguments,
    ) -> None:
        """
        Refuses what a Whisper cannot be trained with.

        Raises:
            `ValueError`: an option is Echo's alone, or the learning rate would undo what the Whisper has learned.
        """
        given = [name for name in FROM_SCRATCH if getattr(model, name) is not None]
        given += [field.name for field in fields(augmentation) if getattr(augmentation, field.name)]
        given += ["label_smoothing_factor"] if training.label_smoothing_factor else []
        if given:
            raise ValueError(
                f"{', '.join(given)}: only an Echo can be trained with that, and this is a Whisper. Leave it out."
                " SpecAugment is there for both: --config_overrides apply_spec_augment=true."
            )
        if training.learning_rate > HIGHEST_LEARNING_RATE:
            raise ValueError(
                f"learning_rate is {training.learning_rate:g}, at which a Whisper forgets what it knows. Give at most"
                f" {HIGHEST_LEARNING_RATE:g}; {WHISPER_LEARNING_RATE:g} is usual."
            )

    def prepare(self, train_table: datasets.Dataset, eval_table: datasets.Dataset | None) -> Speech:
        window = self.processor.feature_extractor.chunk_length
        longest = min(self.data.max_seconds or math.inf, window)
        train = prepare_dataset(
            train_table,
            self.frame_processor,
            min_seconds=self.data.min_seconds,
            max_seconds=longest,
            **self.options,
        )
        speech = Speech(train=train, eval=None)
        if eval_table is not None:
            speech.eval = prepare_dataset(eval_table, self.frame_processor, max_seconds=window, **self.options)
        return speech

    def build_collator(self) -> WhisperDataCollator:
        return WhisperDataCollator(self.frame_processor.feature_extractor, self.model.config.decoder_start_token_id)


__all__ = ["WhisperPreparation", "build_whisper", "is_whisper"]

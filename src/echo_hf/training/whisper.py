"""The Whisper with pitch that a run starts with, and what it cannot be trained with."""

import torch
from transformers import AutoProcessor, PreTrainedConfig, Seq2SeqTrainingArguments, WhisperForConditionalGeneration

from ..checkpoint import parse_overrides
from ..whisper_echo import (
    EchoWhisperConfig,
    EchoWhisperFeatureExtractor,
    EchoWhisperForConditionalGeneration,
    EchoWhisperProcessor,
    add_pitch,
)
from .arguments import DataArguments, ModelArguments

MODEL_TYPES = ("whisper", EchoWhisperConfig.model_type)
HIGHEST_LEARNING_RATE = 1e-4  # beyond it a pretrained Whisper forgets what it knows
FROM_SCRATCH = ("preset", "size", "token_unit", "vocab_size", "feature_groups")
OF_ECHO = (  # what is done to Echo's features, and has no meaning for Whisper's
    *("tempo_perturbation", "voice_perturbation", "channel_perturbation", "f0_drop", "pause", "non_speech_share"),
    *("join", "diagnostics"),
)


def is_whisper(checkpoint: str | None) -> bool:
    """Whether a folder or a name on the Hub is a Whisper, with pitch or without; what is not found is none."""
    if checkpoint is None:
        return False
    try:
        return PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type") in MODEL_TYPES
    except (OSError, ValueError):  # which loading the model will explain
        return False


def check_arguments(model: ModelArguments, data: DataArguments, training: Seq2SeqTrainingArguments) -> None:
    """
    Refuses what a Whisper cannot be trained with.

    Raises:
        `ValueError`: an option is Echo's alone, or the learning rate would undo what the Whisper has learned.
    """
    given = [name for name in FROM_SCRATCH if getattr(model, name) is not None]
    given += [name for name in OF_ECHO if getattr(data, name)]
    given += ["label_smoothing_factor"] if training.label_smoothing_factor else []
    if given:
        raise ValueError(
            f"{', '.join(given)}: only an Echo can be trained with that, and {model.model_name_or_path} is a Whisper."
            " Leave it out. SpecAugment is there for both: --config_overrides apply_spec_augment=true."
        )
    if training.learning_rate > HIGHEST_LEARNING_RATE:
        raise ValueError(
            f"learning_rate is {training.learning_rate:g}, at which a Whisper forgets what it knows. Give at most"
            f" {HIGHEST_LEARNING_RATE:g}; --learning_rate 1e-5 is usual."
        )


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
        model = EchoWhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32, **overrides)
        processor = AutoProcessor.from_pretrained(name)
    else:
        switches = {key: overrides.pop(key) for key in EchoWhisperConfig.__annotations__ if key in overrides}
        whisper = WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32, **overrides)
        model, processor = add_pitch(whisper, AutoProcessor.from_pretrained(name), arguments.window, **switches)
    if arguments.f0_method is not None:
        settings = {**processor.feature_extractor.to_dict(), "f0_method": arguments.f0_method}
        processor.feature_extractor = EchoWhisperFeatureExtractor.from_dict(settings)
    if arguments.language is not None:
        if not getattr(model.generation_config, "is_multilingual", False):
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


__all__ = ["build_whisper", "check_arguments", "is_whisper"]

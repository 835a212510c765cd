"""Training from arguments to a finished checkpoint, on top of Transformers' `Seq2SeqTrainer`."""

from .arguments import (
    TRAINING_DEFAULTS,
    WHISPER_LEARNING_RATE,
    AugmentationArguments,
    DataArguments,
    ModelArguments,
)
from .checkpoints import find_last_checkpoint
from .model import build_config, build_model_and_processor
from .model_card import COMMAND_FILE, CardArguments
from .run import train
from .trainer import EchoTrainer
from .whisper import is_whisper

__all__ = [
    "COMMAND_FILE",
    "TRAINING_DEFAULTS",
    "WHISPER_LEARNING_RATE",
    "AugmentationArguments",
    "CardArguments",
    "DataArguments",
    "EchoTrainer",
    "ModelArguments",
    "build_config",
    "build_model_and_processor",
    "find_last_checkpoint",
    "is_whisper",
    "train",
]

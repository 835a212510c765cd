"""What a run does to speech before a model is trained on it: features, labels and batches, as the model takes them."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import datasets
from transformers import Seq2SeqTrainingArguments
from transformers.utils import logging

from ..configuration_echo import EchoConfig
from ..data.augmentation import VoicePerturbation
from ..data.collator import MAX_JOINED_SECONDS, EchoDataCollator
from ..data.features import PreparedData, prepare_dataset
from ..data.non_speech import non_speech_table
from ..processing_echo import EchoProcessor
from .arguments import AugmentationArguments, DataArguments, ModelArguments

logger = logging.get_logger(__name__)


@dataclass
class Speech:
    """What a run trains and evaluates on; the last `without_speech` utterances of `train` are clips without speech."""

    train: PreparedData
    eval: PreparedData | None
    without_speech: int = 0


class Preparation(ABC):
    """
    Prepares speech for a kind of model; [`EchoPreparation`] and [`~echo_hf.training.whisper.WhisperPreparation`].

    Args:
        model: what is trained.
        processor: the model's.
        data ([`DataArguments`]): which utterances are left out, and where features are kept.
        augmentation ([`AugmentationArguments`]): what is changed in training speech.
        seed (`int`): of what is drawn.
    """

    def __init__(self, model, processor, data: DataArguments, augmentation: AugmentationArguments, seed: int):
        self.model = model
        self.processor = processor
        self.data = data
        self.augmentation = augmentation
        self.seed = seed
        self.options = {
            "max_label_length": model.config.max_target_positions,
            "skip_broken": data.skip_broken,
            "num_proc": data.num_proc,
            "cache_dir": data.cache_dir,
        }

    @classmethod  # noqa: B027 (a kind of model may have nothing to refuse)
    def check_arguments(
        cls,
        model: ModelArguments,
        augmentation: AugmentationArguments,
        training: Seq2SeqTrainingArguments,
    ) -> None:
        """Refuses what the kind of model cannot be trained with, before anything is read."""

    @abstractmethod
    def prepare(self, train_table: datasets.Dataset, eval_table: datasets.Dataset | None) -> Speech:
        """Features and labels of all utterances. Of several processes one computes them, and the others wait for its
        cache."""

    @abstractmethod
    def build_collator(self):
        """What makes batches as they are evaluated."""

    def build_train_collator(self):
        """What makes batches to train on."""
        return self.build_collator()


class EchoPreparation(Preparation):
    """Prepares speech for an Echo, with whatever augmentation the arguments ask for."""

    def prepare(self, train_table: datasets.Dataset, eval_table: datasets.Dataset | None) -> Speech:
        share, config = self.augmentation.non_speech_share, self.model.config
        recorded = prepare_dataset(
            train_table,
            self.processor,
            min_seconds=self.data.min_seconds,
            max_seconds=self.data.max_seconds,
            **self.options,
        )
        speech = Speech(train=recorded, eval=None)
        if share:
            speech.train = add_non_speech(recorded, share, self.processor, self.seed, **self.options)
            speech.without_speech = len(speech.train.dataset) - len(recorded.dataset)
        if eval_table is not None:
            speech.eval = prepare_dataset(eval_table, self.processor, **self.options)
        if config.ctc_loss_weight > 0 and (beyond := count_beyond_ctc(speech.train, config)):
            logger.warning(
                f"{beyond} of {len(speech.train.dataset)} utterances have more tokens than encoder frames, and the CTC"
                " loss leaves them out. Subwords are fewer tokens (token_unit); smaller stem_strides give more frames."
            )
        return speech

    def build_collator(self) -> EchoDataCollator:
        return EchoDataCollator(self.processor)

    def build_train_collator(self) -> EchoDataCollator:
        """What makes batches to train on: utterances perturbed and joined as the arguments say."""
        augmentation = self.augmentation
        perturb = VoicePerturbation(
            self.processor.feature_extractor,
            tempo=augmentation.tempo_perturbation,
            voice=augmentation.voice_perturbation,
            channel=augmentation.channel_perturbation,
            f0_drop=augmentation.f0_drop,
            pause=augmentation.pause,
        )
        return EchoDataCollator(
            self.processor,
            perturb=perturb.batch if perturb.is_active else None,
            join=augmentation.join,
            max_joined_seconds=min(MAX_JOINED_SECONDS, self.data.max_seconds or MAX_JOINED_SECONDS),
            max_label_length=self.model.config.max_target_positions,
            seed=self.seed,
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


__all__ = ["EchoPreparation", "Preparation", "Speech"]

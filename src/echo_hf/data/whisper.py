"""Speech for a Whisper with pitch: features as runs keep them, and batches as the model takes them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..feature_extraction_echo import EchoFeatureExtractor
from ..inference import load_checkpoint, place
from ..whisper_echo import (
    EchoWhisperConfig,
    EchoWhisperFeatureExtractor,
    EchoWhisperForConditionalGeneration,
    EchoWhisperProcessor,
)


class WhisperFrames(EchoWhisperFeatureExtractor):
    """The features of an [`EchoWhisperFeatureExtractor`], of audio in any form that [`EchoFeatureExtractor`] reads, as
    runs keep features: time-major, `(batch, frames, channels)`, F0 last."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.feature_size += 1  # channels, where the table of features is laid out; the filters are made

    def __call__(self, audio, resample: bool = True, **kwargs) -> dict[str, np.ndarray]:
        reader = EchoFeatureExtractor(sampling_rate=self.sampling_rate, hop_length=self.hop_length)
        waveform = reader._read(audio, "audio", None, resample)
        if len(waveform) > self.n_samples:
            raise ValueError(
                f"audio has {len(waveform) / self.sampling_rate:.1f} s, and this Whisper hears {self.chunk_length} s at"
                " a time. Cut it, or leave it out"
            )
        features = super().__call__(waveform, sampling_rate=self.sampling_rate)["input_features"]
        return {"input_features": features.transpose(0, 2, 1)}

    def pad(self, rows, *args, **kwargs):
        """Time-major features of `prepare_dataset` as the model takes them, `(batch, channels, frames)`; features that
        are being made go the library's way."""
        if not isinstance(rows, dict):
            return super().pad(rows, *args, **kwargs)
        stacked = torch.as_tensor(np.stack([np.asarray(row, dtype=np.float32) for row in rows["input_features"]]))
        return {"input_features": stacked.transpose(1, 2).contiguous()}


class WhisperPreparation:
    """What [`~echo_hf.data.features.prepare_dataset`] and [`~echo_hf.inference.recognize`] ask of a processor, for a
    Whisper."""

    def __init__(self, processor: EchoWhisperProcessor):
        settings = processor.feature_extractor.to_dict()
        self.feature_extractor = WhisperFrames(**{k: v for k, v in settings.items() if not k.endswith("_type")})
        self.tokenizer = processor.tokenizer
        self.batch_decode = processor.batch_decode


class WhisperDataCollator:
    """
    Makes a batch of rows of prepared utterances.

    Args:
        extractor ([`WhisperFrames`]): stacks the features.
        start_token_id (`int`): the model's `decoder_start_token_id`, which labels lose at their front: the model puts
            it there itself when it shifts them.

    Returns (`__call__`):
        `dict[str, torch.Tensor]`: `input_features` `(batch, channels, frames)` and `labels` `(batch, tokens)`, padded
        with -100.
    """

    def __init__(self, extractor: WhisperFrames, start_token_id: int):
        self.extractor = extractor
        self.start_token_id = start_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.extractor.pad({"input_features": [row["input_features"] for row in rows]})
        labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
        labels = [ids[1:] if len(ids) and ids[0] == self.start_token_id else ids for ids in labels]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return batch


def load_recognizer(checkpoint: str | Path | None = None, device: str | None = None, **overrides):
    """
    What [`~echo_hf.inference.recognize`] takes: as [`~echo_hf.inference.load_checkpoint`], and of a Whisper with pitch
    too.

    Returns:
        The model, in float32, and what prepares its features: [`EchoProcessor`], or [`WhisperPreparation`] for an
        [`EchoWhisperForConditionalGeneration`].

    Raises:
        `ValueError`: as by [`~echo_hf.inference.load_checkpoint`].
    """
    try:
        saved = {} if checkpoint is None else PreTrainedConfig.get_config_dict(checkpoint)[0]
    except (OSError, ValueError):  # which loading explains
        saved = {}
    if saved.get("model_type") != EchoWhisperConfig.model_type:
        return load_checkpoint(checkpoint, device, **overrides)
    model = EchoWhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, **overrides)
    return place(model, WhisperPreparation(EchoWhisperProcessor.from_pretrained(checkpoint)), device)


__all__ = ["load_recognizer", "WhisperDataCollator", "WhisperFrames", "WhisperPreparation"]

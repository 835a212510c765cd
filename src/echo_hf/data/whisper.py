"""Speech for a Whisper with pitch: features as runs keep them, and batches as the model takes them."""

from typing import Any

import numpy as np
import torch

from ..feature_extraction_echo import EchoFeatureExtractor
from ..whisper_echo import EchoWhisperFeatureExtractor, EchoWhisperProcessor


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
        mask = torch.ones(stacked.shape[:2], dtype=torch.long)  # which `generate` asks for, and Whisper does not use
        return {"input_features": stacked.transpose(1, 2).contiguous(), "attention_mask": mask}


class WhisperFrameProcessor:
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


def frame_processor(processor):
    """What [`~echo_hf.data.features.prepare_dataset`] and [`~echo_hf.inference.recognize`] take of a model's processor:
    an [`EchoProcessor`] itself, and a [`WhisperFrameProcessor`] of an [`EchoWhisperProcessor`]."""
    return WhisperFrameProcessor(processor) if isinstance(processor, EchoWhisperProcessor) else processor


__all__ = ["WhisperDataCollator", "WhisperFrameProcessor", "WhisperFrames", "frame_processor"]

"""The processor of Echo: audio and transcripts in one call."""

from transformers.audio_utils import AudioInput
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import AudioKwargs, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput

from .configuration_echo import attach_module

attach_module(__name__)


class EchoAudioKwargs(AudioKwargs, total=False):
    """Options of [`EchoFeatureExtractor`]; `resample` is Echo's own."""

    resample: bool | None


class EchoProcessorKwargs(ProcessingKwargs, total=False):
    """Options of a processor's call."""

    audio_kwargs: EchoAudioKwargs


class EchoProcessor(ProcessorMixin):
    r"""Joins an [`EchoFeatureExtractor`] and an [`EchoTokenizer`].

    Args:
        feature_extractor ([`EchoFeatureExtractor`]): makes `input_features` from audio.
        tokenizer ([`EchoTokenizer`]): makes token ids from text, and text from token ids.

    Raises:
        `ValueError`: one of the two is another model's.

    Example:

    ```python
    >>> import numpy as np
    >>> from echo_hf import EchoFeatureExtractor, EchoProcessor, EchoTokenizer

    >>> processor = EchoProcessor(EchoFeatureExtractor(), EchoTokenizer())
    >>> batch = processor(np.zeros(16000), text="hi", sampling_rate=16000, return_tensors="pt")
    >>> batch["labels"]
    tensor([[74, 75,  2]])

    ```
    """

    valid_processor_kwargs = EchoProcessorKwargs
    text_kwargs = {"padding": True}
    audio_kwargs = {"padding": True}
    _auto_class = "AutoProcessor"

    def __init__(self, feature_extractor, tokenizer):
        # By name, since the code of a checkpoint has classes of its own.
        for part, expected in ((feature_extractor, "EchoFeatureExtractor"), (tokenizer, "EchoTokenizer")):
            if expected not in [kind.__name__ for kind in type(part).__mro__]:
                raise ValueError(
                    f"EchoProcessor needs an {expected}, got {type(part).__name__}. Another model's features or tokens"
                    " mean nothing to Echo: load both from a checkpoint of Echo."
                )
        super().__init__(feature_extractor, tokenizer)

    def __call__(
        self,
        audio: AudioInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        sampling_rate: int | None = None,
        **kwargs: Unpack[EchoProcessorKwargs],
    ) -> BatchFeature:
        """Features of audio, token ids of text, or both.

        Args:
            audio (*optional*): One recording or a batch, in any form that [`EchoFeatureExtractor.__call__`] takes.
            text (`str` or `list[str]`, *optional*): The transcript of each recording.
            sampling_rate (`int`, *optional*): Of arrays that do not say their own, in Hz.
            kwargs:
                `audio_kwargs` for the extractor, `text_kwargs` for the tokenizer; other options go to both where both
                know them. `max_length` counts frames of audio but tokens of text, so give it in one of the two.

        Returns:
            [`BatchFeature`] with

            - audio: `input_features` `(batch, frames, channels)`, `attention_mask` `(batch, frames)`; - audio and text:
            also `labels` `(batch, tokens)`, without `bos_token_id` and with `eos_token_id`, padded with
              `pad_token_id`, which the loss ignores. The Trainer counts only -100 as padding: give it
              [`EchoDataCollator`];
            - text: `input_ids` with `bos_token_id`, and their `attention_mask`.

        Raises:
            `ValueError`: neither audio nor text is given, or they are not equally many.
        """
        if audio is None and text is None:
            raise ValueError("Give audio, text or both to the processor; it got neither.")
        if sampling_rate is not None:
            kwargs["sampling_rate"] = sampling_rate
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        if audio is None:
            return BatchFeature(self.tokenizer(text, **options["text_kwargs"]).data)
        features = self.feature_extractor(audio, **options["audio_kwargs"])
        if text is None:
            return features
        num_texts = 1 if isinstance(text, str) else len(text)
        if num_texts != len(features["input_features"]):
            raise ValueError(
                f"There are {len(features['input_features'])} recordings and {num_texts} texts; give one text each."
            )
        features["labels"] = self._labels(text, options["text_kwargs"])
        return features

    def _labels(self, text: TextInput | list[TextInput], options: dict):
        """Token ids of `text` without the begin of sequence, which the model puts first."""
        single = self.tokenizer(text, **{**options, "padding": False, "return_tensors": None})["input_ids"]
        batch = [single] if isinstance(text, str) else single
        labels = [ids[1:] if ids[:1] == [self.tokenizer.bos_token_id] else ids for ids in batch]
        padding = {key: options.get(key) for key in ("padding", "max_length", "pad_to_multiple_of", "return_tensors")}
        if padding["padding"] != "max_length":
            padding["max_length"] = None  # it was for truncation
        padded = self.tokenizer.pad({"input_ids": labels}, **padding)["input_ids"]
        return padded[0] if isinstance(text, str) and padding["return_tensors"] is None else padded

    @property
    def model_input_names(self) -> list[str]:
        return [*self.feature_extractor.model_input_names, "labels"]


__all__ = ["EchoProcessor"]

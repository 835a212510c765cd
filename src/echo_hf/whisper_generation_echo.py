"""What generation of a Whisper with pitch does otherwise than Whisper's: windows of any length, and prompts."""

import torch
from transformers import LogitsProcessor

FRAMES_PER_POSITION = 2  # frames of features to an encoder frame


class EchoWhisperWindowLogitsProcessor(LogitsProcessor):
    """Forbids times, which are the last tokens of the vocabulary, behind the one whose token is `last`."""

    def __init__(self, last: int):
        self.last = last

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        behind = torch.arange(scores.shape[-1], device=scores.device) > self.last
        return scores.masked_fill(behind, -torch.inf)


class EchoWhisperGenerationMixin:
    """Goes before [`WhisperGenerationMixin`]; at a window of 30 s it changes no token."""

    def _set_return_timestamps(self, return_timestamps, is_shortform, generation_config):
        # Whisper's own message takes every window for 30 s.
        if return_timestamps is None:
            return_timestamps = getattr(generation_config, "return_timestamps", None)
        if not is_shortform and return_timestamps is False:
            raise ValueError(
                f"input_features are longer than the {FRAMES_PER_POSITION * self.config.max_source_positions} frames of"
                " 10 ms that this model hears at a time. Give return_timestamps=True, with which it moves its window"
                " along them, or cut the audio."
            )
        return super()._set_return_timestamps(return_timestamps, is_shortform, generation_config)

    def _retrieve_logit_processors(self, generation_config, *args, **kwargs):
        # A window shorter than 30 s leaves times behind its end, which a model that is not fine-tuned does write.
        processors = super()._retrieve_logit_processors(generation_config, *args, **kwargs)
        if generation_config.return_timestamps:
            last = generation_config.no_timestamps_token_id + 1 + self.config.max_source_positions
            processors = [EchoWhisperWindowLogitsProcessor(last), *processors]
        return processors

    def _prepare_decoder_input_ids_for_generation(self, batch_size, model_input_name, model_kwargs, *args, **kwargs):
        # The library begins every prompt with the start token, but those of models of type "whisper".
        prompt = model_kwargs.pop("decoder_input_ids", None)
        start, model_kwargs = super()._prepare_decoder_input_ids_for_generation(
            batch_size, model_input_name, model_kwargs, *args, **kwargs
        )
        return start if prompt is None else prompt, model_kwargs


__all__ = ["FRAMES_PER_POSITION", "EchoWhisperGenerationMixin", "EchoWhisperWindowLogitsProcessor"]

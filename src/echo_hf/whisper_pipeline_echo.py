"""Speech recognition pipeline of a Whisper with pitch: the stock one, with right times where a window is not 30 s."""

from transformers.models.whisper.tokenization_whisper import LANGUAGES
from transformers.pipelines.automatic_speech_recognition import AutomaticSpeechRecognitionPipeline

from .whisper_generation_echo import FRAMES_PER_POSITION

LANGUAGE_TOKENS = {f"<|{code}|>": name for code, name in LANGUAGES.items()}
STOCK_WINDOW = 30  # seconds, by which the tokenizer moves on from window to window


class EchoWhisperPipeline(AutomaticSpeechRecognitionPipeline):
    """
    The stock pipeline of Whisper, with its arguments and results.

    Of audio longer than the window, the stock pipeline reads the times of segments off the tokens, and takes each
    window for 30 s. Where the window is another one, these are the times that `generate` counts.

    Raises:
        `ValueError`: the feature extractor is not the model's, or `chunk_length_s` is longer than the window, which
            would cut off the end of each chunk.
    """

    def _sanitize_parameters(self, chunk_length_s: float | None = None, **kwargs):
        self.type = "seq2seq_whisper"  # which the library tells by the model type; it calls this next
        frames = FRAMES_PER_POSITION * self.model.config.max_source_positions
        if getattr(self.feature_extractor, "nb_max_frames", None) != frames:
            raise ValueError(
                f"feature_extractor is {type(self.feature_extractor).__name__} of another window than the model's"
                f" {frames} frames. Give AutoProcessor.from_pretrained(checkpoint).feature_extractor of its checkpoint."
            )
        window = self.feature_extractor.chunk_length
        if chunk_length_s is not None and chunk_length_s > window:
            raise ValueError(
                f"chunk_length_s is {chunk_length_s:g}, and this model hears {window} s at a time. Give at most"
                f" {window}, or return_timestamps=True instead, with which the model moves its window along the audio."
            )
        return super()._sanitize_parameters(chunk_length_s=chunk_length_s, **kwargs)

    def _forward(self, model_inputs, return_timestamps=False, return_language=None, **generate_kwargs):
        extractor = self.feature_extractor
        is_long = model_inputs["input_features"].shape[-1] > extractor.nb_max_frames
        if return_timestamps is not True or not is_long or extractor.chunk_length == STOCK_WINDOW:
            return super()._forward(model_inputs, return_timestamps, return_language, **generate_kwargs)
        settings = self._prepare_generate_kwargs({**generate_kwargs, "return_timestamps": True})
        inputs = {name: model_inputs.pop(name) for name in ("input_features", "attention_mask")}
        generated = self.model.generate(**inputs, **settings, return_segments=True)
        chunks = [[self._chunk(segment, return_language) for segment in row] for row in generated["segments"]]
        is_last = model_inputs.pop("is_last")
        return {"is_last": is_last, "tokens": generated["sequences"], "chunks": chunks, **model_inputs}

    def _chunk(self, segment: dict, return_language: bool | None) -> dict:
        """A segment of `generate` as the stock pipeline has it."""
        start, end = (round(float(segment[name]), 2) for name in ("start", "end"))
        chunk = {"timestamp": (start, end), "text": self.tokenizer.decode(segment["tokens"], skip_special_tokens=True)}
        if return_language:
            tokens = segment["result"]["sequences"] if isinstance(segment["result"], dict) else segment["result"]
            tokens = self.tokenizer.convert_ids_to_tokens(tokens)
            chunk["language"] = next((LANGUAGE_TOKENS[token] for token in tokens if token in LANGUAGE_TOKENS), None)
        return chunk

    def postprocess(self, model_outputs, **kwargs):
        chunks = model_outputs[0].pop("chunks", None)
        result = super().postprocess(model_outputs, **kwargs)
        if chunks is not None:
            is_one_batch = bool(chunks) and isinstance(chunks[0], list)  # of one recording
            result["chunks"] = chunks[0] if is_one_batch else chunks
        return result

"""The speech recognition pipeline for Echo: what the stock pipeline does, with four things changed for Echo models.

- Files and bytes are read with soundfile, not ffmpeg, and any sampling rate is resampled with soxr.
- Decoding is greedy unless the model's or the caller's generation settings say otherwise (the stock pipeline searches
  with 5 beams and stops at 256 tokens).
- The CTC path is collapsed by Echo's tokenizer, which can also tell when each character or word was said.
- Whether the model generates text or has the CTC head alone is seen from the model, also where the library's tables of
  names do not have Echo because this file came with a checkpoint.

With any other model it is the stock pipeline.
"""

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Mapping
from itertools import groupby

from huggingface_hub.utils import httpx
from transformers.pipelines.automatic_speech_recognition import AutomaticSpeechRecognitionPipeline

from .feature_extraction_echo import AUDIO_KEYS


class EchoAutomaticSpeechRecognitionPipeline(AutomaticSpeechRecognitionPipeline):
    """
    Speech recognition with [`EchoForConditionalGeneration`] or [`EchoForCTC`].

    Takes paths, URLs, bytes of files, arrays at the model's sampling rate, dicts with `"raw"` or `"array"` and
    `"sampling_rate"`, rows of a `datasets` audio column, and lists, generators and data sets of these.

    Gives `{"text": str}`. An [`EchoForCTC`] also gives `"chunks"`, each with `"text"` and `"timestamp"` (start and end
    in seconds), with `return_timestamps="char"` or `"word"`.

    Raises:
        `ValueError`: the audio cannot be read, is empty, not finite or shorter than a frame; or timestamps are asked of
        a model that has none.

    Example:

    ```python
    >>> import echo_hf
    >>> from transformers import pipeline

    >>> transcribe = pipeline("automatic-speech-recognition", model="path/to/checkpoint")  # doctest: +SKIP
    >>> transcribe("speech.flac")["text"]  # doctest: +SKIP

    ```"""

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        if self._is_echo and model.can_generate():
            # generation_config alone decides.
            self._generation_defaults = {}

    @property
    def _is_echo(self) -> bool:
        return self.model.config.model_type == "echo"

    def _sanitize_parameters(self, **kwargs):
        # The first that the library calls once it has set `type`, and it depends on it.
        if self._is_echo and self.model.can_generate():
            self.type = "seq2seq"
        return super()._sanitize_parameters(**kwargs)

    def preprocess(self, inputs, chunk_length_s=0, stride_length_s=None):
        if self._is_echo:
            inputs = self._read(inputs)
            if chunk_length_s:
                # Whole frames only, or the last chunk might be shorter than one.
                whole = len(inputs["raw"]) // self.feature_extractor.hop_length * self.feature_extractor.hop_length
                inputs["raw"] = inputs["raw"][:whole]
        yield from super().preprocess(inputs, chunk_length_s=chunk_length_s, stride_length_s=stride_length_s)

    def _read(self, inputs) -> dict:
        """Audio of any kind as `{"raw": (samples,) at the extractor's rate, "sampling_rate": int}`, and what else was
        in `inputs` if it was a dict."""
        rate = self.feature_extractor.sampling_rate
        extra = {}
        if isinstance(inputs, str) and inputs.startswith(("http://", "https://")):
            inputs = httpx.get(inputs, follow_redirects=True).raise_for_status().content
        if isinstance(inputs, Mapping):
            extra = {key: value for key, value in inputs.items() if key not in (*AUDIO_KEYS, "sampling_rate")}
            is_array = inputs.get("raw") is not None or inputs.get("array") is not None
            if is_array and inputs.get("sampling_rate") is None:
                raise ValueError("A dict with audio needs its 'sampling_rate' (in Hz) besides 'raw' or 'array'.")
            if extra.get("stride") is not None and inputs.get("sampling_rate"):
                extra["stride"] = tuple(samples * rate / inputs["sampling_rate"] for samples in extra["stride"])
        waveform = self.feature_extractor._read(inputs, "audio", rate, resample=True)
        return {"raw": waveform, "sampling_rate": rate, **extra}

    def postprocess(self, model_outputs, decoder_kwargs=None, return_timestamps=None, return_language=None):
        if not self._is_echo or self.type != "ctc":
            return super().postprocess(model_outputs, decoder_kwargs, return_timestamps, return_language)
        path = []  # token of each encoder frame
        extra = defaultdict(list)
        for outputs in model_outputs:
            tokens = outputs.pop("tokens")[0].tolist()
            length, left, right = outputs.pop("stride", None) or (len(tokens), 0, 0)
            # The last chunk of a recording has no right stride. Its length is rounded; frames after it are blank.
            path += tokens[left : length - right if right else None]
            outputs.pop("is_last", None)
            for key, value in outputs.items():
                extra[key].append(value)
        result = {"text": self.tokenizer.decode_ctc(path)}
        if return_timestamps:
            seconds = self._align_to / self.feature_extractor.sampling_rate  # an encoder frame
            result["chunks"] = [
                {"text": text, "timestamp": (start * seconds, end * seconds)}
                for text, start, end in self._offsets(path, words=return_timestamps == "word")
            ]
        return {**result, **extra}

    def _offsets(self, path: list[int], words: bool) -> Iterator[tuple[str, int, int]]:
        """Each character, or each word, of a CTC path with the frames of its start and end."""
        characters, pending, frame = [], [], 0
        blanks = set(self.tokenizer.all_special_ids)
        for token, run in groupby(path):
            start, frame = frame, frame + len(list(run))
            if token in blanks:
                continue
            # A character may be several tokens (bytes), and a token several characters, all with the token's time.
            pending.append((token, start, frame))
            text = self.tokenizer.decode([token for token, _, _ in pending])
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                characters += [(character, pending[0][1], frame) for character in text]
                pending = []
        if not words:
            yield from characters
            return
        for is_space, group in groupby(characters, key=lambda character: character[0].isspace()):
            if not is_space:
                word = list(group)
                yield "".join(character for character, _, _ in word), word[0][1], word[-1][2]


__all__ = ["EchoAutomaticSpeechRecognitionPipeline"]

"""The speech recognition pipeline for Echo: the stock pipeline with these changes.

- soundfile reads files block by block, without ffmpeg, and soxr resamples them.
- Recordings of any length are cut at pauses, silence is left out, and the texts are joined.
- Segments and words have times, also from the generating model: its tokens are aligned to the frames by its CTC head,
  or by cross-attention where it has none.
- The model's and the caller's generation settings decide; the stock pipeline uses 5 beams and stops at 256 tokens.
- The model says whether it generates text. The stock pipeline's tables lack the Echo of a checkpoint's own code."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Number
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from transformers import LogitsProcessor
from transformers.pipelines.automatic_speech_recognition import AutomaticSpeechRecognitionPipeline
from transformers.utils import is_torch_tensor, logging

from .alignment_echo import align_by_attention, align_by_ctc
from .configuration_echo import attach_module
from .feature_extraction_echo import AUDIO_KEYS, BLOCK_FRAMES, array_rows, is_file
from .generation_echo import find_cut_off
from .modeling_echo import mean_cross_attention
from .pitch_echo import estimate_f0
from .segmentation_echo import (
    Segment,
    Word,
    group_words,
    join_overlap,
    needs_space,
    read_blocks,
    segment_blocks,
    whole_segment,
)

attach_module(__name__)
logger = logging.get_logger(__name__)

LONGEST_SEGMENT = 20.0  # seconds: up to some 400 characters, which fit the decoder's 448 positions even as bytes


@dataclass(frozen=True)
class SegmentContext:
    """What the pipeline keeps of a segment while the model recognizes it."""

    start: float  # seconds from the begin of the recording
    end: float
    overlap: float  # seconds at its begin that the segment before has too
    has_neighbors: bool  # whether it shares audio with the segment before or behind it
    is_speech: bool  # False if all of it is silence
    extra: dict[str, Any]  # the caller's own keys, which the result returns


class NaNRefusal(LogitsProcessor):
    """Ends `generate()` with an error where the model predicts NaN, which would become an empty text."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        _refuse_nan(scores)
        return scores


class EchoAutomaticSpeechRecognitionPipeline(AutomaticSpeechRecognitionPipeline):
    """Speech recognition with [`EchoForConditionalGeneration`] or [`EchoForCTC`], of recordings of any length.

    One recording is a path, a URL, the bytes of a file, a 1-D array at the model's sampling rate, a dict with `"raw"`
    or `"array"` and `"sampling_rate"`, or an entry of a `datasets` audio column. Several are a list, a tuple, a 2-D
    array of mono recordings, an audio column, a data set with a column `"audio"`, a generator or another iterable.

    Besides those of the stock pipeline, these arguments, when it is made or called:

    - `chunk_length_s` (defaults to 20): a longer recording is cut into segments of at most so many seconds; see
      [`~echo_hf.segmentation_echo.segment_blocks`]. With 0 the whole recording is one segment. `batch_size` segments go
      through the model together.
    - `stride_length_s` (defaults to a sixth of it): without a pause to cut at, two segments share twice so many
    seconds, or
      the sum of two such lengths. Their texts are joined at common words.
    - `return_timestamps`: `True` for the times of segments, `"word"`, or with [`EchoForCTC`] `"char"`.
    - `progress`: called with the number of seconds of each block that was read.

    Returns:
        `{"text": str}` of one recording, and a list of these of several; an iterator for generators and torch data
        sets. With `return_timestamps` also `"chunks"`, each with `"text"` and `"timestamp"`, its start and end in
        seconds. As with Whisper, words come with the space before them; those of an [`EchoForCTC`] without, as with
        other CTC models. Other keys of a dict that was given come back in lists of one, except `"text"` and `"chunks"`.
        A recording with no frame above -70 dB of full scale has an empty text.

    Raises:
        `ValueError`: the audio cannot be read, is empty, not finite or shorter than a frame; the input is of no known
            kind; the model predicts NaN; or the kind of timestamps is not known.
        `FileNotFoundError`: there is no file at a path.

    Example:

    ```python
    >>> import echo_hf
    >>> from transformers import pipeline

    >>> transcribe = pipeline("automatic-speech-recognition", model="path/to/checkpoint")  # doctest: +SKIP
    >>> transcribe("speech.flac")["text"]  # doctest: +SKIP
    >>> transcribe("lecture.mp3", return_timestamps="word", batch_size=8)["chunks"]  # doctest: +SKIP

    ```
    """

    def __new__(cls, model=None, *args, **kwargs):
        # Transformers makes this class for every model, since it is registered for the task.
        if model is not None and model.config.model_type != "echo":
            return getattr(model, "pipeline_class", AutomaticSpeechRecognitionPipeline)(model, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        self.type = "seq2seq" if model.can_generate() else "ctc"
        if model.can_generate():
            self._generation_defaults = {}  # the model's generation_config alone decides

    def _sanitize_parameters(
        self,
        chunk_length_s=None,
        stride_length_s=None,
        ignore_warning=None,
        return_timestamps=None,
        progress=None,
        **kwargs,
    ):
        segmenting = {"chunk_length_s": chunk_length_s, "stride_length_s": stride_length_s, "progress": progress}
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        preprocess.update({name: value for name, value in segmenting.items() if value is not None})
        among_generate_kwargs = forward.pop("return_timestamps", None)  # where scripts for Whisper have it
        if return_timestamps is None:
            return_timestamps = among_generate_kwargs
        if return_timestamps is not None:
            kinds = (False, True, "word") if self.model.can_generate() else (False, True, "word", "char")
            if return_timestamps not in kinds:
                raise ValueError(
                    f"return_timestamps={return_timestamps!r} is not known to {type(self.model).__name__}; give one of"
                    f" {', '.join(map(repr, kinds))}."
                )
            forward["return_timestamps"] = postprocess["return_timestamps"] = return_timestamps
        return preprocess, forward, postprocess

    def __call__(self, inputs, **kwargs):
        recordings = _as_several(inputs)
        if recordings is None:
            return super().__call__(inputs, **kwargs)
        if not isinstance(recordings, Sequence):
            return super().__call__(recordings, **kwargs)
        # A generator, since a column of a data set decodes its audio while it is read.
        return list(super().__call__((recording for recording in recordings), **kwargs)) if len(recordings) else []

    # From a recording to segments ------------------------------------------------------------------------------------

    def preprocess(self, inputs, chunk_length_s=LONGEST_SEGMENT, stride_length_s=None, progress=None):
        blocks, extra = self._read(inputs)
        if progress is not None:
            blocks = _count_seconds(blocks, self.feature_extractor.sampling_rate, progress)
        if stride_length_s is None:
            stride_length_s = chunk_length_s / 6
        overlap = 2 * stride_length_s if isinstance(stride_length_s, Number) else sum(stride_length_s)
        segments = self._segments(blocks, chunk_length_s, overlap)
        segment = next(segments)
        while segment is not None:
            following = next(segments, None)
            yield {"is_last": following is None, **self._features(segment, extra)}
            segment = following

    def _read(self, inputs) -> tuple[Iterator[np.ndarray], dict[str, Any]]:
        """Audio of any kind as blocks of shape `(samples,)` at the extractor's rate, and the caller's other keys."""
        rate = self.feature_extractor.sampling_rate
        source, extra = inputs, {}
        if isinstance(inputs, Mapping):
            if "audio" in inputs and not any(key in inputs for key in AUDIO_KEYS):
                raise ValueError("A row of a data set holds its recording in a column. Pass row['audio'].")
            is_array = inputs.get("raw") is not None or inputs.get("array") is not None
            if is_array and inputs.get("sampling_rate") is None:
                raise ValueError("A dict with audio needs its 'sampling_rate' (in Hz) besides 'raw' or 'array'.")
            if inputs.get("stride") is not None:
                raise ValueError("A stride is not usable: recordings are cut at pauses. Leave it out.")
            extra = {key: value for key, value in inputs.items() if key not in (*AUDIO_KEYS, "sampling_rate", "stride")}
            source = next((inputs[key] for key in AUDIO_KEYS if inputs.get(key) is not None), None)
        elif isinstance(inputs, str) and inputs.startswith(("http://", "https://")):
            source = _download(inputs)
        if is_file(source):
            return read_blocks(source, rate), extra
        waveform = self.feature_extractor._read(inputs, "audio", rate, resample=True)
        blocks = (waveform[start : start + BLOCK_FRAMES] for start in range(0, len(waveform), BLOCK_FRAMES))
        return blocks, extra

    def _segments(self, blocks: Iterator[np.ndarray], longest: float, overlap: float) -> Iterator[Segment]:
        """Segments of a recording, at least one; a single one if `longest` is 0. Lengths are in seconds."""
        extractor, num_samples, is_silent = self.feature_extractor, 0, True
        rate, hop_length = extractor.sampling_rate, extractor.hop_length
        if not longest:
            yield whole_segment(np.concatenate([np.zeros(0, np.float32), *blocks]), hop_length)
            return

        def counted() -> Iterator[np.ndarray]:
            nonlocal num_samples
            for block in blocks:
                num_samples += len(block)
                yield block

        def voice(waveform: np.ndarray) -> np.ndarray:
            return estimate_f0(waveform, rate, hop_length, extractor.f0_method, extractor.f0_min, extractor.f0_max)

        estimate = voice if "pitch" in extractor.feature_groups else None
        for segment in segment_blocks(counted(), rate, hop_length, longest, overlap, estimate):
            is_silent = False
            yield segment
        if is_silent:  # nothing but silence, or not a single sample
            yield Segment(np.zeros(min(num_samples, hop_length), np.float32), 0, 0, False, False)

    def _features(self, segment: Segment, extra: dict[str, Any]) -> dict[str, Any]:
        rate = self.feature_extractor.sampling_rate
        start, end = segment.start / rate, (segment.start + len(segment.waveform)) / rate
        if segment.is_speech or len(segment.waveform) < self.feature_extractor.hop_length:  # which is an error
            features = self.feature_extractor(
                segment.waveform, sampling_rate=rate, return_tensors="pt", return_attention_mask=True
            )  # in float32: the model casts all but F0
        else:  # one frame for the batch, which the model does not see
            features = {
                "input_features": torch.zeros(1, 1, self.feature_extractor.feature_size),
                "attention_mask": torch.ones(1, 1, dtype=torch.int32),
            }
        has_neighbors = segment.overlap > 0 or segment.is_shared
        context = SegmentContext(start, end, segment.overlap / rate, has_neighbors, segment.is_speech, extra)
        return {**features, "context": context}

    # From segments to tokens -----------------------------------------------------------------------------------------

    def _forward(self, model_inputs, return_timestamps=None, **generate_kwargs):
        is_batch = isinstance(model_inputs["is_last"], list)
        contexts = model_inputs["context"] if is_batch else [model_inputs["context"]]
        tokens, spans = [[] for _ in contexts], [None for _ in contexts]
        rows = [row for row, context in enumerate(contexts) if context.is_speech]
        if rows:
            features, attention_mask = model_inputs["input_features"][rows], model_inputs["attention_mask"][rows]
            if self.type == "ctc":
                found = self._best_paths(features, attention_mask)
            else:
                with_times = return_timestamps == "word" or any(context.has_neighbors for context in contexts)
                found = self._generate(features, attention_mask, with_times, generate_kwargs)
            for row, (row_tokens, row_spans) in zip(rows, found):
                tokens[row], spans[row] = row_tokens, row_spans
        outputs = {"tokens": tokens, "spans": spans, "context": contexts}
        if not is_batch:
            outputs = {key: value[0] for key, value in outputs.items()}
        return {"is_last": model_inputs["is_last"], **outputs}

    def _best_paths(self, features, attention_mask) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Tokens of each utterance and their encoder frames, first and behind the last."""
        logits = self.model(features, attention_mask=attention_mask).logits
        _refuse_nan(logits)
        paths = logits.argmax(-1).tolist()
        lengths = self.model._get_feat_extract_output_lengths(attention_mask.sum(-1)).tolist()
        for path, length in zip(paths, lengths):
            tokens, spans, frame = [], [], 0
            for token, run in groupby(path[:length]):
                start, frame = frame, frame + len(list(run))
                if token not in self.tokenizer.all_special_ids:
                    tokens.append(token)
                    spans.append((start, frame))
            yield tokens, spans

    def _generate(
        self, features, attention_mask, with_times: bool, generate_kwargs: dict
    ) -> Iterator[tuple[list[int], list[tuple[int, int]] | None]]:
        """As [`_best_paths`], by generation; without the frames unless they are asked for."""
        # Given also where the encoder has run, for an assistant model, which encodes by itself.
        options = {**self._prepare_generate_kwargs(generate_kwargs), self.model.main_input_name: features}
        options["logits_processor"] = [*(options.get("logits_processor") or []), NaNRefusal()]
        encoder_outputs = None
        if with_times:
            encoder_outputs = self.model.get_encoder()(features, attention_mask=attention_mask)
            # A copy, since generate() repeats it in place for every beam.
            options["encoder_outputs"] = type(encoder_outputs)(**encoder_outputs)
        ids = self.model.generate(attention_mask=attention_mask, **options)
        ids = ids["sequences"] if isinstance(ids, Mapping) else ids
        ids = ids[:: len(ids) // len(features)]  # the best of several (`num_return_sequences`)
        if find_cut_off(ids, self.model.generation_config).any():
            logger.warning_once(
                "A transcript reached the longest length that generate() allows and was cut off. Shorter segments"
                " (`chunk_length_s`) or a larger `max_new_tokens` keep all of it."
            )
        special = set(self.tokenizer.all_special_ids)
        texts = [[token for token in row if token not in special] for row in ids.tolist()]
        if not with_times:
            return ((tokens, None) for tokens in texts)
        lengths = self.model._get_feat_extract_output_lengths(attention_mask.sum(-1)).tolist()
        return self._align(texts, encoder_outputs, lengths)

    def _align(self, texts, encoder_outputs, lengths) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        log_probs = weights = None
        if self.model.ctc_head is not None:
            log_probs = self.model.ctc_head(encoder_outputs.last_hidden_state).float().log_softmax(-1).cpu().numpy()
        for row, (tokens, length) in enumerate(zip(texts, lengths)):
            spans = None
            if log_probs is not None:
                spans = align_by_ctc(log_probs[row, :length], tokens, self.model.config.pad_token_id)
            if spans is None:  # no CTC head, or more tokens than it has frames for
                if weights is None:
                    weights = self._cross_attention(encoder_outputs, texts)
                spans = align_by_attention(weights[row, : len(tokens) + 1, :length])
                spans = spans[:-1]  # the last stretch is that of the end of sequence
            yield tokens, [tuple(span) for span in spans.tolist()]

    def _cross_attention(self, encoder_outputs, texts: list[list[int]]) -> np.ndarray:
        """Mean attention of each token, and of the end of sequence, to the encoder's frames: `(texts, most tokens + 1,
        frames)`."""
        config = self.model.config
        rows = [torch.tensor([config.decoder_start_token_id, *tokens]) for tokens in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id)
        ids = ids.to(self.model.device)
        return mean_cross_attention(self.model, ids, encoder_outputs=encoder_outputs).cpu().numpy()

    # From tokens to a text and its times -----------------------------------------------------------------------------

    def postprocess(self, model_outputs, decoder_kwargs=None, return_timestamps=None, return_language=None):
        parts, times = self._join(model_outputs)
        text = "".join(word.text for part in parts for word in part)
        extra = model_outputs[0]["context"].extra
        result = {key: [value] for key, value in extra.items() if key not in ("text", "chunks")}
        result["text"] = text
        if return_timestamps:
            if return_timestamps is True:
                chunks = [Word("".join(word.text for word in part), *time) for part, time in zip(parts, times) if part]
            else:
                chunks = [word for part in parts for word in part]
            if return_timestamps == "word" and self.type == "ctc":
                chunks = [word._replace(text=word.text.strip()) for word in group_words(chunks)]
            result["chunks"] = list(_in_order(chunks, times[-1][1]))
        return result

    def _join(self, model_outputs) -> tuple[list[list[Word]], list[tuple[float, float]]]:
        """Words (characters with CTC) of each segment that are in the text, and its start and end in seconds."""
        parts, times = [], []
        for outputs in model_outputs:
            start, end, overlap = outputs["context"].start, outputs["context"].end, outputs["context"].overlap
            words = self._words(outputs["tokens"], outputs["spans"], start, end)
            if len(model_outputs) > 1:
                words = _strip(words)
            dropped = 0
            if overlap and parts:
                kept, dropped = join_overlap(parts[-1], words, start, start + overlap)
                parts[-1], words = parts[-1][:kept], words[dropped:]
                joint = min(max(words[0].start if words else start + overlap / 2, start), start + overlap)
                times[-1], start = (times[-1][0], joint), joint
            last = next((part for part in reversed(parts) if part), None)
            while last and words and last[-1].text[-1].isspace() and words[0].text.isspace():
                del words[0]
            if last and words and not dropped and needs_space(last[-1].text, words[0].text):
                if self.type == "ctc":
                    words.insert(0, Word(" ", words[0].start, words[0].start))
                else:
                    words[0] = words[0]._replace(text=" " + words[0].text)
            parts.append(words)
            times.append((start, end))
        return parts, times

    def _words(self, tokens: list[int], spans: list[tuple[int, int]] | None, start: float, end: float) -> list[Word]:
        """Text of a segment with its times in seconds: characters with CTC, else words, else all of it."""
        if spans is None:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            return [Word(text, start, end)] if text else []
        seconds = self._align_to / self.feature_extractor.sampling_rate  # an encoder frame
        characters = [
            Word(character, min(start + first * seconds, end), min(start + last * seconds, end))
            for character, first, last in self._characters(tokens, spans)
        ]
        return characters if self.type == "ctc" else group_words(characters)

    def _characters(self, tokens: list[int], spans: list[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
        """Each character of the text with the encoder frames of its start and end."""
        pending, text, first = [], "", 0
        for token, (start, end) in zip(tokens, spans):
            # A character may be several tokens (bytes), and a token several characters.
            first = first if pending else start
            pending.append(token)
            text = self.tokenizer.decode(pending)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield from ((character, first, end) for character in text)
                pending = []
        if pending:  # bytes that make no character
            yield from ((character, first, end) for character in text)


def _as_several(inputs) -> Iterable | None:
    """The recordings in `inputs`: a sequence, a generator or a torch data set. None if it is one recording."""
    if hasattr(inputs, "column_names"):  # of `datasets`
        names = inputs.column_names
        if isinstance(names, Mapping):
            raise ValueError(f"The data set has the splits {', '.join(names)}. Pass one of them, e.g. dataset['test'].")
        if names is not None and "audio" not in names:
            raise ValueError(f"The data set has the columns {', '.join(names)}. Pass that with audio, dataset[name].")
        inputs = inputs["audio"]
    if isinstance(inputs, torch.utils.data.Dataset):
        return inputs
    if isinstance(inputs, np.ndarray) or is_torch_tensor(inputs):
        return array_rows(inputs) if inputs.ndim == 2 else None
    if is_file(inputs) or isinstance(inputs, Mapping):
        return None
    if isinstance(inputs, Sequence):
        if len(inputs) and isinstance(inputs[0], Number):
            raise ValueError("A list holds recordings, not samples. Give samples as an array: np.asarray(samples).")
        return inputs
    return (recording for recording in inputs) if hasattr(inputs, "__iter__") else None


def _download(url: str) -> bytes:
    try:
        return httpx.get(url, follow_redirects=True).raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{url} cannot be downloaded: {error}") from error


def _count_seconds(blocks: Iterable[np.ndarray], sampling_rate: int, progress) -> Iterator[np.ndarray]:
    for block in blocks:
        progress(len(block) / sampling_rate)
        yield block


def _refuse_nan(logits: torch.Tensor) -> None:
    if logits.isnan().any():
        raise ValueError(
            "The model predicts NaN. Its weights are damaged, or it needs a wider type: load it with"
            " dtype=torch.float32."
        )


def _strip(words: list[Word]) -> list[Word]:
    """Words without white space at the ends of the text."""
    spoken = [index for index, word in enumerate(words) if not word.text.isspace()]
    if not spoken:
        return []
    words = words[spoken[0] : spoken[-1] + 1]
    words[0] = words[0]._replace(text=words[0].text.lstrip())
    words[-1] = words[-1]._replace(text=words[-1].text.rstrip())
    return words


def _in_order(chunks: list[Word], duration: float) -> Iterator[dict]:
    """Chunks as the pipeline returns them: none overlap, and all end within the audio."""
    now = 0.0
    for text, start, end in chunks:
        start = min(max(start, now), duration)
        now = min(max(end, start), duration)
        yield {"text": text, "timestamp": (round(start, 3), round(now, 3))}


__all__ = ["EchoAutomaticSpeechRecognitionPipeline"]

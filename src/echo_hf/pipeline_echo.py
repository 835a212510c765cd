"""The speech recognition pipeline for Echo: what the stock pipeline does, with five things changed for Echo models.

- Files and bytes are read with soundfile, not ffmpeg, block by block, and any sampling rate is resampled with soxr.
- Recordings of any length: they are cut at pauses, stretches of silence are left out, and the texts are joined.
- The times of segments and words, for the generating model too: its tokens are laid along the frames by its CTC head,
  or by its cross-attention if it has none.
- Decoding is greedy unless the model's or the caller's generation settings say otherwise (the stock pipeline searches
  with 5 beams and stops at 256 tokens).
- Whether the model generates text or has the CTC head alone is seen from the model, also where the library's tables of
  names do not have Echo because this file came with a checkpoint.

With any other model it is the stock pipeline.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from itertools import groupby

import numpy as np
import torch
from huggingface_hub.utils import httpx
from transformers.pipelines.automatic_speech_recognition import AutomaticSpeechRecognitionPipeline
from transformers.utils import logging

from .alignment_echo import align_by_attention
from .alignment_echo import align_by_ctc
from .feature_extraction_echo import AUDIO_KEYS
from .feature_extraction_echo import BLOCK_FRAMES
from .feature_extraction_echo import F0_GROUPS
from .feature_extraction_echo import is_file
from .generation_echo import find_cut_off
from .modeling_echo import mean_cross_attention
from .pitch_echo import estimate_f0
from .segmentation_echo import Segment
from .segmentation_echo import Word
from .segmentation_echo import group_words
from .segmentation_echo import join_overlap
from .segmentation_echo import needs_space
from .segmentation_echo import read_blocks
from .segmentation_echo import segment_blocks
from .segmentation_echo import whole_segment

logger = logging.get_logger(__name__)

# Seconds. Speech is up to some 20 characters a second, and a token may be one byte: with a plain vocabulary a segment
# of this length just fits the decoder's 448 positions.
LONGEST_SEGMENT = 20.0


class EchoAutomaticSpeechRecognitionPipeline(AutomaticSpeechRecognitionPipeline):
    """
    Speech recognition with [`EchoForConditionalGeneration`] or [`EchoForCTC`], of recordings of any length.

    Takes paths, URLs, bytes of files, arrays at the model's sampling rate, dicts with `"raw"` or `"array"` and
    `"sampling_rate"`, rows of a `datasets` audio column, and lists, generators and data sets of these. A recording that
    is silent throughout, no frame of it above -70 dB of full scale, gives an empty text without asking the model.

    Besides the stock pipeline's, these arguments, when it is made or called:

    - `chunk_length_s` (defaults to 20): a recording longer than so many seconds is cut into segments that are not, and
      pauses of a second before and behind the speech are left out; see
      [`~echo_hf.segmentation_echo.segment_blocks`]. 0: all of it goes through the model, as it is, unless it is silent
      throughout. `batch_size` segments go through the model together.
    - `stride_length_s` (defaults to a sixth of it): where there is no pause to cut at, two segments share twice so many
      seconds, or the sum of two such lengths. Their texts are joined at the words that both have.
    - `return_timestamps`: `True` for the times of segments, `"word"`, or with [`EchoForCTC`] `"char"`.
    - `progress`: called with a number of seconds whenever that much more of a recording was read.

    Gives `{"text": str}`, and with `return_timestamps` also `"chunks"`, each with `"text"` and `"timestamp"`: start and
    end in seconds. Chunks joined are the text: as Whisper's, words come with the space before them. The words of an
    [`EchoForCTC`] come without, as those of other CTC models do.

    Raises:
        `ValueError`: the audio cannot be read, is empty, not finite or shorter than a frame; or the kind of timestamps
            is not known.

    Example:

    ```python
    >>> import echo_hf
    >>> from transformers import pipeline

    >>> transcribe = pipeline("automatic-speech-recognition", model="path/to/checkpoint")  # doctest: +SKIP
    >>> transcribe("speech.flac")["text"]  # doctest: +SKIP
    >>> transcribe("lecture.mp3", return_timestamps="word", batch_size=8)["chunks"]  # doctest: +SKIP

    ```"""

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        if self._is_echo and model.can_generate():
            # generation_config alone decides.
            self._generation_defaults = {}

    @property
    def _is_echo(self) -> bool:
        return self.model.config.model_type == "echo"

    def _sanitize_parameters(
        self,
        chunk_length_s=None,
        stride_length_s=None,
        ignore_warning=None,
        return_timestamps=None,
        progress=None,
        **kwargs,
    ):
        ours = {"chunk_length_s": chunk_length_s, "stride_length_s": stride_length_s, "progress": progress}
        ours = {name: value for name, value in ours.items() if value is not None}
        if not self._is_echo:
            if self.model.config.model_type == "echo_whisper":  # which the library tells by the type "whisper" alone
                self.type = "seq2seq_whisper"
            return super()._sanitize_parameters(
                **ours, ignore_warning=ignore_warning, return_timestamps=return_timestamps, **kwargs
            )
        # The first that the library calls once it has set `type`, and it depends on it.
        if self.model.can_generate():
            self.type = "seq2seq"
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        among_generate_kwargs = forward.pop("return_timestamps", None)  # where scripts for Whisper have it
        if return_timestamps is None:
            return_timestamps = among_generate_kwargs
        if return_timestamps is not None:
            kinds = (False, True, "word") if self.type == "seq2seq" else (False, True, "word", "char")
            if return_timestamps not in kinds:
                raise ValueError(
                    f"return_timestamps={return_timestamps!r} is not known to {type(self.model).__name__}; give one of"
                    f" {', '.join(map(repr, kinds))}."
                )
            forward["return_timestamps"] = postprocess["return_timestamps"] = return_timestamps
        return {**preprocess, **ours}, forward, postprocess

    # From a recording to segments ------------------------------------------------------------------------------------

    def preprocess(self, inputs, chunk_length_s=None, stride_length_s=None, progress=None):
        if not self._is_echo:
            options = {"chunk_length_s": chunk_length_s or 0, "stride_length_s": stride_length_s}
            yield from super().preprocess(inputs, **options)
            return
        blocks, extra = self._read(inputs)
        rate, hop_length = self.feature_extractor.sampling_rate, self.feature_extractor.hop_length
        num_samples = 0

        def counted() -> Iterator[np.ndarray]:
            nonlocal num_samples
            for block in blocks:
                num_samples += len(block)
                if progress is not None:
                    progress(len(block) / rate)
                yield block

        chunk_length_s = LONGEST_SEGMENT if chunk_length_s is None else chunk_length_s
        if stride_length_s is None:
            stride_length_s = chunk_length_s / 6
        overlap = 2 * stride_length_s if isinstance(stride_length_s, (int, float)) else sum(stride_length_s)
        if chunk_length_s and "stride" not in extra:
            options = (self.feature_extractor.f0_method, self.feature_extractor.f0_min, self.feature_extractor.f0_max)
            has_f0 = any(name in self.feature_extractor.feature_groups for name in F0_GROUPS)
            voice = (lambda waveform: estimate_f0(waveform, rate, hop_length, *options)) if has_f0 else None
            segments = segment_blocks(counted(), rate, hop_length, chunk_length_s, overlap, voice)
        else:
            segments = iter([whole_segment(np.concatenate([np.zeros(0, np.float32), *counted()]), hop_length)])
        segment = next(segments, None)
        if segment is None:  # nothing but silence, however much of it, or not a single sample
            segment = Segment(np.zeros(min(num_samples, hop_length), np.float32), 0, 0, False, False)
        while segment is not None:
            following = next(segments, None)
            yield {"is_last": following is None, **self._features(segment), **extra}
            segment = following

    def _read(self, inputs) -> tuple[Iterator[np.ndarray], dict]:
        """Audio of any kind as blocks of shape `(samples,)` at the extractor's rate, and what else was in `inputs` if
        it was a dict."""
        rate = self.feature_extractor.sampling_rate
        extra = {}
        if isinstance(inputs, str) and inputs.startswith(("http://", "https://")):
            inputs = httpx.get(inputs, follow_redirects=True).raise_for_status().content
        source = inputs
        if isinstance(inputs, Mapping):
            extra = {key: value for key, value in inputs.items() if key not in (*AUDIO_KEYS, "sampling_rate")}
            is_array = inputs.get("raw") is not None or inputs.get("array") is not None
            if is_array and inputs.get("sampling_rate") is None:
                raise ValueError("A dict with audio needs its 'sampling_rate' (in Hz) besides 'raw' or 'array'.")
            if extra.get("stride") is None:
                extra.pop("stride", None)
            elif self.type == "seq2seq":
                raise ValueError("A stride is only usable with EchoForCTC. Leave it out: pauses decide.")
            else:
                scale = rate / (inputs.get("sampling_rate") or rate) / self._align_to
                extra["stride"] = tuple(round(samples * scale) for samples in extra["stride"])  # encoder frames
            source = next((inputs[key] for key in AUDIO_KEYS if inputs.get(key) is not None), None)
        if is_file(source):
            return read_blocks(source, rate), extra
        waveform = self.feature_extractor._read(inputs, "audio", rate, resample=True)
        return (waveform[start : start + BLOCK_FRAMES] for start in range(0, len(waveform), BLOCK_FRAMES)), extra

    def _features(self, segment: Segment) -> dict:
        """What the model is given of a segment, and what is remembered of it: its times in seconds (start, end, and how
        much of it the segment before has too), and whether the texts around it overlap."""
        rate = self.feature_extractor.sampling_rate
        if segment.is_speech or len(segment.waveform) < self.feature_extractor.hop_length:  # which is an error
            features = self.feature_extractor(
                segment.waveform, sampling_rate=rate, return_tensors="pt", return_attention_mask=True
            )  # in float32: the model casts all but F0, of which half precision would keep a hertz or two
        else:  # a frame, so that it can be in a batch; the model does not get to see it
            features = {
                "input_features": torch.zeros(1, 1, self.feature_extractor.feature_size),
                "attention_mask": torch.ones(1, 1, dtype=torch.int32),
            }
        times = (segment.start / rate, (segment.start + len(segment.waveform)) / rate, segment.overlap / rate)
        overlaps = segment.overlap > 0 or segment.is_shared
        return {**features, "segment": times, "overlaps": overlaps, "is_speech": segment.is_speech}

    # From segments to tokens -----------------------------------------------------------------------------------------

    def _forward(self, model_inputs, return_timestamps=None, **generate_kwargs):
        if not self._is_echo:
            if return_timestamps is not None:
                generate_kwargs["return_timestamps"] = return_timestamps
            return super()._forward(model_inputs, **generate_kwargs)
        is_batch = isinstance(model_inputs["is_last"], list)
        if not is_batch:
            tensors = ("input_features", "attention_mask")
            model_inputs = {key: value if key in tensors else [value] for key, value in model_inputs.items()}
        features, attention_mask = model_inputs.pop("input_features"), model_inputs.pop("attention_mask")
        is_speech, overlaps = model_inputs.pop("is_speech"), model_inputs.pop("overlaps")
        strides = model_inputs.pop("stride", None)
        tokens, spans = [[] for _ in is_speech], [None for _ in is_speech]
        rows = [row for row, speech in enumerate(is_speech) if speech]
        if rows:
            if self.type == "ctc":
                strides = [strides[row] for row in rows] if strides else [(0, 0)] * len(rows)
                heard = self._best_paths(features[rows], attention_mask[rows], strides)
            else:
                with_times = return_timestamps == "word" or any(overlaps)
                heard = self._generate(features[rows], attention_mask[rows], with_times, generate_kwargs)
            for row, found in zip(rows, heard):
                tokens[row], spans[row] = found
        outputs = {"is_last": model_inputs.pop("is_last"), "tokens": tokens, "spans": spans, **model_inputs}
        return outputs if is_batch else {key: value[0] for key, value in outputs.items()}

    def _best_paths(self, features, attention_mask, strides) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Tokens of each utterance and their encoder frames, first and behind the last."""
        paths = self.model(features, attention_mask=attention_mask).logits.argmax(-1).tolist()
        lengths = self.model._get_feat_extract_output_lengths(attention_mask.sum(-1)).tolist()
        for path, length, (left, right) in zip(paths, lengths, strides):
            tokens, spans, frame = [], [], 0
            for token, run in groupby(path[left : max(left, length - right)]):
                start, frame = frame, frame + len(list(run))
                if token not in self.tokenizer.all_special_ids:
                    tokens.append(token)
                    spans.append((start, frame))
            yield tokens, spans

    def _generate(
        self, features, attention_mask, with_times: bool, generate_kwargs: dict
    ) -> Iterator[tuple[list[int], list[tuple[int, int]] | None]]:
        """The same by free-running generation; without the frames unless they are asked for."""
        # The features also where the encoder has heard them, for an assistant that hears by itself.
        options = {**self._prepare_generate_kwargs(generate_kwargs), self.model.main_input_name: features}
        if with_times:
            encoder_outputs = self.model.get_encoder()(features, attention_mask=attention_mask)
            # A copy: generate() repeats it in place for every beam.
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
            yield from ((tokens, None) for tokens in texts)
            return
        lengths = self.model._get_feat_extract_output_lengths(attention_mask.sum(-1)).tolist()
        log_probs = None
        if self.model.ctc_head is not None:
            log_probs = self.model.ctc_head(encoder_outputs.last_hidden_state).float().log_softmax(-1).cpu().numpy()
        weights = None
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
        """Mean attention over heads and layers of each token, and of the end of sequence, to the encoder's frames when
        it was predicted: `(texts, most tokens + 1, frames)`."""
        config = self.model.config
        rows = [torch.tensor([config.decoder_start_token_id, *tokens]) for tokens in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id)
        ids = ids.to(self.model.device)
        return mean_cross_attention(self.model, ids, encoder_outputs=encoder_outputs).cpu().numpy()

    # From tokens to a text and its times -----------------------------------------------------------------------------

    def postprocess(self, model_outputs, decoder_kwargs=None, return_timestamps=None, return_language=None):
        if not self._is_echo:
            return super().postprocess(model_outputs, decoder_kwargs, return_timestamps, return_language)
        parts, times = [], []  # of each segment: its words, or characters with CTC; its start and end
        for outputs in model_outputs:
            start, end, overlap = outputs["segment"]
            words = self._words(outputs["tokens"], outputs["spans"], start, end)
            if len(model_outputs) > 1:
                words = _strip(words)
            kept = dropped = 0
            if overlap and parts:
                kept, dropped = join_overlap(parts[-1], words, start, start + overlap)
                parts[-1], words = parts[-1][:kept], words[dropped:]
                joint = min(max(words[0].start if words else start + overlap / 2, start), start + overlap)
                times[-1], start = (times[-1][0], joint), joint
            said = next((part for part in reversed(parts) if part), None)
            while said and words and said[-1].text[-1].isspace() and words[0].text.isspace():
                del words[0]
            if said and words and not dropped and needs_space(said[-1].text, words[0].text):
                if self.type == "ctc":
                    words.insert(0, Word(" ", words[0].start, words[0].start))
                else:
                    words[0] = words[0]._replace(text=" " + words[0].text)
            parts.append(words)
            times.append((start, end))
        known = ("is_last", "tokens", "spans", "segment")
        extra = {key: [value] for key, value in model_outputs[0].items() if key not in known}
        result = {"text": "".join(word.text for part in parts for word in part)}
        if return_timestamps:
            if return_timestamps is True:
                chunks = [Word("".join(word.text for word in part), *time) for part, time in zip(parts, times) if part]
            else:
                chunks = [word for part in parts for word in part]
            if return_timestamps == "word" and self.type == "ctc":
                chunks = [word._replace(text=word.text.strip()) for word in group_words(chunks)]
            result["chunks"] = list(_in_order(chunks, times[-1][1]))
        return {**result, **extra}

    def _words(self, tokens: list[int], spans: list[tuple[int, int]] | None, start: float, end: float) -> list[Word]:
        """What was said in a segment with its times in seconds: characters with CTC, else words, else all of it."""
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
        """Each character of the tokens' text with the encoder frames of its start and end."""
        pending, text, first = [], "", 0
        for token, (start, end) in zip(tokens, spans):
            # A character may be several tokens (bytes), and a token several characters, all with the token's time.
            first = first if pending else start
            pending.append(token)
            text = self.tokenizer.decode(pending)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield from ((character, first, end) for character in text)
                pending = []
        if pending:  # bytes that make no character
            yield from ((character, first, end) for character in text)


def _strip(words: list[Word]) -> list[Word]:
    """Words without white space before the first and behind the last."""
    spoken = [index for index, word in enumerate(words) if not word.text.isspace()]
    if not spoken:
        return []
    words = words[spoken[0] : spoken[-1] + 1]
    words[0] = words[0]._replace(text=words[0].text.lstrip())
    words[-1] = words[-1]._replace(text=words[-1].text.rstrip())
    return words


def _in_order(chunks: list[Word], duration: float) -> Iterator[dict]:
    """Chunks as the pipeline gives them; none begins before the one before it ends, and all end within the audio."""
    now = 0.0
    for text, start, end in chunks:
        start = min(max(start, now), duration)
        now = min(max(end, start), duration)
        yield {"text": text, "timestamp": (round(start, 3), round(now, 3))}


__all__ = ["EchoAutomaticSpeechRecognitionPipeline"]

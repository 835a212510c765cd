"""Long recordings in pieces: audio read in blocks, cut at pauses, and the transcripts joined.

No function holds a whole recording. `read_blocks` reads a file at the wanted rate, `segment_blocks` cuts a stream of
blocks into segments, and `join_overlap` joins two transcripts that overlap. All is numpy; soundfile and soxr are
imported where needed."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .feature_extraction_echo import BLOCK_FRAMES, MAX_CHANNELS, import_soxr, open_audio, to_mono

SILENCE_LEVEL = -70.0  # dB under a full-scale square wave; no speech is fainter
NOISE_QUANTILE, SPEECH_QUANTILE = 0.1, 0.95  # of the levels of a stretch: background and speech
PAUSE_MARGIN, PAUSE_DEPTH = 10.0, 12.0  # dB above the background, and under speech, within which a frame is quiet
SHORTEST_PAUSE = 0.2  # seconds; closures of stops are shorter
LONG_PAUSE = 1.0  # seconds; always ends a segment
KEPT_PAUSE = 0.25  # seconds of a pause that stay with the speech beside it, for faint sounds
VOICED_RUN = 3  # frames of F0 that count as voice; fewer are errors of the tracker in noise
OUTER_VOICED_RUN = 10  # the same at the ends; white noise has had seven in a row
F0_CONTEXT = 0.1  # seconds of audio on either side of a stretch whose F0 is estimated

SAME_WORD = 0.6  # seconds between the times that two segments give to one word, at most


class Segment(NamedTuple):
    """A stretch of a recording."""

    waveform: np.ndarray  # (samples,), float32
    start: int  # its first sample in the recording
    overlap: int  # samples at its begin that the segment before ends with; 0 after a pause
    is_shared: bool  # whether the next segment begins with its end
    is_speech: bool  # False if all of it is silence


# Reading -------------------------------------------------------------------------------------------------------------


def read_blocks(source, sampling_rate: int) -> Iterator[np.ndarray]:
    """One channel of an audio file at any sampling rate (Hz), in float32 blocks of shape `(samples,)`. Channels are
    averaged.

    Args:
        source: a path (`str` or `os.PathLike`), the bytes of a file, or a file opened in binary mode.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the source is empty, is not audio that can be read, has more than 8 channels, or holds NaN or
            infinite samples.
        `ImportError`: soundfile, or soxr for another rate, is not installed.
    """
    with open_audio(source) as (file, name):
        if file.channels > MAX_CHANNELS:  # before a block of all of them is read
            raise ValueError(f"{name} has {file.channels} channels; up to {MAX_CHANNELS} are averaged. Give one.")
        stream = None
        if file.samplerate != sampling_rate:
            stream = import_soxr().ResampleStream(file.samplerate, sampling_rate, 1, dtype="float32", quality="HQ")
        is_last = False
        while not is_last:
            block = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
            is_last = not len(block)
            block = np.zeros(0, np.float32) if is_last else to_mono(block, name, channel_axis=1)
            if stream is not None:
                block = stream.resample_chunk(block, last=is_last)
            if len(block):
                yield to_mono(block, name)  # checked again, since samples near the largest of float32 overshoot


# Cutting -------------------------------------------------------------------------------------------------------------


def frame_levels(waveform: np.ndarray, frame: int) -> np.ndarray:
    """Level of each frame of `frame` samples in dB, 0 at full scale, -120 at least: `(samples,)` to
    `(samples // frame,)`, float64."""
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame).astype(np.float64)
    frames -= frames.mean(axis=1, keepdims=True)  # some recorders add a constant offset
    return 10.0 * np.log10(np.maximum(np.einsum("ij,ij->i", frames, frames) / frame, 1e-12))


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """First index and the index behind the last of each run of True in `mask`, shape `(frames,)`.

    Examples:

    >>> runs(np.array([True, True, False, True]))
    [(0, 2), (3, 4)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def segment_blocks(
    blocks: Iterable[np.ndarray],
    sampling_rate: int,
    frame: int,
    longest: float,
    overlap: float,
    estimate_f0: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Iterator[Segment]:
    """Cuts a recording at its pauses.

    A recording of up to `longest` seconds is one segment without the pauses of a second and more at its ends. A longer
    one is cut at every pause of a second; where none comes within `longest` seconds, at the longest pause in the second
    half of them, else in the first half. A quarter of a second of a pause stays on either side. Without any pause the
    next segment begins `overlap` seconds before the cut, so that each word is whole in one of the two.

    A pause is a stretch of 0.2 s and more that is unvoiced, at most 10 dB above the background (the lowest tenth of the
    levels around) and at least 12 dB under speech (the highest twentieth of the levels so far). F0 is estimated only
    where the level allows a pause, and not under -70 dB, where there is no speech.

    Args:
        blocks: float32 arrays of shape `(samples,)`, of any lengths.
        sampling_rate: Hz.
        frame: samples of a frame; segments begin at whole frames.
        longest, overlap: seconds.
        estimate_f0 (*optional*): gives F0 of a waveform, one value every `frame` samples, 0 = unvoiced.

    Returns:
        [`Segment`]s in order; none for a recording without samples. Memory holds `longest` seconds and a block.

    Raises:
        `ValueError`: the lengths cannot work.
    """
    frame_rate = sampling_rate / frame
    limit = shared = 0  # frames
    if math.isfinite(longest) and math.isfinite(overlap):
        limit, shared = round(longest * frame_rate), round(overlap * frame_rate)
    if limit < 1 or not 0 <= shared < limit:
        raise ValueError(
            f"Segments of {longest:g} s that overlap by {overlap:g} s are not possible: they must be at least"
            f" {frame / sampling_rate:g} s long, and longer than their overlap."
        )
    cutter = _Cutter(sampling_rate, frame, estimate_f0)
    source, offset, buffer = iter(blocks), 0, np.zeros(0, np.float32)
    shared_before = 0  # frames at the begin of the buffer that the last segment has too
    while True:
        pieces, length = [buffer], len(buffer)
        while length <= limit * frame and (block := next(source, None)) is not None:
            pieces.append(block)
            length += len(block)
        buffer = np.concatenate(pieces) if len(pieces) > 1 else buffer
        ended = len(buffer) <= limit * frame
        if ended and offset == 0:
            if len(buffer):
                whole = whole_segment(buffer, frame)
                first, stop = cutter.ends(buffer) if whole.is_speech else (0, len(buffer))
                yield whole._replace(waveform=buffer[first:stop], start=first)
            return
        if len(buffer) < frame:
            return
        cut = cutter.cut(buffer[: limit * frame], shared_before, shared, ended)
        if cut.stop > cut.first:
            # The end of a recording keeps the samples behind its last whole frame.
            end = len(buffer) if ended and cut.stop == cut.advance == len(buffer) // frame else cut.stop * frame
            common = max(0, shared_before - cut.first) * frame
            start = offset + cut.first * frame
            yield Segment(buffer[cut.first * frame : end].copy(), start, common, cut.shared > 0, True)
        shared_before = cut.shared
        buffer, offset = buffer[cut.advance * frame :], offset + cut.advance * frame


def whole_segment(waveform: np.ndarray, frame: int) -> Segment:
    """A recording `(samples,)` as one segment; speech if a frame is above `SILENCE_LEVEL`."""
    silent = len(waveform) >= frame and frame_levels(waveform, frame).max() <= SILENCE_LEVEL
    return Segment(waveform, 0, 0, False, not silent)


class Cut(NamedTuple):
    """Where a segment lies in the known part of a recording, in frames."""

    first: int
    stop: int  # behind its last frame; `first` if there is no speech, and no segment
    advance: int  # where the rest of the recording begins
    shared: int  # frames of the rest that this segment has too


class _Cutter:
    """Finds the next segment in the known part of a recording, and remembers how loud its speech is."""

    def __init__(self, sampling_rate: int, frame: int, estimate_f0: Callable | None):
        self.frame = frame
        self.estimate_f0 = estimate_f0
        self.context = round(F0_CONTEXT * sampling_rate / frame)  # these in frames
        self.shortest = max(1, round(SHORTEST_PAUSE * sampling_rate / frame))
        self.long = round(LONG_PAUSE * sampling_rate / frame)
        self.kept = round(KEPT_PAUSE * sampling_rate / frame)
        self.speech_level = -np.inf  # dB

    def ends(self, waveform: np.ndarray) -> tuple[int, int]:
        """First sample, and the sample behind the last, of a recording without the long pauses at its ends."""
        levels = frame_levels(waveform, self.frame)
        num_frames = len(levels)
        first, stop = 0, len(waveform)
        outer = np.zeros(num_frames, dtype=bool)
        for start, end in runs(self._quiet(levels)) if num_frames else []:
            outer[start:end] = end - start >= self.long and (start == 0 or end == num_frames)
        for start, end in self._pauses(waveform, levels, outer, OUTER_VOICED_RUN):
            if end - start >= self.long and start == 0:
                first = (end - self.kept) * self.frame
            elif end - start >= self.long and end == num_frames:
                stop = (start + self.kept) * self.frame
        return first, stop

    def _quiet(self, levels: np.ndarray) -> np.ndarray:
        background, speech = np.quantile(levels, (NOISE_QUANTILE, SPEECH_QUANTILE))
        self.speech_level = max(self.speech_level, speech)
        highest = min(background + PAUSE_MARGIN, self.speech_level - PAUSE_DEPTH)
        return levels <= max(highest, SILENCE_LEVEL)

    def cut(self, waveform: np.ndarray, shared_before: int, shared: int, ended: bool) -> Cut:
        """The next segment of a recording whose known part, `(samples,)`, is as long as the longest segment unless it
        has `ended`. It begins with `shared_before` frames of the last segment; without a pause `shared` frames are
        shared next."""
        levels = frame_levels(waveform, self.frame)
        first, pauses = self._candidate_pauses(waveform, levels, shared_before, ended)
        return self._choose_cut(first, pauses, len(levels), shared_before, shared, ended)

    def _candidate_pauses(
        self, waveform: np.ndarray, levels: np.ndarray, shared_before: int, ended: bool
    ) -> tuple[int, list[tuple[int, int]]]:
        """First frame of the segment, the number of frames if there is no speech, and the pauses at which it may end,
        up to the first at which it has to."""
        first, pauses = 0, []
        for start, stop in self._pauses(waveform, levels, self._quiet(levels)):
            if start == 0:
                first = stop if stop == len(levels) else max(0, stop - self.kept)
            elif start >= max(first + 1, shared_before):  # a cut in the overlap would repeat its words
                pauses.append((start, stop))
                if self._ends_segment(start, stop, len(levels), ended):
                    break
        return first, pauses

    def _ends_segment(self, start: int, stop: int, num_frames: int, ended: bool) -> bool:
        return stop - start >= self.long or (ended and stop == num_frames)

    def _choose_cut(
        self,
        first: int,
        pauses: list[tuple[int, int]],
        num_frames: int,
        shared_before: int,
        shared: int,
        ended: bool,
    ) -> Cut:
        if first == num_frames:  # no speech; the end of the silence may belong to the next segment
            return Cut(0, 0, num_frames - (0 if ended else min(self.kept, num_frames - 1)), 0)
        if not pauses or not self._ends_segment(*pauses[-1], num_frames, ended):
            if ended:
                return Cut(first, num_frames, num_frames, 0)
            if first:  # without the silence more of the recording fits in
                return Cut(0, 0, first, max(0, shared_before - first))
            if not pauses:
                return Cut(first, num_frames, num_frames - shared, shared)
            late = [(start, stop) for start, stop in pauses if start + stop >= num_frames]
            pauses = [max(late or pauses, key=lambda pause: pause[1] - pause[0])]
        start, stop = pauses[-1]
        advance = stop if ended and stop == num_frames else max(start, stop - self.kept)
        return Cut(first, min(start + self.kept, stop), advance, 0)

    def _pauses(
        self, waveform: np.ndarray, levels: np.ndarray, quiet: np.ndarray, voiced_run: int = VOICED_RUN
    ) -> Iterator[tuple[int, int]]:
        """Quiet and unvoiced stretches of frames that are long enough, or at the begin. Fewer than `voiced_run` voiced
        frames in a row do not count."""
        for start, stop in runs(quiet):
            if stop - start < self.shortest and start > 0:
                continue
            unvoiced = np.ones(stop - start, dtype=bool)
            if self.estimate_f0 is not None and levels[start:stop].max() > SILENCE_LEVEL:
                before = min(start, self.context)
                f0 = self.estimate_f0(waveform[(start - before) * self.frame : (stop + self.context) * self.frame])
                for first, last in runs(np.asarray(f0)[before : before + stop - start] > 0):
                    unvoiced[first:last] = last - first < voiced_run
            for first, last in runs(unvoiced):
                if last - first >= self.shortest or start + first == 0:
                    yield start + first, start + last


# Joining -------------------------------------------------------------------------------------------------------------

# Scripts without spaces between words, in which a character counts as a word, as in Whisper.
UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
WORD = re.compile(rf"\s*(?:[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+)(?:\s+\Z)?")
# Their punctuation has no spaces either.
UNSPACED_CHARACTER = re.compile(rf"[{UNSPACED}\u3001-\u303f\uff01-\uff65]")


class Word(NamedTuple):
    """A recognized word or character, and its times in seconds."""

    text: str  # with the white space before it, so that texts joined give the whole text
    start: float
    end: float

    @property
    def key(self) -> str:
        """What is compared: letters and digits without case, or the text if it has neither."""
        return "".join(filter(str.isalnum, self.text.casefold())) or self.text.strip()

    @property
    def middle(self) -> float:
        return (self.start + self.end) / 2


def needs_space(left: str, right: str) -> bool:
    """Whether two texts, neither empty, need a space between them.

    Examples:

    >>> needs_space("good", "day"), needs_space("你", "好"), needs_space("你好，", "我")
    (True, False, False)"""
    if left[-1].isspace() or right[0].isspace():
        return False
    return not (UNSPACED_CHARACTER.match(left[-1]) and UNSPACED_CHARACTER.match(right[0]))


def group_words(characters: Sequence[Word]) -> list[Word]:
    """Groups characters into words. White space goes with the word behind it, at the end with the word before it; a
    text of white space has no words."""
    text = "".join(character.text for character in characters)
    words = []
    for match in WORD.finditer(text):
        spoken = [character for character in characters[match.start() : match.end()] if not character.text.isspace()]
        words.append(Word(match.group(), spoken[0].start, spoken[-1].end))
    return words


def join_overlap(left: Sequence[Word], right: Sequence[Word], start: float, end: float) -> tuple[int, int]:
    """Where to go from one transcript to the next when both cover the time from `start` to `end` (seconds).

    Words at the edges of a segment are cut. So the longest run of common words, each weighted by how close its two
    times are, joins the texts in its middle; the times keep "no no no" three words. Without a common word, the texts
    are joined at the time that is farthest from the middle of any word.

    Returns:
        `int`: how many words of `left` to keep, and `int`: how many of `right` to leave out.
    """
    slack = SAME_WORD
    a = next((i for i, word in enumerate(left) if word.end > start - slack), len(left))
    b = next((i for i, word in enumerate(right) if word.start >= end + slack), len(right))
    best, joint = (0.0, 0), None
    ending: dict[tuple[int, int], tuple[float, int]] = {}  # weight and words of the run that ends with these two words
    for i in range(a, len(left)):
        for j in range(b):
            apart = abs(left[i].middle - right[j].middle)
            if apart < slack and left[i].key == right[j].key:
                weight, count = ending.get((i - 1, j - 1), (0.0, 0))
                ending[i, j] = weight + 1.0 - apart / slack, count + 1
                if ending[i, j] > best:
                    best, joint = ending[i, j], (i, j)
    if joint is not None:
        back = best[1] // 2  # words of the run that are taken from the right
        return joint[0] + 1 - back, joint[1] + 1 - back
    middles = np.array([word.middle for word in (*left[a:], *right[:b])])
    times = np.linspace(start, end, 201)
    # The ends of the stretch count as words, since segments end there.
    distance = np.minimum(times - start, end - times)
    if len(middles):
        distance = np.minimum(distance, np.abs(times[:, None] - middles).min(axis=1))
    cut = times[np.argmax(distance)]
    return sum(word.middle < cut for word in left), sum(word.middle < cut for word in right)

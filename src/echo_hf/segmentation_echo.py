"""Long recordings in pieces: audio read block by block, cut where nobody speaks, and what was heard put together again.

Nothing here holds a whole recording. `read_blocks` gives a file in blocks at the wanted rate, `segment_blocks` cuts any
stream of blocks into segments of at most a given length, and `join_overlap` finds where two transcripts meet that both
cover the end of one segment and the begin of the next. All is numpy; soundfile and soxr are imported where needed.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .feature_extraction_echo import BLOCK_FRAMES, MAX_CHANNELS, open_audio, to_mono

SILENCE_LEVEL = -70.0  # dB under a full-scale square wave; no frame louder than this is speech
NOISE_QUANTILE, SPEECH_QUANTILE = 0.1, 0.95  # of the levels of a stretch of audio: its background, and its speech
PAUSE_MARGIN, PAUSE_DEPTH = 10.0, 12.0  # dB above the background, and under speech, within which a frame is quiet
SHORTEST_PAUSE = 0.2  # seconds; closures of stops are shorter
LONG_PAUSE = 1.0  # seconds; a pause as long as this always ends a segment, and is left out at the ends of a recording
KEPT_PAUSE = 0.25  # seconds of a pause that stay with the speech beside it: faint sounds begin and end words
VOICED_RUN = 3  # frames of F0 that count as voice; fewer are errors of the tracker in noise
OUTER_VOICED_RUN = 10  # the same in a second of quiet at an end, where seven in a row have been seen in white noise
F0_CONTEXT = 0.1  # seconds of audio on either side of a stretch whose F0 is asked

SAME_WORD = 0.6  # seconds between the times that two segments give to one word, at most


class Segment(NamedTuple):
    """
    A stretch of a recording.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): float32.
        start (`int`): sample of the recording it begins with.
        overlap (`int`): samples at its begin that the segment before ends with; 0 after a pause.
        is_shared (`bool`): whether the next segment begins with its end.
        is_speech (`bool`): False if all of it is silence.
    """

    waveform: np.ndarray
    start: int
    overlap: int
    is_shared: bool
    is_speech: bool


# Reading -------------------------------------------------------------------------------------------------------------


def read_blocks(source, sampling_rate: int) -> Iterator[np.ndarray]:
    """
    One channel of an audio file, a block at a time, at any sampling rate. Memory does not grow with the file, nor with
    what its header claims.

    Args:
        source: a path (`str` or `os.PathLike`), the bytes of a file, or a file opened in binary mode.
        sampling_rate: of the blocks, in Hz.

    Returns:
        float32 blocks of shape `(samples,)`. Channels are averaged. Together they are what reading and resampling the
        whole file at once would give.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the source is empty, is not audio that can be read, claims what no audio has, or holds NaN or
            infinite samples; the message names it and the remedy.
        `ImportError`: soundfile, or soxr for another rate, is not installed.
    """
    with open_audio(source) as (file, name):
        if file.channels > MAX_CHANNELS:
            raise ValueError(f"{name} has {file.channels} channels; up to {MAX_CHANNELS} are averaged. Give one.")
        yield from _resampled(_mono_blocks(file, name), file.samplerate, sampling_rate, name)


def _mono_blocks(file, name: str) -> Iterator[np.ndarray]:
    while len(block := file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
        # Averaged here: `to_mono` would take the few samples of a last block for channels.
        yield to_mono(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float64), name)


def _resampled(blocks: Iterator[np.ndarray], rate: int, target_rate: int, name: str) -> Iterator[np.ndarray]:
    if rate == target_rate:
        yield from blocks
        return
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"Resampling audio needs soxr ({error}): `pip install soxr`.") from error
    stream = soxr.ResampleStream(rate, target_rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield _finite(stream.resample_chunk(block), name)
    yield _finite(stream.resample_chunk(np.zeros(0, np.float32), last=True), name)


def _finite(block: np.ndarray, name: str) -> np.ndarray:
    # Samples near the largest number of float32 pass the check before resampling and overshoot in it.
    return to_mono(block, name) if len(block) else block


# Cutting -------------------------------------------------------------------------------------------------------------


def frame_levels(waveform: np.ndarray, frame: int) -> np.ndarray:
    """Level of each frame of `frame` samples: its mean power around its mean in dB, 0 at full scale, -120 at least.
    `(samples,)` to `(samples // frame,)`, float64; samples behind the last whole frame are left out."""
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame).astype(np.float64)
    # A constant offset, which many cheap recorders add, is no sound.
    frames -= frames.mean(axis=1, keepdims=True)
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
    """
    Cuts a recording at its pauses.

    A recording of up to `longest` seconds is one segment; pauses of a second and more before and behind its speech are
    left out, and otherwise it is as it is. A longer one is cut at every pause of a second, and where none comes within
    `longest` seconds, at the longest pause in the second half of them, else in the first half. Of a pause, a quarter of
    a second stays on either side (both may keep the same), and the rest is in no segment.
    Where there is no pause at all, the cut is made anyway, and the next segment begins `overlap` seconds earlier, so
    that each word is whole in one of the two.

    A pause is a stretch of 0.2 s and more that is unvoiced, at most 10 dB above the background, the lowest tenth of
    the levels around, and at least 12 dB under speech, the highest twentieth of the levels so far. Energy is looked at
    first; F0 is estimated only where energy says that there may be a pause, and not at all under -70 dB, where there is
    no speech.

    Args:
        blocks: float32 arrays of shape `(samples,)`, of any lengths.
        sampling_rate: Hz.
        frame: samples a frame; segments begin at whole frames.
        longest: of a segment, in seconds.
        overlap: of two segments where there is no pause, in seconds; less than `longest`.
        estimate_f0 (*optional*): gives F0 of a waveform, one value every `frame` samples, 0 = unvoiced. Energy alone
            decides when not given.

    Returns:
        [`Segment`]s in the order of time. None for a recording without samples. Memory holds `longest` seconds and a
        block, whatever the recording's length.

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
    shared_before = 0  # frames at the begin of the buffer that the last segment ended with
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
    """A recording that is not cut, `(samples,)`; speech unless no frame of so many samples is above `SILENCE_LEVEL`."""
    silent = len(waveform) >= frame and frame_levels(waveform, frame).max() <= SILENCE_LEVEL
    return Segment(waveform, 0, 0, False, not silent)


class Cut(NamedTuple):
    """
    Where a segment lies in what is known of a recording, in frames.

    Args:
        first (`int`): its first frame.
        stop (`int`): the frame behind its last; `first` where there is no speech, and then there is no segment.
        advance (`int`): the frame at which the rest of the recording begins.
        shared (`int`): frames of the rest that this segment has too.
    """

    first: int
    stop: int
    advance: int
    shared: int


class _Cutter:
    """Finds the next segment in what is known of a recording, and keeps what it has learned of its loudness."""

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
        """Whether each frame's level is that of a pause."""
        background, speech = np.quantile(levels, (NOISE_QUANTILE, SPEECH_QUANTILE))
        self.speech_level = max(self.speech_level, speech)
        highest = min(background + PAUSE_MARGIN, self.speech_level - PAUSE_DEPTH)
        return levels <= max(highest, SILENCE_LEVEL)

    def cut(self, waveform: np.ndarray, shared_before: int, shared: int, ended: bool) -> Cut:
        """
        The next segment of a recording.

        Args:
            waveform: what is known of it, shape `(samples,)`; as long as the longest segment unless it has ended.
            shared_before: frames at its begin that the last segment ended with.
            shared: frames that two segments share where there is no pause.
            ended: whether the recording ends with it.
        """
        levels = frame_levels(waveform, self.frame)
        first, pauses = self._candidate_pauses(waveform, levels, shared_before, ended)
        return self._choose_cut(first, pauses, len(levels), shared_before, shared, ended)

    def _candidate_pauses(
        self, waveform: np.ndarray, levels: np.ndarray, shared_before: int, ended: bool
    ) -> tuple[int, list[tuple[int, int]]]:
        """First frame of the segment, which is the number of frames if there is no speech, and the pauses at which it
        may end, up to the first at which it has to."""
        first, pauses = 0, []
        for start, stop in self._pauses(waveform, levels, self._quiet(levels)):
            if start == 0:
                first = stop if stop == len(levels) else max(0, stop - self.kept)
            elif start >= max(first + 1, shared_before):  # a cut within the overlap would repeat its words
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
        if first == num_frames:  # no speech; what is kept of the silence may belong to the next segment
            return Cut(0, 0, num_frames - (0 if ended else min(self.kept, num_frames - 1)), 0)
        if not pauses or not self._ends_segment(*pauses[-1], num_frames, ended):
            if ended:
                return Cut(first, num_frames, num_frames, 0)
            if first:  # more of the recording fits in once the silence is gone
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
        """Quiet and unvoiced stretches of frames that are long enough, or at the begin. F0 is estimated stretch by
        stretch as they are asked for; fewer than `voiced_run` frames of it are none."""
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

# Scripts that put no spaces between words; there a character counts as a word, as in Whisper.
UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
WORD = re.compile(rf"\s*(?:[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+)(?:\s+\Z)?")
# Their punctuation too stands without spaces, though it is no word.
UNSPACED_CHARACTER = re.compile(rf"[{UNSPACED}\u3001-\u303f\uff01-\uff65]")


class Word(NamedTuple):
    """
    A word or a character that was heard.

    Args:
        text (`str`): with the white space before it, so that texts joined give the whole text.
        start (`float`): seconds.
        end (`float`): seconds.
    """

    text: str
    start: float
    end: float

    @property
    def key(self) -> str:
        """What is compared: neither case nor punctuation, unless there is nothing else."""
        return "".join(filter(str.isalnum, self.text.casefold())) or self.text.strip()

    @property
    def middle(self) -> float:
        return (self.start + self.end) / 2


def needs_space(left: str, right: str) -> bool:
    """Whether two texts, neither empty, need a space between them.

    Examples:

    >>> needs_space("good", "day"), needs_space("你", "好"), needs_space("你好，", "我")
    (True, False, False)
    """
    if left[-1].isspace() or right[0].isspace():
        return False
    return not (UNSPACED_CHARACTER.match(left[-1]) and UNSPACED_CHARACTER.match(right[0]))


def group_words(characters: Sequence[Word]) -> list[Word]:
    """Words of characters and their times. White space goes with the word behind it, at the end with the word before
    it; a text of white space alone has no words."""
    text = "".join(character.text for character in characters)
    words = []
    for match in WORD.finditer(text):
        spoken = [character for character in characters[match.start() : match.end()] if not character.text.isspace()]
        words.append(Word(match.group(), spoken[0].start, spoken[-1].end))
    return words


def join_overlap(left: Sequence[Word], right: Sequence[Word], start: float, end: float) -> tuple[int, int]:
    """
    Where to go over from one transcript to the next, when both cover the same stretch of time.

    At the edges of a segment words are cut, in between they should be the same. So the longest run of words that both
    have, a word counting the less the farther apart its two times are, joins them: the left text up to the middle of
    the run, the right text from there. The times keep "no no no" three words. Without a common word, the texts are
    joined where both have the least to say: at the time that is farthest from the middle of any word.

    Args:
        left, right: words of the two segments in their order.
        start, end: what both cover, in seconds.

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
    # To the ends of the stretch it is far from words only in seeming: they are where segments end.
    distance = np.minimum(times - start, end - times)
    if len(middles):
        distance = np.minimum(distance, np.abs(times[:, None] - middles).min(axis=1))
    cut = times[np.argmax(distance)]
    return sum(word.middle < cut for word in left), sum(word.middle < cut for word in right)

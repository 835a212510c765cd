"""Recordings are cut where nobody speaks, in bounded memory, and what both sides of a cut heard is joined once."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
import soundfile
import soxr

from conftest import SAMPLING_RATE, voice
from echo_hf import segmentation_echo
from echo_hf.pitch_echo import estimate_f0
from echo_hf.segmentation_echo import (
    KEPT_PAUSE,
    Word,
    frame_levels,
    group_words,
    join_overlap,
    needs_space,
    read_blocks,
    segment_blocks,
)

FRAME = 160
KEPT = round(KEPT_PAUSE * SAMPLING_RATE)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLING_RATE), np.float32)


def noise(seconds: float, level: float) -> np.ndarray:
    """White noise of a level in dB under full scale."""
    samples = np.random.default_rng(0).standard_normal(round(seconds * SAMPLING_RATE))
    return (10 ** (level / 20) * samples).astype(np.float32)


def segments_of(
    audio: np.ndarray, longest: float = 5.0, overlap: float = 1.0, block: int = 7001, f0: bool = True, **tracker
):
    def track(waveform):
        return estimate_f0(waveform, SAMPLING_RATE, FRAME, **tracker)

    blocks = (audio[start : start + block] for start in range(0, len(audio), block))
    found = list(segment_blocks(blocks, SAMPLING_RATE, FRAME, longest, overlap, track if f0 else None))
    for segment in found:
        assert np.array_equal(segment.waveform, audio[segment.start : segment.start + len(segment.waveform)])
        assert 0 < len(segment.waveform) <= longest * SAMPLING_RATE
        assert segment.start % FRAME == 0
    for before, after in zip(found, found[1:]):
        common = before.start + len(before.waveform) - after.start
        assert before.is_shared == (after.overlap > 0)
        assert common == after.overlap if after.overlap else common <= KEPT  # then it is silence
    return found


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_blocks_are_the_file_read_at_once(rate, channels, tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation_echo, "BLOCK_FRAMES", 3001)  # the last block is shorter than it has channels
    audio = voice(0.5, sampling_rate=rate)[: 3001 * (1 if rate == 8000 else 2) + 1]
    stereo = np.stack([audio, 0.5 * audio], axis=1)[:, :channels]
    soundfile.write(tmp_path / "a.wav", stereo, rate, subtype="FLOAT")
    expected = stereo.mean(axis=1)
    if rate != SAMPLING_RATE:
        expected = soxr.resample(expected, rate, SAMPLING_RATE, quality="HQ")
    for source in (tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes(), open(tmp_path / "a.wav", "rb")):
        blocks = list(read_blocks(source, SAMPLING_RATE))
        assert len(blocks) > 1 and all(block.dtype == np.float32 for block in blocks)
        np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-6)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.wav").write_text("no audio at all")
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "nine.wav", np.zeros((100, 9)), SAMPLING_RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), SAMPLING_RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "slow.wav", np.zeros(100), 7)
    for name, message in [("text", ""), ("empty", ""), ("nine", "9 channels"), ("nan", "NaN"), ("slow", "7 Hz")]:
        with pytest.raises(ValueError, match=rf"{name}\.wav.*{message}"):
            list(read_blocks(tmp_path / f"{name}.wav", SAMPLING_RATE))
    with pytest.raises(FileNotFoundError, match="gone.wav"):
        list(read_blocks(tmp_path / "gone.wav", SAMPLING_RATE))
    with pytest.raises(ValueError, match="Nothing to read"):
        list(read_blocks(b"", SAMPLING_RATE))


# Cutting -------------------------------------------------------------------------------------------------------------


def test_levels_are_in_decibels():
    square = np.where(np.arange(1000) % 2, 1.0, -1.0)
    np.testing.assert_allclose(frame_levels(square, 100), 0.0, atol=1e-9)
    np.testing.assert_allclose(frame_levels(0.001 * square, 100), -60.0, atol=1e-9)
    assert frame_levels(np.zeros(250), 100).tolist() == [-120.0, -120.0]
    np.testing.assert_allclose(frame_levels(0.001 * square + 0.1, 100), -60.0, atol=1e-6)
    assert frame_levels(np.full(250, 0.5, np.float32), 100).tolist() == [-120.0, -120.0]


def test_a_short_recording_is_one_segment_as_it_is():
    audio = np.concatenate([silence(0.9), voice(1.0), silence(1.5), voice(1.0), silence(0.4)])[:-50]
    (segment,) = segments_of(audio)
    assert len(segment.waveform) == len(audio) and segment.is_speech and not segment.is_shared
    (segment,) = segments_of(noise(2.0, -80.0))
    assert not segment.is_speech
    assert segments_of(silence(0)) == []


@pytest.mark.parametrize("level", [-120.0, -60.0, -40.0])
def test_long_pauses_at_the_ends_of_a_short_one_are_left_out(level):
    """What is written of a recording does not hang on when it was started and stopped."""
    quiet = partial(noise, level=level)
    said = np.concatenate([voice(0.6), quiet(1.5), voice(0.5, 200)])
    for before, behind in ((1.2, 0.3), (0.3, 1.5), (1.0, 1.4)):
        (segment,) = segments_of(np.concatenate([quiet(before), said, quiet(behind)])[:-30])
        kept = [KEPT if seconds >= 1 else round(seconds * SAMPLING_RATE) for seconds in (before, behind)]
        assert segment.is_speech and not segment.is_shared and segment.overlap == 0
        assert len(segment.waveform) == pytest.approx(len(said) + sum(kept), abs=3 * FRAME)
        assert segment.start == pytest.approx(before * SAMPLING_RATE - kept[0], abs=2 * FRAME)
    faint = np.concatenate([0.02 * voice(1.2), voice(1.0)])  # a voice all the same
    (segment,) = segments_of(faint)
    assert len(segment.waveform) == len(faint)


def test_a_long_one_is_cut_at_every_long_pause_and_the_silence_left_out():
    said = [voice(1.0, 120), voice(2.5, 200), voice(0.5, 150)]
    audio = np.concatenate([silence(3), said[0], silence(1.2), said[1], silence(30), said[2], silence(2)])
    found = segments_of(audio)
    assert len(found) == 3
    for segment, utterance in zip(found, said):
        # Up to a frame at either end, where the hum begins and ends at any point of it.
        assert len(segment.waveform) == pytest.approx(len(utterance) + 2 * KEPT, abs=2 * FRAME)
        inner = segment.waveform[KEPT : KEPT + len(utterance)]
        assert np.array_equal(inner, utterance)


def test_short_pauses_are_used_where_no_long_one_comes():
    parts = [voice(1.0), silence(0.3), voice(2.0), silence(0.5), voice(1.2), silence(0.4), voice(2.0)]
    audio = np.concatenate(parts)
    ends = np.cumsum([len(part) for part in parts]) / SAMPLING_RATE
    found = segments_of(audio)
    # Of the pauses at 1.0 s, 3.3 s and 5.0 s the second is the longest in the second half of the five seconds.
    assert len(found) == 2
    assert found[0].start == 0 and not found[0].is_shared
    assert len(found[0].waveform) / SAMPLING_RATE == pytest.approx(ends[2] + 0.25, abs=0.02)
    assert found[1].start / SAMPLING_RATE == pytest.approx(ends[3] - 0.25, abs=0.02)
    assert found[1].start + len(found[1].waveform) == len(audio)


def test_without_a_pause_segments_overlap():
    audio = voice(12.0)
    found = segments_of(audio, longest=5.0, overlap=1.0)
    assert [segment.start / SAMPLING_RATE for segment in found] == [0, 4, 8]
    assert [segment.overlap for segment in found] == [0, SAMPLING_RATE, SAMPLING_RATE]
    assert found[-1].start + len(found[-1].waveform) == len(audio)
    bare = segments_of(audio, longest=5.0, overlap=0.0)
    assert [segment.start / SAMPLING_RATE for segment in bare] == [0, 5, 10]
    assert not any(segment.is_shared for segment in bare)


def test_the_background_is_learned():
    # A pause in noise is one although it is louder than what is speech in a quiet room.
    parts = [voice(3.0), silence(1.5), voice(3.0)]
    audio = np.concatenate(parts) + noise(7.5, -45.0)
    found = segments_of(audio)
    assert len(found) == 2
    # The default tracker may take a frame of noise for voice, so where in the pause the cut is depends on the noise.
    assert 3.0 <= len(found[0].waveform) / SAMPLING_RATE <= found[1].start / SAMPLING_RATE <= 4.5
    found = segments_of(audio, method="autocorrelation")  # which does not
    assert len(found) == 2
    assert len(found[0].waveform) / SAMPLING_RATE == pytest.approx(3.25, abs=0.05)
    assert found[1].start / SAMPLING_RATE == pytest.approx(4.25, abs=0.05)


def test_a_faint_voice_is_no_pause():
    # Someone mumbles in a quiet room: energy alone takes it for the background, its F0 does not.
    mumble = 0.004 * voice(1.5, 220)
    audio = np.concatenate([voice(2.0), mumble, voice(2.0), silence(0.6), voice(1.0)]) + noise(7.1, -78.0)
    by_energy, by_both = segments_of(audio, f0=False), segments_of(audio)
    covered = [
        any(s.start <= 2.1 * SAMPLING_RATE and s.start + len(s.waveform) >= 3.4 * SAMPLING_RATE for s in found)
        for found in (by_energy, by_both)
    ]
    assert covered == [False, True]


def test_f0_is_asked_only_where_energy_finds_a_candidate():
    asked = 0

    def track(waveform):
        nonlocal asked
        asked += len(waveform)
        return estimate_f0(waveform, SAMPLING_RATE, FRAME)

    audio = np.concatenate([voice(3.0), silence(0.5)] * 6) + noise(21.0, -60.0)
    found = list(segment_blocks([audio], SAMPLING_RATE, FRAME, 5.0, 1.0, track))
    assert len(found) == 6
    assert 0 < asked < 0.5 * len(audio)


def test_every_sample_of_speech_is_in_a_segment():
    generator = np.random.default_rng(0)
    for _ in range(10):
        parts = []
        for _ in range(12):
            parts.append(voice(generator.uniform(0.1, 7.0), generator.uniform(90, 300)))
            parts.append(silence(generator.choice([0.05, 0.15, 0.3, 0.7, 1.5, 8.0])))
        audio = np.concatenate(parts) + noise(sum(map(len, parts)) / SAMPLING_RATE, -75.0)[: sum(map(len, parts))]
        found = segments_of(audio, block=int(generator.integers(100, 200_000)), f0=False)
        covered = np.zeros(len(audio), dtype=bool)
        for segment in found:
            covered[segment.start : segment.start + len(segment.waveform)] = True
        position = 0
        for index, part in enumerate(parts):
            if index % 2 == 0:
                assert covered[position : position + len(part)].all()
            elif len(part) == 8 * SAMPLING_RATE:
                assert not covered[position : position + len(part)].all()
            position += len(part)


def test_how_it_is_read_does_not_matter():
    audio = np.concatenate([voice(4.0), silence(0.4), voice(9.0), silence(3.0), voice(1.0)])
    shapes = {tuple((s.start, len(s.waveform)) for s in segments_of(audio, block=n)) for n in (160, 4567, 10**6)}
    assert len(shapes) == 1


def test_nothing_but_silence_has_no_segments():
    assert segments_of(silence(60)) == []
    assert segments_of(noise(60, -80.0)) == []


@pytest.mark.parametrize(("longest", "overlap"), [(5.0, 5.0), (0.001, 0.0), (5.0, -1.0), (np.inf, 0.0), (np.nan, 0.0)])
def test_lengths_that_cannot_work(longest, overlap):
    with pytest.raises(ValueError, match="overlap"):
        list(segment_blocks([voice(6.0)], SAMPLING_RATE, FRAME, longest, overlap))


def test_memory_does_not_grow_with_the_recording(tmp_path):
    utterance = np.concatenate([voice(3.0), silence(0.3), voice(8.0), silence(2.0)])
    peaks = []
    for minutes in (2, 16):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", SAMPLING_RATE, 1, subtype="PCM_16") as file:
            for _ in range(round(minutes * 60 * SAMPLING_RATE / len(utterance))):
                file.write(utterance)
        tracemalloc.start()
        seconds = 0.0
        for segment in segment_blocks(read_blocks(path, SAMPLING_RATE), SAMPLING_RATE, FRAME, 20.0, 6.0):
            seconds += len(segment.waveform) / SAMPLING_RATE
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert seconds > 0.8 * minutes * 60
    assert peaks[1] < 1.1 * peaks[0] < 60e6, "16 minutes in float32 are 61 MB"


# Joining -------------------------------------------------------------------------------------------------------------


def spoken(text: str, start: float = 0.0, each: float = 0.4) -> list[Word]:
    """Words of `each` seconds from `start` on."""
    return [Word(" " + word, start + i * each, start + (i + 0.8) * each) for i, word in enumerate(text.split())]


def joined(left: list[Word], right: list[Word], start: float, end: float) -> str:
    keep, drop = join_overlap(left, right, start, end)
    return "".join(word.text for word in (*left[:keep], *right[drop:])).strip()


@pytest.mark.parametrize(
    ("left", "right", "at", "expected"),
    [
        ("the quick brown fox", "brown fox jumps over", 2, "the quick brown fox jumps over"),
        ("the quick brown fo", "rown fox jumps over", 2, None),  # no word in common: see below
        ("the quick brown fox ju", "ick brown fox jumps", 1, "the quick brown fox jumps"),
        ("well no no no", "no no no no stop", 2, "well no no no no no stop"),
        ("well no no no", "no no stop", 2, "well no no no stop"),
        ("a b", "c d", 2, "a b c d"),
        ("One, two", "two. Three", 1, None),
        ("", "one two", 0, "one two"),
        ("one two", "", 1, "one two"),
    ],
)
def test_texts_are_joined_at_what_both_have(left, right, at, expected):
    first, second = spoken(left), spoken(right, at * 0.4)
    start, end = at * 0.4, len(left.split()) * 0.4
    result = joined(first, second, start, max(start, end))
    if expected is not None:
        assert result == expected
    elif "One" in left:
        assert result == "One, two Three", "case and punctuation do not keep words apart"
    else:
        assert result in ("the quick brown fox jumps over", "the quick rown fox jumps over")


def test_a_speech_cut_in_overlapping_pieces_is_the_speech():
    generator = np.random.default_rng(0)
    vocabulary = ["no", "yes", "well", "seven", "eight"]  # few, so that they repeat
    for _ in range(300):
        count = 60
        words, now = [], 0.0
        for word in generator.choice(vocabulary, count):
            length = generator.uniform(0.15, 0.5)
            words.append(Word(f" {word}", now, now + length))
            now += length + generator.uniform(0.02, 0.3)
        text, start, longest, overlap = [], 0.0, 10.0, 3.0
        while True:
            end = start + longest
            heard = []
            for word in words:
                if word.end <= start or word.start >= end:
                    continue
                whole = start <= word.start and word.end <= end
                jitter = generator.normal(0.0, 0.03, 2)  # the two do not agree to the frame
                heard.append(Word(word.text if whole else " uh", *np.add((word.start, word.end), jitter)))
            if start == 0.0:
                text = heard
            else:
                keep, drop = join_overlap(text, heard, start, start + overlap)
                text = text[:keep] + heard[drop:]
            if end >= now:
                break
            start = end - overlap
        assert [word.text for word in text] == [word.text for word in words]


def test_without_a_common_word_the_widest_gap_is_the_joint():
    left = [Word(" a", 0.0, 1.0), Word(" b", 4.0, 4.4), Word(" x", 5.4, 6.0)]
    right = [Word(" y", 4.1, 4.3), Word(" c", 5.3, 5.8), Word(" d", 6.2, 6.5)]
    assert joined(left, right, 4.0, 6.0) == "a b c d"


def test_words_cover_the_text():
    for text, words in [
        ("hi there", ["hi", " there"]),
        ("  two  spaces ", ["  two", "  spaces "]),
        ("你好。abc 世界", ["你", "好。", "abc", " 世", "界"]),
        ("", []),
        ("  ", []),
        ("don't 3.5\n", ["don't", " 3.5\n"]),
    ]:
        characters = [Word(character, index, index + 1) for index, character in enumerate(text)]
        found = group_words(characters)
        assert [word.text for word in found] == words
        for word in found:
            spoken_part = text.index(word.text.strip())
            assert (word.start, word.end) == (spoken_part, spoken_part + len(word.text.strip()))


def test_where_a_space_is_needed():
    assert needs_space("one", "two") and needs_space("好", "two")
    assert not needs_space("one ", "two") and not needs_space("one", " two") and not needs_space("你", "好")

"""Files of all kinds are transcribed or refused with a reason: no crash, no hang, no memory without bound."""

import io
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from conftest import SAMPLING_RATE, voice
from echo_hf import inference
from echo_hf.inference import Transcript, expand_paths, find_audio_files, load_checkpoint, transcribe_files
from echo_hf.pipeline_echo import EchoAutomaticSpeechRecognitionPipeline
from speed import peak_memory

FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("WAVEX", "PCM_24"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("W64", "PCM_16"),
    ("RF64", "PCM_16"),
]


@pytest.fixture(scope="module")
def recognizer(checkpoint):
    model, processor = load_checkpoint(checkpoint, "cpu")
    return EchoAutomaticSpeechRecognitionPipeline(
        model=model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor
    )


def wav(samples: np.ndarray, **claims) -> bytes:
    """A WAV file of float samples whose header may lie."""
    header = {"channels": 1, "rate": SAMPLING_RATE, "bits": 32, "kind": 3, "align": 4, "riff": None, "data": None}
    header |= claims
    content = samples.astype("<f4").tobytes()
    size = len(content) if header["data"] is None else header["data"]
    rate, align = header["rate"], header["align"]
    fields = (header["kind"], header["channels"], rate, rate * align % 2**32, align, header["bits"])
    body = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, *fields) + b"data" + struct.pack("<I", size % 2**32) + content
    return b"RIFF" + struct.pack("<I", (len(body) if header["riff"] is None else header["riff"]) % 2**32) + body


def hostile_files() -> Iterator[tuple[str, bytes]]:
    """Names and contents of files that nobody should have to open. The same at every call."""
    generator = np.random.default_rng(0)
    audio = voice(0.3)
    for field, values in {
        "data": [0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1],
        "riff": [0, 2**32 - 1],
        "channels": [0, 2, 3, 8, 9, 1024, 65535],
        "rate": [0, 1, 999, 1000, 7999, 384000, 10**6, 10**6 + 1, 2**31 - 1, 2**31, 2**32 - 1],
        "bits": [0, 1, 8, 16, 24, 33, 64, 65535],
        "kind": [0, 1, 2, 6, 7, 17, 85, 65534, 65535],
        "align": [0, 1, 3, 65535],
    }.items():
        yield from ((f"{field} {value}", wav(audio, **{field: value})) for value in values)
    for name, samples in {
        "no sample": audio[:0],
        "one sample": audio[:1],
        "less than a frame": audio[:159],
        "one frame": audio[:160],
        "all NaN": np.full(4800, np.nan),
        "one NaN": np.append(audio, np.nan),
        "infinite": np.append(audio, -np.inf),
        "huge": 1e30 * audio,
        "nearly too large": np.full(4800, 3e38),
        "alternating at the limit": np.where(np.arange(4800) % 2, 3.4e38, -3.4e38),
        "subnormal": 1e-40 * audio,
        "one click": np.eye(1, 4800, 100)[0],
        "constant": np.full(4800, 0.5),
        "a minute of constant": np.full(60 * SAMPLING_RATE, 0.5),
        "a minute of huge noise": 1e30 * generator.standard_normal(60 * SAMPLING_RATE),
    }.items():
        yield name, wav(samples)
        yield f"{name} at 44.1 kHz", wav(samples, rate=44100)
    yield "text", b"Das ist kein Ton, das ist ein Text. " * 100
    yield "empty", b""
    yield "zeros", bytes(10_000)
    yield "markup", b"<html><body>404</body></html>"
    for magic in (
        b"",
        b"RIFF\xff\xff\xff\xffWAVEfmt ",
        b"fLaC",
        b"OggS\x00\x02",
        b"ID3\x04",
        b"\xff\xfb\x90",
        b"FORM",
        b"caff",
    ):
        for _ in range(6):
            yield f"random bytes after {magic!r}", magic + generator.bytes(int(generator.integers(1, 5000)))
    for container, coding in FORMATS:
        file = io.BytesIO()
        soundfile.write(file, audio, SAMPLING_RATE, format=container, subtype=coding)
        whole = file.getvalue()
        for _ in range(3):
            yield f"{container} {coding} truncated", whole[: int(generator.integers(1, len(whole)))]
        for reach in (64, 64, 64, 64, 200, 200, len(whole), len(whole), len(whole)):  # mostly in the header
            damaged = bytearray(whole)
            for position in generator.integers(0, min(reach, len(whole)), int(generator.integers(1, 12))):
                damaged[position] = generator.choice([0, 255, generator.integers(256)])
            yield f"{container} {coding} damaged", bytes(damaged)


def check(transcript: Transcript, path: Path):
    assert transcript.path == path
    if transcript.error is None:
        assert isinstance(transcript.text, str) and transcript.seconds > 0
    else:
        assert transcript.text is None and len(transcript.error) > 10


@pytest.mark.slow
def test_hostile_files_are_transcribed_or_refused(recognizer, tmp_path):
    contents = list(hostile_files())
    assert len(contents) > 250
    files = []
    for number, (_, content) in enumerate(contents):
        files.append(tmp_path / f"{number}{('.wav', '.raw')[number % 50 == 7]}")
        files[-1].write_bytes(content)
    refused = 0
    options = {"batch_size": 1, "timestamps": "word", "generate_kwargs": {"max_new_tokens": 4}}

    def transcribe_all():
        nonlocal refused
        for path in files:
            (transcript,) = transcribe_files(recognizer, [path], **options)
            check(transcript, path)
            refused += transcript.error is not None

    grown = peak_memory(transcribe_all, torch.device("cpu"))  # MiB
    assert 50 < refused < len(contents) - 50, "some can be read and some cannot"
    assert grown is None or grown < 500


@pytest.mark.parametrize("samples", [np.full(4800, np.nan), np.zeros(0), np.zeros(5)])
def test_a_bad_file_does_not_spoil_its_batch(samples, recognizer, tmp_path):
    files = [tmp_path / name for name in ("a.wav", "b.wav", "c.wav")]
    for path, audio in zip(files, (voice(0.5, 100), samples, voice(0.4, 200))):
        soundfile.write(path, audio, SAMPLING_RATE, subtype="FLOAT")
    first, second, third = transcribe_files(recognizer, files, batch_size=3)
    assert first.text == recognizer(str(files[0]))["text"] and third.text == recognizer(str(files[2]))["text"]
    assert second.error and second.text is None
    assert (first.seconds, third.seconds) == (0.5, 0.4)


def test_long_and_short_files_in_their_order(recognizer, tmp_path):
    seconds = [0.4, 3.0, 0.5, 0.6, 2.5, 0.7]
    files = [tmp_path / f"{index}.wav" for index in range(6)]
    for index, path in enumerate(files):
        soundfile.write(path, voice(seconds[index], 100 + 40 * index), SAMPLING_RATE, subtype="FLOAT")
    options = {"timestamps": "segment", "chunk_length_s": 2}
    for batch_size in (1, 2, 8):
        transcripts = list(transcribe_files(recognizer, files, batch_size, **options))
        assert [transcript.path for transcript in transcripts] == files
        assert [transcript.seconds for transcript in transcripts] == seconds
        assert [len(transcript.chunks) for transcript in transcripts] == [1, 2, 1, 1, 2, 1]
        alone = [recognizer(str(path), chunk_length_s=2)["text"] for path in files]
        assert [transcript.text for transcript in transcripts] == alone
    again = list(transcribe_files(recognizer, [files[0], files[2], files[0]], 3, **options))
    assert [transcript.path for transcript in again] == [files[0], files[2], files[0]]


def test_minutes_of_silence_cost_no_model(recognizer, tmp_path, monkeypatch):
    monkeypatch.setattr(recognizer.model, "generate", None)
    path = tmp_path / "silence.flac"
    with soundfile.SoundFile(path, "w", SAMPLING_RATE, 1) as file:
        for _ in range(10):
            file.write(np.zeros(60 * SAMPLING_RATE, np.int16))
    (transcript,) = transcribe_files(recognizer, [path], timestamps="word")
    assert (transcript.text, transcript.seconds, transcript.chunks) == ("", 600.0, [])


def test_no_more_audio_is_held_than_a_batch_needs(recognizer, tmp_path, monkeypatch):
    # Two minutes: features are made of segments as they are needed, not of the file.
    path = tmp_path / "long.wav"
    utterance = np.concatenate([voice(1.5), np.zeros(SAMPLING_RATE * 3 // 2, np.float32)])
    soundfile.write(path, np.tile(utterance, 40), SAMPLING_RATE)
    made, used, ahead = [], [], []
    make_features = recognizer._features

    def counted(segment, *context):
        made.append(len(segment.waveform))
        ahead.append(len(made) - sum(used))
        return make_features(segment, *context)

    def generate(encoder_outputs=None, input_features=None, attention_mask=None, **kwargs):
        used.append(len(attention_mask))
        return torch.tensor([[1, 40, 2]] * len(attention_mask))

    monkeypatch.setattr(recognizer, "_features", counted)
    monkeypatch.setattr(recognizer.model, "generate", generate)
    (transcript,) = transcribe_files(recognizer, [path], batch_size=4)
    assert len(transcript.text.split()) == 40 and used == [4] * 10
    assert max(made) <= 3 * SAMPLING_RATE and max(ahead) <= 4


def test_timestamps_are_checked_early(recognizer):
    with pytest.raises(ValueError, match="'letter'"):
        next(transcribe_files(recognizer, [], timestamps="letter"))


def test_the_progress_bar_survives_what_headers_claim(tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    assert inference._claimed_seconds(tmp_path / "text.wav") == 0.0
    soundfile.write(tmp_path / "a.wav", voice(0.5), SAMPLING_RATE)
    assert inference._claimed_seconds(tmp_path / "a.wav") == 0.5


def test_a_folder_gives_each_file_once_and_no_hidden_one(tmp_path):
    for name in ("b.wav", "a.wav", "._a.wav", ".hidden/c.wav", "below/d.flac", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [tmp_path / name for name in ("a.wav", "b.wav", "below/d.flac")]
    assert find_audio_files(tmp_path) == found
    assert expand_paths([tmp_path / "b.wav", tmp_path]) == [found[1], found[0], found[2]]
    hidden = tmp_path / ".hidden"  # asked for
    assert expand_paths([hidden, tmp_path / "._a.wav"]) == [hidden / "c.wav", tmp_path / "._a.wav"]


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names are text there")
def test_a_name_need_not_be_text(recognizer, tmp_path):
    path, other = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.wav")), tmp_path / "café.wav"
    for name in (path, other):
        with open(name, "wb") as file:
            soundfile.write(file, voice(1.0), SAMPLING_RATE, format="WAV")
    first, second = transcribe_files(recognizer, [path, other])
    assert first.path == path and first.text == second.text and first.error is second.error is None
    path.write_bytes(b"no audio")
    with pytest.raises(ValueError, match="Cannot read"):
        recognizer.feature_extractor(str(path))

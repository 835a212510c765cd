"""New sentences hold recorded words in an order that their speaker's recordings have, cut where nobody speaks."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from echo_hf import EchoTokenizer

spec = importlib.util.spec_from_file_location(
    "spliced_speech", Path(__file__).parents[1] / "recipes" / "spliced_speech.py"
)
spliced_speech = importlib.util.module_from_spec(spec)
spec.loader.exec_module(spliced_speech)
Piece, Recording = spliced_speech.Piece, spliced_speech.Recording

RATE = 16000  # Hz
FRAME = 640  # samples of an encoder frame, 40 ms
SENTENCES = {
    "ann": ["we call it bear", "is it cold today", "it is a cold bear", "we see a bear today"],
    "bob": ["they call us", "call them now please", "now they come"],
}


def tone(samples, frequency=440.0):
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(samples) / RATE)).astype(np.float32)


def make_recording(text, speaker="ann", name=None, gain=1.0):
    """Each word is a tone of 0.4 s, of a frequency that the word has wherever it is said."""
    words = text.split()
    parts = [tone(6400, 200 + 20 * (sum(map(ord, word)) % 50)) for word in words]
    cuts = [6400 * index for index in range(len(words) + 1)]
    return Recording(name or f"{speaker} {text}", words, cuts, speaker, "en", gain * np.concatenate(parts), RATE)


@pytest.fixture(scope="module")
def recordings():
    return [make_recording(text, speaker) for speaker, texts in SENTENCES.items() for text in texts]


def text_of(pieces):
    return " ".join(word for piece in pieces for word in piece.words)


def log_probabilities(tokens, frames, vocabulary, confidence=0.99):
    """Those that spell a token at each of `frames` and the blank elsewhere."""
    probabilities = np.full((40, vocabulary), (1 - confidence) / (vocabulary - 1))
    path = np.zeros(40, dtype=int)
    path[frames] = tokens
    probabilities[np.arange(40), path] = confidence
    return np.log(probabilities)


# Where the words are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", [(9, 11), (10, 14), (13, 15)])
def test_words_part_where_it_is_quiet(quiet):
    tokenizer, text = EchoTokenizer(), "oh no"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    waveform = tone(40 * FRAME)
    waveform[quiet[0] * FRAME : quiet[1] * FRAME] *= 0.01
    scores = log_probabilities(tokens, [5, 8, 12, 16, 20], len(tokenizer))
    start, cut, end = spliced_speech.find_cuts(text, waveform, scores, tokenizer, RATE, FRAME)
    assert (start, end) == (0, len(waveform))
    assert quiet[0] * FRAME <= cut <= quiet[1] * FRAME


def test_cuts_of_letters_of_several_bytes():
    tokenizer, text = EchoTokenizer(), "да нет"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == 11  # two a letter, and the space
    waveform = tone(40 * FRAME)
    waveform[15 * FRAME : 16 * FRAME] = 0.0
    scores = log_probabilities(tokens, list(range(3, 25, 2)), len(tokenizer))
    _, cut, _ = spliced_speech.find_cuts(text, waveform, scores, tokenizer, RATE, FRAME)
    assert abs(cut - 11 * FRAME) <= 3 * FRAME  # the silence is within the second word, and so no place to cut


def test_what_is_not_said_has_no_cuts():
    tokenizer = EchoTokenizer()
    tokens = tokenizer("oh no", add_special_tokens=False)["input_ids"]
    scores = log_probabilities(tokens, [5, 8, 12, 16, 20], len(tokenizer))
    waveform = tone(40 * FRAME)
    assert spliced_speech.find_cuts("oh no", waveform, scores, tokenizer, RATE, FRAME) is not None
    assert spliced_speech.find_cuts("my dear", waveform, scores, tokenizer, RATE, FRAME) is None
    assert spliced_speech.find_cuts("oh no " * 20 + "no", waveform, scores, tokenizer, RATE, FRAME) is None


# New sentences -------------------------------------------------------------------------------------------------------


def test_words_follow_each_other_as_their_speaker_said_them(recordings):
    sentences = spliced_speech.draw_sentences(recordings, 30)
    assert len(sentences) > 15
    for pieces in sentences:
        (speaker,) = {piece.recording.speaker for piece in pieces}
        said = [text.split() for text in SENTENCES[speaker]]
        words = text_of(pieces).split()
        assert set(pairwise(words)) <= {pair for text in said for pair in pairwise(text)}
        assert words[0] in {text[0] for text in said}


def test_sentences_are_new(recordings):
    recorded = {text for texts in SENTENCES.values() for text in texts}
    sentences = [text_of(pieces) for pieces in spliced_speech.draw_sentences(recordings, 30)]
    assert not recorded & set(sentences) and len(set(sentences)) == len(sentences)
    assert "we call it cold today" in sentences
    others = [
        text_of(pieces)
        for pieces in spliced_speech.draw_sentences(recordings, 30, excluded=["We call it cold, today!"], max_words=5)
    ]
    assert "we call it cold today" not in others and others
    assert all(2 <= len(text.split()) <= 5 for text in others)


def test_the_seed_alone_decides(recordings):
    def draw(recordings, seed):
        return [text_of(pieces) for pieces in spliced_speech.draw_sentences(recordings, 12, seed=seed)]

    assert draw(recordings, 0) == draw(recordings[::-1], 0) != draw(recordings, 1)


def test_speakers_have_their_shares(recordings):
    sentences = spliced_speech.draw_sentences(recordings, 7)
    speakers = [pieces[0].recording.speaker for pieces in sentences]
    assert speakers == ["ann"] * 4 + ["bob"] * 3


def test_a_recording_spliced_with_itself_is_unchanged():
    one, same = make_recording("we call it bear"), make_recording("we call it bear", name="a copy")
    joined = spliced_speech.join([Piece(one, 0, 2), Piece(same, 2, 4)])
    fade = round(spliced_speech.FADE * RATE)
    assert len(joined) == len(one.waveform) - fade
    np.testing.assert_allclose(joined[: one.cuts[2] - fade], one.waveform[: one.cuts[2] - fade], rtol=1e-5)
    np.testing.assert_allclose(joined[one.cuts[2] :], one.waveform[one.cuts[2] + fade :], rtol=1e-5)


def test_pieces_are_equally_loud():
    loud, quiet = make_recording("we call it bear"), make_recording("is it cold today", gain=0.05)
    joined = spliced_speech.join([Piece(loud, 0, 2), Piece(quiet, 1, 4)])
    levels = [np.sqrt(np.mean(part**2)) for part in (joined[:12000], joined[13500:])]
    assert levels[0] == pytest.approx(levels[1], rel=0.05)
    assert np.abs(spliced_speech.join([Piece(make_recording("so it is", gain=5.0), 0, 3)])).max() <= 1.0


# Manifest ------------------------------------------------------------------------------------------------------------


def test_manifest(recordings, tmp_path):
    sentences = spliced_speech.draw_sentences(recordings, 10)
    rows = spliced_speech.write(sentences, tmp_path)
    assert rows == [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [text_of(pieces) for pieces in sentences]
    for row in rows:
        assert row["spliced"] is True and row["language"] == "en" and row["speaker"] in SENTENCES
        assert soundfile.info(tmp_path / row["audio"]).duration == pytest.approx(row["duration"], abs=1e-3)
    assert spliced_speech.write(sentences, tmp_path) == rows


def test_others_manifests_are_kept(recordings, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"audio": "a.wav", "text": "mine"}\n')
    with pytest.raises(ValueError, match="is no manifest of spliced speech"):
        spliced_speech.write(spliced_speech.draw_sentences(recordings, 3), tmp_path)
    with pytest.raises(ValueError, match="is no manifest of spliced speech"):  # before anything is read
        spliced_speech.main(["nowhere.jsonl", "--count", "3", "--output_dir", str(tmp_path)])
    assert "mine" in (tmp_path / "train.jsonl").read_text()


def test_without_shared_words_there_is_nothing_to_make(tmp_path):
    apart = [make_recording("one two"), make_recording("three four")]
    with pytest.raises(ValueError, match="must share words"):
        spliced_speech.write(spliced_speech.draw_sentences(apart, 3), tmp_path)
    assert not (tmp_path / "train.jsonl").exists()


def test_from_manifests_to_a_manifest(ctc_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spliced_speech, "LEAST_CERTAIN", -np.inf)  # the checkpoint knows no speech
    rows = [
        {"audio": f"{index}.wav", "text": text, "speaker": speaker}
        for speaker, texts in SENTENCES.items()
        for index, text in enumerate([f"{text}!" for text in texts], start=10 * len(speaker) + ord(speaker[0]))
    ]
    for row in rows:
        soundfile.write(tmp_path / row["audio"], make_recording(row["text"]).waveform.repeat(2), 2 * RATE)
    rows.append({"audio": "none.wav", "text": "not there", "speaker": "ann"})
    rows.append({"audio": rows[0]["audio"], "text": "Bear", "speaker": "ann"})
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = tmp_path / "held.txt"
    held_out.write_text("We call it cold today.\n")
    output = tmp_path / "spliced"
    arguments = [str(manifest), "--count", "8", "--checkpoint", str(ctc_checkpoint), "--output_dir", str(output)]
    with pytest.raises(FileNotFoundError, match="train.jsonl line 8 .*none.wav.*--skip_broken"):
        spliced_speech.main(arguments)
    spliced_speech.main([*arguments, "--exclude", str(held_out), "--max_words", "6", "--skip_broken"])
    assert "of 7 recordings; left out 1 not to be read, 1 of less than two words" in capsys.readouterr().out
    made = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    assert made and all(soundfile.info(output / row["audio"]).samplerate == RATE for row in made)
    assert "we call it cold today" not in {row["text"] for row in made}


def test_a_checkpoint_that_does_not_know_the_speech(ctc_checkpoint, tmp_path):
    soundfile.write(tmp_path / "a.wav", make_recording("oh no").waveform, RATE)
    (tmp_path / "train.jsonl").write_text('{"audio": "a.wav", "text": "oh no"}\n')
    with pytest.raises(ValueError, match="None of the 1 recordings can be used .1 not heard as written"):
        spliced_speech.read_recordings([tmp_path / "train.jsonl"], ctc_checkpoint)

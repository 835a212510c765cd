"""Babble is new and is the domain's; what is spoken is told right, kept, and refused with its reason."""

import json
import os
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile

from echo_hf.cli import main
from echo_hf.metrics import normalize_text
from echo_hf.synthesis import ENGINES
from echo_hf.synthesis import ESPEAK_VARIANTS
from echo_hf.synthesis import FLITE_VOICES
from echo_hf.synthesis import Line
from echo_hf.synthesis import babble
from echo_hf.synthesis import leave_out
from echo_hf.synthesis import read_lines
from echo_hf.synthesis import synthesize

ENGLISH = ["the cat saw a dog", "a dog saw the red bird", "the red cat sang", "a bird sang to the cat", "we saw it"]
SPANISH = ["el gato vio un perro", "un perro vio el gato rojo", "el perro canta"]
LINES = [Line(text, "en") for text in ENGLISH] + [Line(text, "es") for text in SPANISH]

# Speaks each text as 50 ms of a tone for each of its letters, at the rate of the real engine; notes that it ran; breaks
# on one text, and stays silent on another.
FAKE_ENGINE = """#!{python}
import math, struct, sys, wave
arguments = sys.argv[1:]
if {espeak}:
    output, text = arguments[arguments.index("-w") + 1], sys.stdin.buffer.read().decode()
else:
    output, text = arguments[arguments.index("-o") + 1], arguments[arguments.index("-t") + 1]
with open({log!r}, "a") as log:
    log.write(text + chr(10))
if text == "broken":
    sys.exit("no such phoneme")
rate = 22050 if {espeak} else 16000
height = 0 if text == "silent" else 9000
samples = [int(height * math.sin(0.1 * n)) for n in range(len(text) * rate // 20)]
with wave.open(output, "wb") as file:
    file.setparams((1, 2, rate, 0, "NONE", ""))
    file.writeframes(struct.pack(f"<{{len(samples)}}h", *samples))
"""


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """Both engines, faked, alone on the PATH; what was spoken, in the order in which it was."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    for name in ENGINES:
        program = folder / name
        program.write_text(FAKE_ENGINE.format(python=sys.executable, espeak=name == "espeak-ng", log=str(log)))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return lambda: log.read_text().splitlines() if log.exists() else []


def rows_of(manifest) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


# Texts ---------------------------------------------------------------------------------------------------------------


def test_texts_come_from_manifests_and_text_files_with_their_language(tmp_path):
    rows = [{"text": "Hola.", "language": "es"}, {"text": "hello"}, {"text": "oui", "language": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("\ufeffone\r\n\n  two \n", encoding="utf-8")
    expected = [("Hola.", "es"), ("hello", "fr"), ("oui", "fr"), ("one", "fr"), ("two", "fr")]
    assert read_lines([tmp_path / "a.jsonl", tmp_path / "b.txt"], "fr") == [Line(*pair) for pair in expected]


@pytest.mark.parametrize(
    "content",
    [
        *("", "not json\n", '{"audio": "a.wav"}\n', '["text"]\n'),
        *('{"text": "a", "language": 5}\n', '{"text": "\\ud83d"}\n'),
    ],
)
def test_a_manifest_without_texts_is_named(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match="a.jsonl"):
        read_lines([tmp_path / "a.jsonl"])


def test_leaving_out_goes_by_normalised_text():
    excluded = [Line("We call: IT, bear!", "en")]
    lines = [Line("we call it bear", "en"), Line("we call it a bear", "en"), Line("...", "en")]
    assert leave_out(lines, excluded) == lines[1:2]


def test_babble_is_the_same_for_a_seed_and_another_for_another():
    assert babble(LINES, 20, seed=1) == babble(LINES, 20, seed=1)
    assert babble(LINES, 20, seed=1) != babble(LINES, 20, seed=2)


def test_babble_keeps_words_and_their_order_within_a_language():
    made = babble(LINES, 24, min_words=2, max_words=5)
    assert Counter(line.language for line in made) == {"en": 15, "es": 9}  # shares of 5 and 3 sentences in 8
    for line in made:
        examples = ENGLISH if line.language == "en" else SPANISH
        pairs = {pair for text in examples for pair in zip(text.split(), text.split()[1:])}
        # Where one ends too early, the next begins.
        joins = {(a.split()[-1], b.split()[0]) for a in examples for b in examples}
        words = line.text.split()
        assert 2 <= len(words) <= 5
        assert set(zip(words, words[1:])) <= pairs | joins


def test_babble_makes_nothing_that_is_excluded_known_or_twice():
    free = babble(LINES, 20, min_words=2, max_words=4)
    excluded = [Line(line.text.upper() + "!", "xx") for line in free[::2]]
    made = {normalize_text(line.text) for line in babble(LINES, 20, 2, 4, excluded)}
    assert len(made) == 20
    assert not made & {normalize_text(line.text) for line in (*excluded, *LINES)}


def test_babble_of_too_few_words_says_how_many_there_are():
    # Two words in pairs are four sentences, one of which is known.
    lines = [Line("ba", "en"), Line("bu", "en"), Line("ba bu", "en")]
    assert {line.text for line in babble(lines, 3, 2, 2)} == {"ba ba", "bu ba", "bu bu"}
    with pytest.raises(ValueError, match="Only 3 of 4 .*'en'.*fewer"):
        babble(lines, 4, 2, 2)
    with pytest.raises(ValueError, match="min_words"):
        babble(LINES, 3, 5, 4)


# Speech --------------------------------------------------------------------------------------------------------------


def test_the_manifest_tells_what_was_spoken(tmp_path, engines):
    done = synthesize(LINES, tmp_path / "out", seed=3)
    rows = rows_of(done.manifest)
    assert [(row["text"], row["language"]) for row in rows] == [(line.text, line.language) for line in LINES]
    for row in rows:
        assert set(row) == {"audio", "text", "language", "speaker", "duration", "synthetic"}
        assert row["synthetic"] is True
        header = soundfile.info(tmp_path / "out" / row["audio"])
        assert (header.format, header.samplerate, header.channels) == ("FLAC", 16000, 1)
        assert row["duration"] == pytest.approx(header.duration, abs=1e-3)
        assert row["duration"] == pytest.approx(0.05 * len(row["text"]), abs=1e-3)
        assert row["speaker"].startswith("espeak-ng es") or row["language"] == "en"
        # 0.1 radians a sample is 351 Hz at 22050 Hz, 255 Hz at 16000 Hz, whatever it is written at.
        waveform, _ = soundfile.read(tmp_path / "out" / row["audio"])
        peak = np.argmax(np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))) * 16000 / len(waveform)
        rate = 22050 if row["speaker"].startswith("espeak-ng") else 16000
        assert peak == pytest.approx(0.1 * rate / (2 * np.pi), abs=4)
    assert (done.utterances, done.new, done.skipped) == (len(LINES), len(LINES), [])
    assert done.seconds == pytest.approx(sum(row["duration"] for row in rows), abs=1e-2)


def test_speech_in_the_band_of_a_telephone_is_a_file_of_its_own(tmp_path, engines):
    wide = synthesize(LINES[:3], tmp_path / "out")
    narrow = synthesize(LINES[:3], tmp_path / "out", sampling_rate=8000)
    assert (wide.new, narrow.new) == (3, 3)
    rows = rows_of(narrow.manifest)
    assert [row["speaker"] for row in rows] == [
        row["speaker"] for row in rows_of(synthesize(LINES[:3], tmp_path / "out").manifest)
    ]
    for row in rows:
        waveform, rate = soundfile.read(tmp_path / "out" / row["audio"])
        assert rate == 8000 and row["duration"] == pytest.approx(0.05 * len(row["text"]), abs=1e-3)
        peak = np.argmax(np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))) * rate / len(waveform)
        tone = 0.1 * (22050 if row["speaker"].startswith("espeak-ng") else 16000) / (2 * np.pi)
        assert peak == pytest.approx(tone, abs=4)
    with pytest.raises(ValueError, match="at least 8000 Hz.*got 800"):
        synthesize(LINES, tmp_path / "none", sampling_rate=800)


def test_voices_hang_on_seed_and_text_alone(tmp_path, engines):
    def voices(name, lines, **options):
        return {row["text"]: row["speaker"] for row in rows_of(synthesize(lines, tmp_path / name, **options).manifest)}

    first = voices("a", LINES)
    assert voices("b", LINES[::-1], num_proc=3) == first
    assert voices("c", LINES, seed=1) != first
    for row in rows_of(tmp_path / "a" / "train.jsonl"):
        assert (tmp_path / "a" / row["audio"]).read_bytes() == (tmp_path / "b" / row["audio"]).read_bytes()


def test_many_lines_meet_all_voices(tmp_path, engines, monkeypatch):
    monkeypatch.setattr("echo_hf.synthesis._speak", lambda *_: (1.0, True, None))
    done = synthesize([Line("hello", "en")] * 1000, tmp_path)  # the same text, each time by another voice
    speakers = [row["speaker"].split() for row in rows_of(done.manifest)]
    assert {speaker[1] for speaker in speakers if speaker[0] == "flite"} == set(FLITE_VOICES)
    assert {speaker[1].split("+")[1] for speaker in speakers if speaker[0] == "espeak-ng"} == set(ESPEAK_VARIANTS)
    assert len(set(map(tuple, speakers))) > 950


def test_a_second_run_keeps_what_is_there(tmp_path, engines):
    first = synthesize(LINES[:3], tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in first.manifest.parent.rglob("*.flac")}
    lost, damaged = list(kept)[:2]
    lost.unlink()
    damaged.write_bytes(b"fLaC")
    second = synthesize(LINES[:4], tmp_path / "out")
    assert (second.utterances, second.new) == (4, 3)
    assert len(engines()) == 3 + 3
    for path, time in kept.items():
        assert soundfile.info(path).frames
        assert (path.stat().st_mtime_ns == time) == (path not in (lost, damaged))
    assert [row["text"] for row in rows_of(second.manifest)] == [line.text for line in LINES[:4]]


@pytest.mark.parametrize(
    "content",
    ['{"audio": "a.wav", "text": "of people"}\n', "no JSON\n", '{"synthetic": true}\n{"audio": "a.wav"}\n', "[1]"],
)
def test_other_manifests_are_not_overwritten(tmp_path, engines, content):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"train\.jsonl is no manifest of synthetic speech, .* another folder"):
        synthesize(LINES, tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == content and not list(tmp_path.rglob("*.flac"))


@pytest.mark.parametrize(("text", "reason"), [("broken", "no such phoneme"), ("silent", "silent"), ("", "empty")])
def test_what_cannot_be_spoken_is_named_and_may_be_skipped(tmp_path, engines, text, reason):
    lines = [LINES[0], Line(text, "en"), LINES[1]]
    with pytest.raises(ValueError, match=f"{text!r} cannot be spoken by .*{reason}.*skip_broken"):
        synthesize(lines, tmp_path / "out")
    assert not (tmp_path / "out" / "train.jsonl").exists()
    done = synthesize(lines, tmp_path / "out", skip_broken=True)
    assert [row["text"] for row in rows_of(done.manifest)] == [LINES[0].text, LINES[1].text]
    assert [(spoken, reason in problem) for spoken, problem in done.skipped] == [(text, True)]
    left = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {"train.jsonl", *(row["audio"] for row in rows_of(done.manifest))}
    with pytest.raises(ValueError, match=f"None of 1 .*{reason}"):
        synthesize(lines[1:2], tmp_path / "none", skip_broken=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_is_not_installed_comes_with_its_remedy(tmp_path, monkeypatch, capsys, engine):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "texts.txt").write_text("hello\n")
    options = ["--texts", str(tmp_path / "texts.txt"), "--output_dir", str(tmp_path / "out"), "--engine", engine]
    assert main(["synthesize", *options]) == 1
    assert f"{engine} is not installed: `apt install {engine}`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_engines_and_languages_that_do_not_go_together_are_refused(tmp_path, engines):
    with pytest.raises(ValueError, match="flite speaks English alone, not 'es'.*espeak-ng"):
        synthesize(LINES, tmp_path / "out", engines=["flite"])
    with pytest.raises(ValueError, match="espeak-ng, flite, got festival"):
        synthesize(LINES, tmp_path / "out", engines=["festival"])
    with pytest.raises(ValueError, match="'../en' is no code"):
        synthesize([Line("hello", "../en")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_makes_babble_that_training_can_read(tmp_path, engines, capsys):
    from echo_hf.data import load_sources

    manifests = {}
    for name, lines in (("train", LINES), ("dev", [Line("The red cat saw it.", "en")])):
        manifests[name] = tmp_path / f"{name}.jsonl"
        manifests[name].write_text("".join(json.dumps(vars(line)) + "\n" for line in lines))
    options = ["--babble", "8", "--max_words", "5", "--num_proc", "2", "--seed", "4"]
    options += ["--exclude", str(manifests["dev"]), "--output_dir", str(tmp_path / "out")]
    assert main(["synthesize", "--texts", str(manifests["train"]), *options]) == 0
    assert "8 utterances" in capsys.readouterr().out
    table = load_sources(tmp_path / "out" / "train.jsonl")
    made = babble(LINES, 8, max_words=5, excluded=[Line("The red cat saw it.", "en")], seed=4)
    assert list(zip(table["text"], table["language"])) == [(line.text, line.language) for line in made]
    assert all(os.path.isfile(audio["path"]) for audio in table["audio"])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_themselves_speak(tmp_path, engine):
    if shutil.which(engine) is None:  # a program of the system, which pip does not bring; the others have a stand-in
        pytest.skip(f"{engine} is not installed")
    lines = [Line("four", "en"), Line("one two three four five six seven eight", "en")] * 3
    lines += [Line("uno dos tres", "es"), Line("ma3", "cmn"), Line("baa1", "yue")] if engine == "espeak-ng" else []
    done = synthesize(lines, tmp_path, engines=[engine])
    durations = [row["duration"] for row in rows_of(done.manifest)]
    assert min(durations) > 0.1
    assert min(durations[1:6:2]) > max(durations[:6:2])  # eight words take longer than one, at whatever rate
    if engine == "espeak-ng":
        with pytest.raises(ValueError, match="the engine says"):
            synthesize([Line("hello", "qqq")], tmp_path, engines=[engine])

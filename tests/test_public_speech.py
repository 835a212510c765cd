"""Tables of Common Voice and folders of LibriSpeech become manifests, and what cannot be trusted is left out."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from echo_hf.data import load_sources

spec = importlib.util.spec_from_file_location(
    "public_speech", Path(__file__).parents[1] / "recipes" / "public_speech.py"
)
public_speech = importlib.util.module_from_spec(spec)
spec.loader.exec_module(public_speech)

RATE = 16000  # Hz
FIRST_EDITION = "filename,text,up_votes,down_votes,age,gender,accent,duration\n"
LATER_EDITION = "client_id\tpath\tsentence\tup_votes\tdown_votes\n"


def record(path, seconds=2.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    waveform = 0.1 * np.sin(np.arange(int(seconds * RATE)) / 10)
    soundfile.write(path, waveform, RATE)


@pytest.fixture
def first_edition(tmp_path):
    """A table of three clips, the last of which was rejected."""
    for name in ("a", "b", "c"):
        record(tmp_path / "cv-valid-dev" / f"{name}.mp3")
    table = tmp_path / "cv-valid-dev.csv"
    table.write_text(
        FIRST_EDITION
        + "cv-valid-dev/a.mp3,the shop is closed,1,0,,,,\n"
        + "cv-valid-dev/b.mp3,i've got to go,2,2,,,,\n"
        + "cv-valid-dev/c.mp3,nobody said this,1,2,,,,\n"
    )
    return table


@pytest.fixture
def librispeech(tmp_path):
    chapter = tmp_path / "LibriSpeech" / "train-clean-5" / "19" / "198"
    for name in ("19-198-0000", "19-198-0001"):
        record(chapter / f"{name}.flac", 1.5)
    (chapter / "19-198.trans.txt").write_text("19-198-0000 NORTHANGER ABBEY\n19-198-0001 THE MORLANDS WERE\n")
    return tmp_path / "LibriSpeech" / "train-clean-5"


def rows_of(manifest):
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def test_the_first_edition_names_clips_from_the_folder_of_its_table(first_edition, tmp_path):
    output = tmp_path / "manifests" / "train.jsonl"
    output.parent.mkdir()
    counts = public_speech.write([first_edition], output)
    assert counts == {"written": 2, "rejected": 1}
    assert [row["text"] for row in rows_of(output)] == ["the shop is closed", "i've got to go"]
    assert [row["audio"] for row in rows_of(output)] == ["../cv-valid-dev/a.mp3", "../cv-valid-dev/b.mp3"]
    assert all(row["duration"] == pytest.approx(2.0, abs=0.1) and row["language"] == "en" for row in rows_of(output))


def test_later_editions_have_speakers_and_quotation_marks_that_quote_nothing(tmp_path):
    record(tmp_path / "clips" / "a.mp3")
    table = tmp_path / "validated.tsv"
    table.write_text(LATER_EDITION + 'ann\ta.mp3\t"Let X be a point.\t2\t0\nbob\tb.mp3\tIt rains, again.\t2\t0\n')
    output = tmp_path / "train.jsonl"
    counts = public_speech.write([table], output, language="en")
    assert counts == {"written": 1, "absent": 1}
    (row,) = rows_of(output)
    assert (row["audio"], row["text"], row["speaker"]) == ("clips/a.mp3", '"Let X be a point.', "ann")


def test_librispeech_is_read_below_its_folder_in_lower_case(librispeech, tmp_path):
    output = tmp_path / "train.jsonl"
    public_speech.main([str(librispeech), "--output", str(output)])
    first, second = rows_of(output)
    assert first["audio"] == "LibriSpeech/train-clean-5/19/198/19-198-0000.flac"
    assert (first["text"], first["speaker"], second["text"]) == ("northanger abbey", "19", "the morlands were")


@pytest.mark.parametrize("part", ["test-clean", "dev-other"])
def test_parts_that_others_evaluate_on_are_refused(librispeech, part):
    held_out = librispeech.rename(librispeech.with_name(part))
    with pytest.raises(ValueError, match=f"{part} is there to evaluate"):
        list(public_speech.read_librispeech(held_out))


def test_a_folder_further_up_says_nothing_of_the_part(librispeech):
    home = librispeech.parent.rename(librispeech.parent.with_name("test-user"))
    assert len(list(public_speech.read_librispeech(home / librispeech.name))) == 2


def test_what_is_written_loads_as_training_data(first_edition, librispeech, tmp_path):
    output = tmp_path / "train.jsonl"
    public_speech.write([first_edition, librispeech], output)
    assert len(load_sources([output])) == 4


def test_recordings_that_cannot_be_of_their_text_are_left_out(tmp_path):
    texts = {"long": 21.0, "short": 0.2, "slow": 10.0, "fast": 0.6}
    rows = ""
    for name, seconds in texts.items():
        record(tmp_path / f"{name}.wav", seconds)
        rows += f"{name}.wav,{'a' if name == 'slow' else 'a sentence of thirty letters ok'},1,0,,,,\n"
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    record(tmp_path / "right.wav")
    table = tmp_path / "table.csv"
    table.write_text(FIRST_EDITION + rows + "broken.wav,a sentence,1,0,,,,\nright.wav,a sentence,1,0,,,,\n")
    counts = public_speech.write([table], tmp_path / "train.jsonl")
    assert counts == {"written": 1, "unlikely": 4, "broken": 1}


def test_excluded_texts_are_left_out_however_they_are_spelled(first_edition, tmp_path, capsys):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("The shop is closed!\n")
    output = tmp_path / "train.jsonl"
    public_speech.main([str(first_edition), "--output", str(output), "--exclude", str(held_out)])
    assert [row["text"] for row in rows_of(output)] == ["i've got to go"]
    assert "1 recordings; left out 1 excluded, 1 rejected" in capsys.readouterr().out


def test_a_manifest_is_made_again_but_one_of_other_speech_is_kept(first_edition, tmp_path):
    output = tmp_path / "train.jsonl"
    public_speech.write([first_edition], output)
    public_speech.write([first_edition], output)
    other = '{"audio": "mine.wav", "text": "mine"}\n'
    output.write_text(other)
    with pytest.raises(ValueError, match="no manifest of public speech"):
        public_speech.write([first_edition], output)
    assert output.read_text() == other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("filename,words\na.mp3,hello\n", "line 2.*up_votes"),
        (FIRST_EDITION + "a.mp3,hello,many,0,,,,\n", "line 2.*many"),
        (FIRST_EDITION, "No recording remains .no rows."),
        (FIRST_EDITION + "a.mp3,hello there,1,0,,,,\n", "No recording remains .1 absent."),
    ],
)
def test_tables_without_speech_are_named_with_the_remedy(tmp_path, content, message):
    table = tmp_path / "table.csv"
    table.write_text(content)
    with pytest.raises(ValueError, match=message):
        public_speech.write([table], tmp_path / "train.jsonl")
    assert not (tmp_path / "train.jsonl").exists()


def test_sources_that_are_none_are_named_on_the_command_line(tmp_path, capsys):
    for source, message in ((tmp_path, "no `*.trans.txt`"), (tmp_path / "absent.csv", "cannot be read as a table")):
        with pytest.raises(SystemExit):
            public_speech.main([str(source), "--output", str(tmp_path / "train.jsonl")])
        assert message in capsys.readouterr().err


def test_a_line_of_librispeech_without_text_is_named(librispeech):
    next(librispeech.rglob("*.trans.txt")).write_text("19-198-0000\n")
    with pytest.raises(ValueError, match="trans.txt line 1: '19-198-0000' is no name with a text"):
        list(public_speech.read_librispeech(librispeech))

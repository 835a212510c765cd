"""Sources of every kind are read, and what is wrong with one is named with its line."""

from pathlib import Path

import datasets
import pytest

from echo_hf.data import load_sources
from tones import write_manifest, write_three_tones, write_tone


@pytest.fixture
def manifest(tmp_path):
    return write_three_tones(tmp_path)


def test_manifest_paths_are_relative_to_its_folder_and_columns_are_kept(manifest, monkeypatch):
    monkeypatch.chdir(manifest.parent.parent)
    table = load_sources("speech/train.jsonl")
    assert table["text"][:] == ["one", "two two", "three"]
    assert table["speaker"][:] == ["s0", "s1", "s2"]
    assert table["age"][:] == [20, 21, 22]
    assert [Path(row["audio"]["path"]).name for row in table] == ["0.wav", "1.wav", "2.wav"]
    assert all(Path(row["audio"]["path"]).is_absolute() for row in table)
    assert "train.jsonl line 2" in table["origin"][1]


def test_manifest_may_have_blank_lines_a_byte_order_mark_and_mixed_extras(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [
        '{"audio": "a.wav", "text": "é", "x": 1, "y": [1]}',
        "",
        '{"audio": "b.wav", "text": "b", "x": "n", "z": {}}',
    ]
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    table = load_sources(path)
    assert table["text"][:] == ["é", "b"]
    assert table["x"][:] == ["1", "n"]
    assert "m.jsonl line 3" in table["origin"][1]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "manifest is empty"),
        ("\n\n", "manifest is empty"),
        ('{"audio": "a.wav", "text": "a"}\n{"audio"', "m.jsonl line 2: not JSON"),
        ("[1, 2]\n", "m.jsonl line 1: must be a JSON object"),
        (
            '{"audio": "a.wav", "text": "a"}\n{"audio": "b.wav", "txt": "b"}\n',
            "line 2: 'text' must be a string; it has",
        ),
        ('{"path": "a.wav", "text": "a"}\n', "line 1: 'audio' must be a string; it has path, text"),
        ('{"audio": "a.wav", "text": 5}\n', "line 1: 'text' must be a string; got 5"),
        ('{"audio": "a.wav", "text": "\\ud83d"}\n', "line 1: 'text' has half of a surrogate pair"),
    ],
)
def test_bad_manifest_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_sources(tmp_path / "m.jsonl")


def test_manifest_that_is_not_text_is_named(manifest):
    with pytest.raises(ValueError, match=r"0\.wav: not UTF-8"):
        load_sources(manifest.parent / "clips" / "0.wav")


def test_folder_with_texts_beside_the_audio(manifest):
    folder = manifest.parent / "clips"
    for number in range(3):
        (folder / f"{number}.txt").write_text(f" text {number}\n")
    table = load_sources(folder)
    assert table["text"][:] == ["text 0", "text 1", "text 2"]
    (folder / "1.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"1\.txt: not UTF-8 text"):
        load_sources(folder)
    (folder / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 audio files have no text .*1\.txt"):
        load_sources(folder)


def test_folder_with_metadata(tmp_path):
    write_tone(tmp_path / "a.wav")
    write_manifest(tmp_path / "metadata.jsonl", [{"file_name": "a.wav", "text": "hello"}])
    assert load_sources(tmp_path)["text"][:] == ["hello"]


def test_folder_without_audio_names_the_manifests_in_it(manifest):
    (manifest.parent / "empty").mkdir()
    with pytest.raises(ValueError, match="no audio files"):
        load_sources(manifest.parent / "empty")
    (manifest.parent / "empty" / "dev.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"Did you mean one of its manifests: .*dev\.jsonl"):
        load_sources(manifest.parent / "empty")


def test_lists_that_differ_between_sources_become_text(tmp_path):
    write_tone(tmp_path / "a.wav")
    written = write_manifest(tmp_path / "a.jsonl", [{"audio": "a.wav", "text": "a", "words": ["a", 1]}])
    audio = [{"bytes": None, "path": str(tmp_path / "a.wav")}] * 2
    saved = datasets.Dataset.from_dict({"audio": audio, "text": ["b", "c"], "words": [["b"], None]})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert load_sources([written, tmp_path / "saved"])["words"][:] == ['["a", 1]', '["b"]', None]


def test_missing_source_is_named(monkeypatch):
    with pytest.raises(ValueError, match="no such file or folder"):
        load_sources("nowhere/train.jsonl")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: asked.append(name) or [])
    with pytest.raises(ValueError, match="cannot be used"):
        load_sources("someone/speech_v1.0")  # of the Hub
    assert asked == ["someone/speech_v1.0"]
    with pytest.raises(ValueError, match="No source"):
        load_sources([])

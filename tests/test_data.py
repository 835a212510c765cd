"""Sources are read, rows are checked before work is done, features are computed once, and batches are as promised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch

from echo_hf import EchoFeatureExtractor
from echo_hf import EchoProcessor
from echo_hf import EchoTokenizer
from echo_hf import data
from echo_hf.data import EchoDataCollator
from echo_hf.data import load_sources
from echo_hf.data import prepare_dataset

RATE = 16000


@pytest.fixture(scope="module")
def processor():
    return EchoProcessor(EchoFeatureExtractor(feature_groups={"spectrogram": 8, "pitch": 1}), EchoTokenizer())


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def write_tone(path: Path, seconds: float = 0.3, frequency: float = 150.0, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * rate)) / rate
    harmonics = [np.sin(2 * np.pi * frequency * number * times) / number for number in (1, 2, 3, 4)]
    soundfile.write(path, 0.3 * np.sum(harmonics, axis=0), rate)
    return path


def write_manifest(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def manifest(tmp_path):
    """Three tones in a folder below the manifest's: 0.3, 0.4 and 0.5 seconds."""
    rows = []
    for number, text in enumerate(("one", "two two", "three")):
        write_tone(tmp_path / "speech" / "clips" / f"{number}.wav", seconds=0.3 + 0.1 * number)
        rows.append({"audio": f"clips/{number}.wav", "text": text, "speaker": f"s{number}", "age": 20 + number})
    return write_manifest(tmp_path / "speech" / "train.jsonl", rows)


# Sources -------------------------------------------------------------------------------------------------------------


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


def test_dataset_on_disk_needs_no_decoder(manifest, tmp_path, processor, cache_dir):
    wave = (manifest.parent / "clips" / "0.wav").read_bytes()
    table = datasets.Dataset.from_dict({"sound": [{"bytes": wave, "path": None}] * 2, "said": ["a", "b"]})
    table = table.cast_column("sound", datasets.Audio(decode=False))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"choose one of its splits \(train\)"):
        load_sources(tmp_path / "saved", audio_column="sound", text_column="said")
    with pytest.raises(ValueError, match="no column 'audio' among sound, said"):
        load_sources(tmp_path / "saved", split="train")
    loaded = load_sources(tmp_path / "saved", split="train", audio_column="sound", text_column="said")
    prepared = prepare_dataset(loaded, processor, cache_dir=cache_dir)
    assert [row["input_features"].shape for row in prepared.dataset] == [(30, 9), (30, 9)]


def test_texts_of_a_dataset_must_be_strings_and_be_there(manifest, tmp_path, checking_processor):
    audio = [{"bytes": None, "path": str(manifest.parent / "clips" / "0.wav")}] * 2
    datasets.Dataset.from_dict({"audio": audio, "text": [1, 2]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(ValueError, match="column 'text' must hold strings"):
        load_sources(tmp_path / "numbers")
    datasets.Dataset.from_dict({"audio": audio, "text": ["a", None]}).save_to_disk(str(tmp_path / "gaps"))
    with pytest.raises(ValueError, match="gaps row 1: there is no text"):
        prepare_dataset(load_sources(tmp_path / "gaps"), checking_processor, allow_empty_text=True)


def test_sources_are_concatenated_in_order(manifest, tmp_path, processor, cache_dir):
    write_tone(tmp_path / "more" / "x.flac")
    (tmp_path / "more" / "x.txt").write_text("four")
    other = write_manifest(tmp_path / "other.jsonl", [{"audio": "more/x.flac", "text": "five", "age": "unknown"}])
    table = load_sources([manifest, tmp_path / "more", other])
    assert table["text"][:] == ["one", "two two", "three", "four", "five"]
    assert table["age"][:] == ["20", "21", "22", None, "unknown"]
    prepared = prepare_dataset(table, processor, cache_dir=cache_dir)
    assert prepared.dataset["text"][:] == table["text"][:]
    assert prepared.dataset["speaker"][:] == ["s0", "s1", "s2", None, None]


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


# Checks --------------------------------------------------------------------------------------------------------------


class NoExtractor:
    """Stands for the feature extractor where nothing may be computed."""

    def __getattr__(self, name):
        raise AssertionError(f"features were asked for ({name})")


@pytest.fixture
def checking_processor(processor):
    class Checking:
        tokenizer = processor.tokenizer
        feature_extractor = NoExtractor()

    return Checking()


def test_missing_files_are_named_before_anything_is_computed(manifest, checking_processor):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[1:1] = [{"audio": f"clips/gone{number}.wav", "text": "x"} for number in range(8)]
    write_manifest(manifest, rows)
    with pytest.raises(ValueError, match=r"8 of 11 .*line 2 \(clips/gone0\.wav\).*and 3 more") as caught:
        prepare_dataset(load_sources(manifest), checking_processor)
    assert "gone4" in str(caught.value) and "gone5" not in str(caught.value)


def test_a_row_without_audio_is_named_or_left_out(manifest, processor, cache_dir):
    table = load_sources(manifest)
    audio = [None, *table["audio"][1:]]
    table = table.remove_columns("audio").add_column("audio", audio, feature=table.features["audio"])
    with pytest.raises(ValueError, match="line 1.*: (there is no audio|the audio cannot be read)"):
        prepare_dataset(table, processor, cache_dir=cache_dir)
    kept = prepare_dataset(table, processor, cache_dir=cache_dir, skip_broken=True)
    assert kept.dataset["text"][:] == ["two two", "three"] and len(kept.skipped) == 1


def test_empty_and_long_texts_are_named(manifest, checking_processor, processor, cache_dir):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[2]["text"] = " "
    write_manifest(manifest, rows)
    table = load_sources(manifest)
    with pytest.raises(ValueError, match="line 3 .*: the text is empty"):
        prepare_dataset(table, checking_processor)
    # "two two" is 7 bytes, and 9 tokens with begin and end of sequence.
    with pytest.raises(ValueError, match="line 2 .*: the text has 9 tokens, the model takes 8"):
        prepare_dataset(table, checking_processor, max_label_length=8, allow_empty_text=True)
    prepared = prepare_dataset(table, processor, max_label_length=9, allow_empty_text=True, cache_dir=cache_dir)
    assert prepared.dataset["text"][:] == ["one", "two two", " "]


def test_a_text_that_would_exhaust_memory_is_named_and_never_tokenized(manifest, checking_processor, monkeypatch):
    """The native code of tokenizer and alignment ends the process where memory runs out."""
    monkeypatch.setattr("echo_hf.data.MAX_CHARACTERS", 6)
    tokenized = []

    def tokenize(texts):
        tokenized.extend(texts)
        return {"input_ids": [[0] for _ in texts]}

    checking_processor.tokenizer = tokenize
    with pytest.raises(ValueError, match="line 2 .*: the text has 7 characters, and an utterance at most 6"):
        prepare_dataset(load_sources(manifest), checking_processor)
    assert tokenized == ["one", "two tw", "three"]


def test_durations_outside_the_limits_are_left_out(manifest, processor, cache_dir):
    table = load_sources(manifest)
    prepared = prepare_dataset(table, processor, min_seconds=0.35, max_seconds=0.45, cache_dir=cache_dir)
    assert prepared.dataset["text"][:] == ["two two"]
    assert prepared.seconds == pytest.approx(0.4)
    assert [reason for _, reason in prepared.skipped] == ["0.30 s is too short", "0.50 s is too long"]
    with pytest.raises(ValueError, match="None of the 3 utterances"):
        prepare_dataset(table, processor, min_seconds=9, cache_dir=cache_dir)


@pytest.mark.parametrize("kind", ["header", "not finite"])
def test_broken_file_is_an_error_or_skipped(manifest, processor, cache_dir, kind):
    broken = manifest.parent / "clips" / "1.wav"
    if kind == "header":
        broken.write_bytes(b"this is not audio")
    else:  # found only when features are computed
        soundfile.write(broken, np.full(4000, np.nan), RATE, subtype="FLOAT")
    table = load_sources(manifest)
    with pytest.raises(ValueError, match=r"train\.jsonl line 2 \(clips/1\.wav\).*skip_broken"):
        prepare_dataset(table, processor, cache_dir=cache_dir)
    prepared = prepare_dataset(table, processor, skip_broken=True, cache_dir=cache_dir)
    assert prepared.dataset["text"][:] == ["one", "three"]
    assert prepared.dataset["length"][:] == [30, 50]
    assert prepared.seconds == pytest.approx(0.8)
    assert len(prepared.skipped) == 1 and "line 2" in prepared.skipped[0][0]
    # The features that were computed leaving it out do not hide it from a run that must not.
    with pytest.raises(ValueError, match="line 2"):
        prepare_dataset(table, processor, cache_dir=cache_dir)


def test_all_that_cannot_be_decoded_is_named_and_the_rest_computed_once(manifest, processor, cache_dir, monkeypatch):
    for number in (0, 2):
        soundfile.write(manifest.parent / "clips" / f"{number}.wav", np.full(4000, np.nan), RATE, subtype="FLOAT")
    table = load_sources(manifest)
    with pytest.raises(ValueError, match=r"2 of 3 utterances cannot be used: .*line 1.*line 3.*`skip_broken`"):
        prepare_dataset(table, processor, cache_dir=cache_dir)
    monkeypatch.setattr(data, "_extract", lambda *_, **__: pytest.fail("features were computed again"))
    prepared = prepare_dataset(table, processor, skip_broken=True, cache_dir=cache_dir)
    assert prepared.dataset["text"][:] == ["two two"] and len(prepared.skipped) == 2


def test_odd_values_of_a_manifest_are_kept_or_named(tmp_path, processor, cache_dir):
    write_tone(tmp_path / "a.wav")
    row = {"audio": "a.wav", "text": "one"}
    table = load_sources(write_manifest(tmp_path / "large.jsonl", [{**row, "id": 2**70}, {**row, "id": 7}]))
    assert table["id"][:] == [str(2**70), "7"]
    with pytest.raises(ValueError, match=r"half\.jsonl line 2: 'speaker' has half of a surrogate pair"):
        load_sources(write_manifest(tmp_path / "half.jsonl", [{**row, "speaker": "s"}, {**row, "speaker": "\ud83d"}]))
    table = load_sources(write_manifest(tmp_path / "nul.jsonl", [row, {**row, "audio": "a\0.wav"}]))
    with pytest.raises(ValueError, match=r"nul\.jsonl line 2 .*the audio cannot be read: .*null"):
        prepare_dataset(table, processor, cache_dir=cache_dir)


def test_a_class_of_another_module_has_features_of_its_own():
    class Louder(EchoFeatureExtractor):
        pass

    settings = {"feature_groups": {"spectrogram": 8, "pitch": 1}}
    names = {
        data.features_fingerprint(kind(**settings), identities)
        for kind in (EchoFeatureExtractor, Louder)
        for identities in (["a"], ["b"])
    }
    assert len(names) == 4


# Features ------------------------------------------------------------------------------------------------------------


def test_features_are_the_extractors_in_float32(manifest, processor, cache_dir):
    prepared = prepare_dataset(load_sources(manifest), processor, cache_dir=cache_dir)
    for row, number in zip(prepared.dataset, range(3)):
        expected = processor.feature_extractor(manifest.parent / "clips" / f"{number}.wav")["input_features"][0]
        assert row["input_features"].dtype == np.float32
        np.testing.assert_array_equal(row["input_features"], expected)
        assert row["length"] == len(expected)
        assert row["labels"] == processor.tokenizer(row["text"])["input_ids"]
    f0 = prepared.dataset[2]["input_features"][:, -1]
    assert np.median(f0[f0 > 0]) == pytest.approx(150, rel=0.01)


def test_other_sampling_rates_are_resampled(tmp_path, processor, cache_dir):
    write_tone(tmp_path / "a.wav", seconds=0.4, rate=8000)
    write_manifest(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "a"}])
    prepared = prepare_dataset(load_sources(tmp_path / "m.jsonl"), processor, cache_dir=cache_dir)
    assert prepared.dataset["length"][:] == [40]


def count_computed(monkeypatch) -> list:
    computed = []
    extract = data._extract

    def counting(batch, **kwargs):
        computed.extend(audio["path"] for audio in batch["audio"])
        return extract(batch, **kwargs)

    monkeypatch.setattr(data, "_extract", counting)
    return computed


def test_features_are_computed_once(manifest, processor, cache_dir, monkeypatch):
    computed = count_computed(monkeypatch)
    first = prepare_dataset(load_sources(manifest), processor, cache_dir=cache_dir)
    assert len(computed) == 3
    # Another tokenizer, other texts: same features.
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    write_manifest(manifest, [{**row, "text": "other"} for row in rows])
    other = EchoProcessor(processor.feature_extractor, EchoTokenizer().train_new_from_iterator(["other"] * 3, 262))
    second = prepare_dataset(load_sources(manifest), other, cache_dir=cache_dir)
    assert len(computed) == 3
    np.testing.assert_array_equal(first.dataset[1]["input_features"], second.dataset[1]["input_features"])
    assert second.dataset["text"][:] == ["other"] * 3
    assert first.dataset["labels"][:] != second.dataset["labels"][:]


def test_features_of_a_source_serve_beside_others(manifest, tmp_path, processor, cache_dir, monkeypatch):
    """What was computed of each alone is not computed again of both, in either order; nor is a source's own column of
    that name taken for where a row comes from."""
    write_tone(tmp_path / "more" / "x.wav", frequency=200.0)
    row = {"audio": "more/x.wav", "text": "four", "source": "radio"}
    other = write_manifest(tmp_path / "other.jsonl", [row, {**row, "source": "books"}])
    computed = count_computed(monkeypatch)
    alone = [prepare_dataset(load_sources(source), processor, cache_dir=cache_dir) for source in (manifest, other)]
    assert len(computed) == 5
    for first, second in ((0, 1), (1, 0)):
        sources = [(manifest, other)[index] for index in (first, second)]
        both = prepare_dataset(load_sources(sources), processor, cache_dir=cache_dir).dataset
        assert both["text"][:] == alone[first].dataset["text"][:] + alone[second].dataset["text"][:]
        np.testing.assert_array_equal(both[-1]["input_features"], alone[second].dataset[-1]["input_features"])
    assert len(computed) == 5
    assert set(both["source"]) == {str(manifest), str(other)}


def test_a_source_named_several_times_is_computed_once(manifest, processor, cache_dir, monkeypatch):
    computed = count_computed(monkeypatch)
    sources = [manifest, manifest, manifest]
    dataset = prepare_dataset(load_sources(sources), processor, cache_dir=cache_dir, max_seconds=0.45).dataset
    assert len(computed) == 2
    assert dataset["text"][:] == ["one", "two two"] * 3
    np.testing.assert_array_equal(dataset[1]["input_features"], dataset[5]["input_features"])


def test_changed_audio_or_settings_are_computed_again(manifest, processor, cache_dir, monkeypatch):
    computed = count_computed(monkeypatch)
    prepare_dataset(load_sources(manifest), processor, cache_dir=cache_dir)
    write_tone(manifest.parent / "clips" / "0.wav", seconds=0.6)
    prepared = prepare_dataset(load_sources(manifest), processor, cache_dir=cache_dir)
    assert len(computed) == 6 and prepared.dataset["length"][0] == 60
    extractor = EchoFeatureExtractor(feature_groups={"spectrogram": 8, "pitch": 1}, f0_max=400.0)
    prepare_dataset(load_sources(manifest), EchoProcessor(extractor, processor.tokenizer), cache_dir=cache_dir)
    assert len(computed) == 9


def test_another_process_computes_nothing(manifest, processor, cache_dir, monkeypatch, tmp_path):
    """The fingerprint does not hang on the process, on hash randomisation, or on saving and loading the processor."""
    processor.save_pretrained(tmp_path / "processor")
    code = f"""
from echo_hf import EchoProcessor
from echo_hf.data import load_sources, prepare_dataset
processor = EchoProcessor.from_pretrained({str(tmp_path / "processor")!r})
prepare_dataset(load_sources({str(manifest)!r}), processor, num_proc=2, cache_dir={str(cache_dir)!r})
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    assert len(list(cache_dir.glob("features-*_of_00002.arrow"))) == 2
    computed = count_computed(monkeypatch)
    prepared = prepare_dataset(load_sources(manifest), processor, cache_dir=cache_dir)
    assert computed == []
    assert prepared.dataset["length"][:] == [30, 40, 50]


# Batches -------------------------------------------------------------------------------------------------------------


def test_collator_pads_and_strips_the_begin_of_sequence(manifest, processor, cache_dir):
    prepared = prepare_dataset(load_sources(manifest), processor, cache_dir=cache_dir)
    batch = EchoDataCollator(processor)(list(prepared.dataset))
    assert set(batch) == {"input_features", "attention_mask", "labels"}
    assert batch["input_features"].shape == (3, 50, 9) and batch["input_features"].dtype == torch.float32
    assert batch["attention_mask"].sum(-1).tolist() == [30, 40, 50]
    assert not batch["input_features"][0, 30:].any()
    tokenizer = processor.tokenizer
    assert batch["labels"].shape == (3, 8)
    for row, text in zip(batch["labels"], prepared.dataset["text"]):
        ids = row[row != -100].tolist()
        assert ids == tokenizer(text)["input_ids"][1:]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (batch["labels"][0, 4:] == -100).all()


def test_collator_strips_one_begin_at_the_front_only(processor):
    rows = [
        {"input_features": np.ones((4, 9), np.float32), "labels": [5, 1, 2]},
        {"input_features": np.ones((4, 9), np.float32), "labels": [1, 1, 2]},
    ]
    assert EchoDataCollator(processor)(rows)["labels"].tolist() == [[5, 1, 2], [1, 2, -100]]


def test_what_perturbs_a_batch_hangs_on_seed_epoch_and_batch_alone(processor):
    """Not on the batches before it, so that a run that is resumed hears the same."""

    def perturb(utterances, chance):
        return [features * chance.random() for features in utterances]

    def heard(rows, **settings):
        return EchoDataCollator(processor, perturb=perturb, **settings)(rows)["input_features"][:, 0, 0].tolist()

    first = [{"input_features": np.ones((4, 9), np.float32), "labels": [5, 2]}] * 3
    second = [{"input_features": np.ones((4, 9), np.float32), "labels": [6, 2]}] * 3
    collator = EchoDataCollator(processor, perturb=perturb, seed=1)
    batches = [collator(rows)["input_features"][:, 0, 0].tolist() for rows in (first, second, first)]
    assert batches[0] == batches[2] == heard(first, seed=1)
    assert batches[1] == heard(second, seed=1)
    assert len(set(batches[0])) == 3  # each utterance has its own
    others = [batches[1], heard(first, seed=2), heard(first, seed=1, epoch=1)]
    assert all(set(batches[0]).isdisjoint(other) for other in others)

    def draws_anew(utterances, chance):
        return [features * (chance is None) for features in utterances]

    streamed = EchoDataCollator(processor, perturb=draws_anew, epoch=None)
    assert streamed(first)["input_features"].all()


def joinable(processor, texts, language, frames=50, start=0):
    """Rows whose features say which they are."""
    return [
        {
            "input_features": np.full((frames, 9), start + number, np.float32),
            "labels": processor.tokenizer(text)["input_ids"],
            "text": text,
            "language": language,
        }
        for number, text in enumerate(texts)
    ]


def test_joined_utterances_are_those_of_the_batch_with_their_texts(processor):
    english = joinable(processor, ["one", "two", "", "four", "five"], "en", start=1)
    french = joinable(processor, ["deux", "trois"], "fr", start=6)
    rows = [english[0], french[0], english[1], french[1], *english[2:]]
    said, counts = {index + 1: row["text"] for index, row in enumerate(english + french)}, set()
    for epoch in range(20):
        batch = EchoDataCollator(processor, join=1.0, epoch=epoch)(rows)
        assert set(batch) == {"input_features", "attention_mask", "labels"}
        heard = []
        for features, mask, labels in zip(*(batch[name] for name in ("input_features", "attention_mask", "labels"))):
            parts = [int(value) for value in features[mask.bool(), 0][::50]]
            heard += parts
            assert mask.sum() == 50 * len(parts)
            assert len({part > 5 for part in parts}) == 1, "languages are not joined"
            ids = labels[labels != -100].tolist()
            expected = " ".join(said[part] for part in parts if said[part])
            assert ids == processor.tokenizer(expected)["input_ids"][1:]
        assert sorted(heard) == list(range(1, 8))
        counts.add(len(batch["labels"]))
    assert len(counts) > 1 and max(counts) < 7, "another number at a time, and never each alone"


def test_joining_is_as_frequent_as_asked_and_stops_at_its_limits(processor):
    rows = joinable(processor, ["a word"] * 6, "en", frames=600)
    for limit, lengths in ((None, [1800, 1800]), (17, [1200, 1200, 1200]), (15, [600] * 6)):
        # 20 s hold three of 6 s. Each text has 8 tokens, and three of them joined 22.
        made = [
            EchoDataCollator(processor, join=1.0, max_label_length=limit, epoch=epoch)(rows)["attention_mask"].sum(-1)
            for epoch in range(10)
        ]
        assert lengths in [lengths_made.tolist() for lengths_made in made]
        assert all(max(lengths_made) <= max(lengths) for lengths_made in made)
    joined = sum(len(EchoDataCollator(processor, join=0.3, epoch=epoch)(rows)["labels"]) < 6 for epoch in range(200))
    assert 40 <= joined <= 80
    shorter = [EchoDataCollator(processor, join=1.0, max_joined_seconds=13, epoch=epoch)(rows) for epoch in range(10)]
    assert all(batch["input_features"].shape == (3, 1200, 9) for batch in shorter)


def test_what_cannot_be_joined_is_refused(processor):
    rows = joinable(processor, ["a word"] * 2, "en")
    for name in ("text", "labels"):
        incomplete = [*rows, {**rows[0], name: None}]
        with pytest.raises(ValueError, match=r"a row has no `text` or no `labels`.*remove_unused_columns"):
            EchoDataCollator(processor, join=0.01)(incomplete)
    extractor = EchoFeatureExtractor(feature_groups={"spectrogram": 8, "phase": 1, "pitch": 1})
    with pytest.raises(ValueError, match="'phase' cannot be joined"):
        EchoDataCollator(EchoProcessor(extractor, EchoTokenizer()), join=0.1)


def test_collator_without_labels_and_with_a_fixed_multiple(processor):
    rows = [{"input_features": np.ones((length, 9), np.float32), "text": "left aside"} for length in (3, 5)]
    batch = EchoDataCollator(processor, pad_to_multiple_of=8)(rows)
    assert set(batch) == {"input_features", "attention_mask"}
    assert batch["input_features"].shape == (2, 8, 9)
    assert batch["attention_mask"].sum(-1).tolist() == [3, 5]

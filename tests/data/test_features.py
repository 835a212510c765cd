"""Rows are checked before work is done, and features are computed once."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import soundfile

from echo_hf import EchoFeatureExtractor, EchoProcessor, EchoTokenizer
from echo_hf.data import features, load_sources, prepare_dataset
from tones import RATE, write_manifest, write_three_tones, write_tone


@pytest.fixture(scope="module")
def processor():
    return EchoProcessor(EchoFeatureExtractor(feature_groups={"spectrogram": 8, "pitch": 1}), EchoTokenizer())


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def manifest(tmp_path):
    return write_three_tones(tmp_path)


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
    table, tokenized = load_sources(manifest), []
    for module in ("sources", "features"):
        monkeypatch.setattr(f"echo_hf.data.{module}.MAX_CHARACTERS", 6)

    def tokenize(texts):
        tokenized.extend(texts)
        return {"input_ids": [[0] for _ in texts]}

    checking_processor.tokenizer = tokenize
    with pytest.raises(ValueError, match="line 2 .*: the text has 7 characters, and a transcript has at most 6"):
        prepare_dataset(table, checking_processor)
    assert tokenized == ["one", "two tw", "three"]
    with pytest.raises(ValueError, match="line 2 .*: the text has 7 characters.*the transcript of this recording"):
        load_sources(manifest)


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
    monkeypatch.setattr(features, "_extract", lambda *_, **__: pytest.fail("features were computed again"))
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
        features.features_fingerprint(kind(**settings), identities)
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
    extract = features._extract

    def counting(batch, **kwargs):
        computed.extend(audio["path"] for audio in batch["audio"])
        return extract(batch, **kwargs)

    monkeypatch.setattr(features, "_extract", counting)
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

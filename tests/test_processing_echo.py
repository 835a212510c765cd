"""The processor is its two parts, joined so that what it returns can be given to the model."""

import json
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer, TokenizersBackend, WhisperFeatureExtractor

from conftest import SAMPLING_RATE, voice
from echo_hf import EchoFeatureExtractor, EchoForConditionalGeneration, EchoProcessor, EchoTokenizer


@pytest.fixture(scope="module")
def processor():
    return EchoProcessor(EchoFeatureExtractor(), EchoTokenizer())


def test_audio_is_the_extractors(processor):
    audio = [voice(0.5), voice(0.8)]
    ours = processor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    extractors = processor.feature_extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    assert ours.keys() == extractors.keys() == {"input_features", "attention_mask"}
    assert all(torch.equal(ours[key], extractors[key]) for key in ours)


def test_text_is_the_tokenizers(processor):
    assert dict(processor(text="hi")) == dict(processor.tokenizer("hi"))
    assert dict(processor(text=["hi", "hello"])) == dict(processor.tokenizer(["hi", "hello"], padding=True))
    assert processor(text=["hi", "hello"], return_tensors="pt")["input_ids"].shape == (2, 7)


def test_text_with_audio_becomes_labels(processor):
    batch = processor([voice(0.5), voice(0.8)], ["hi", "hello"], SAMPLING_RATE, return_tensors="pt")
    assert batch["input_features"].shape == (2, 80, 81)
    assert batch["labels"].dtype == torch.long
    first, second = batch["labels"].tolist()
    assert second == processor.tokenizer.encode("hello")[1:]
    assert first == processor.tokenizer.encode("hi")[1:] + [0, 0, 0]
    assert processor.batch_decode(batch["labels"], skip_special_tokens=True) == ["hi", "hello"]


def test_model_trains_on_a_batch(processor, checkpoint):
    model = EchoForConditionalGeneration.from_pretrained(checkpoint)
    batch = processor([voice(0.5), voice(0.8)], ["hi", "hello"], SAMPLING_RATE, return_tensors="pt")
    loss = model(**batch).loss
    # The padding of labels does not count.
    batch["labels"][batch["labels"] == 0] = -100
    torch.testing.assert_close(model(**batch).loss, loss)


def test_single_recording_without_tensors(processor):
    single = processor(voice(0.5), "hi", SAMPLING_RATE)
    assert single["labels"] == processor.tokenizer.encode("hi")[1:]
    assert single["input_features"].shape == (1, 50, 81)


def test_options_reach_the_part_that_knows_them(processor):
    batch = processor(
        voice(0.5, sampling_rate=8000),
        "hello",
        sampling_rate=8000,
        resample=True,
        audio_kwargs={"pad_to_multiple_of": 64},
        text_kwargs={"padding": "max_length", "max_length": 9},
        return_tensors="np",
    )
    assert batch["input_features"].shape == (1, 64, 81)
    assert batch["labels"].shape == (1, 9)
    truncated = processor(voice(0.5), "hello", SAMPLING_RATE, text_kwargs={"truncation": True, "max_length": 4})
    assert truncated["labels"] == processor.tokenizer.encode("he")[1:]
    assert type(processor(voice(0.5), sampling_rate=SAMPLING_RATE)["input_features"]) is np.ndarray


def test_typed_options_are_checked(processor):
    with pytest.raises(Exception, match="padding"):
        processor(voice(0.5), sampling_rate=SAMPLING_RATE, padding="no such padding")


def test_errors_name_the_remedy(processor):
    with pytest.raises(ValueError, match="audio, text or both"):
        processor()
    with pytest.raises(ValueError, match="2 recordings and 1 texts"):
        processor([voice(0.5), voice(0.5)], ["hi"], SAMPLING_RATE)
    with pytest.raises(ValueError, match="8000 Hz"):
        processor(voice(0.5), "hi", 8000)


def test_decoding_is_the_tokenizers(processor):
    ids = processor.tokenizer.encode("hé")
    assert processor.decode(ids, skip_special_tokens=True) == "hé"
    assert processor.batch_decode([ids, ids], skip_special_tokens=True) == ["hé", "hé"]
    assert processor.model_input_names == ["input_features", "attention_mask", "labels"]


def test_a_2d_array_is_a_batch(processor):
    audio = np.stack([voice(0.5), 0.5 * voice(0.5)[::-1]])
    batch = processor(audio, ["hi", "hello"], SAMPLING_RATE, return_tensors="pt")
    listed = processor(list(audio), ["hi", "hello"], SAMPLING_RATE, return_tensors="pt")
    assert all(torch.equal(batch[key], listed[key]) for key in listed) and len(batch["labels"]) == 2


def test_another_models_parts_are_named(processor, tmp_path):
    whisper = WhisperFeatureExtractor()
    with pytest.raises(ValueError, match="needs an EchoFeatureExtractor, got WhisperFeatureExtractor"):
        EchoProcessor(whisper, processor.tokenizer)
    with pytest.raises(ValueError, match="needs an EchoTokenizer, got TokenizersBackend"):
        EchoProcessor(processor.feature_extractor, TokenizersBackend(tokenizer_object=processor.tokenizer._tokenizer))
    with pytest.raises(ValueError, match="needs an EchoFeatureExtractor, got NoneType"):
        EchoProcessor(None, processor.tokenizer)
    # The same in a checkpoint.
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["feature_extractor"] = whisper.to_dict()
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="needs an EchoFeatureExtractor, got WhisperFeatureExtractor"):
        EchoProcessor.from_pretrained(tmp_path)


def test_a_subclass_is_a_part(processor):
    class QuietExtractor(EchoFeatureExtractor):
        pass

    assert EchoProcessor(QuietExtractor(), processor.tokenizer)(voice(0.5))["input_features"].shape == (1, 50, 81)


@pytest.mark.parametrize("auto_class", [EchoProcessor, AutoProcessor])
def test_saves_and_loads(processor, tmp_path, auto_class):
    trained = processor.tokenizer.train_new_from_iterator(["hello hello"] * 9, vocab_size=265, show_progress=False)
    extractor = EchoFeatureExtractor(feature_groups={"spectrogram": 40, "pitch": 1}, resample=True)
    saved = EchoProcessor(extractor, trained)
    saved.save_pretrained(tmp_path)
    for _ in range(2):  # what is loaded saves again
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is EchoProcessor
        assert loaded.feature_extractor.to_dict().items() >= extractor.to_dict().items()
        assert loaded.tokenizer.get_vocab() == trained.get_vocab()
        before, after = (x(voice(0.5), "hello", SAMPLING_RATE, return_tensors="pt") for x in (saved, loaded))
        assert all(torch.equal(before[key], after[key]) for key in before)
        loaded.save_pretrained(tmp_path)


def test_parts_load_from_the_processors_folder(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is EchoFeatureExtractor
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is EchoTokenizer
    references = json.loads((tmp_path / "processor_config.json").read_text())
    assert references["auto_map"]["AutoProcessor"] == "processing_echo.EchoProcessor"
    assert references["feature_extractor"]["auto_map"]["AutoFeatureExtractor"].startswith("feature_extraction_echo.")


def test_loads_from_a_whole_checkpoint(checkpoint):
    loaded = AutoProcessor.from_pretrained(checkpoint)
    assert type(loaded) is EchoProcessor
    assert loaded(voice(0.5), "hi", SAMPLING_RATE)["labels"] == [74, 75, 2]


def test_pickles(processor):
    again = pickle.loads(pickle.dumps(processor))
    assert again(text="hi") == processor(text="hi")
    assert np.array_equal(again(voice(0.5))["input_features"], processor(voice(0.5))["input_features"])

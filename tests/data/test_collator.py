"""Batches are padded, perturbed and joined as promised, the same whoever makes them."""

import numpy as np
import pytest
import torch

from echo_hf import EchoFeatureExtractor, EchoProcessor, EchoTokenizer
from echo_hf.data import EchoDataCollator, load_sources, prepare_dataset
from tones import write_three_tones


@pytest.fixture(scope="module")
def processor():
    return EchoProcessor(EchoFeatureExtractor(feature_groups={"spectrogram": 8, "pitch": 1}), EchoTokenizer())


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def manifest(tmp_path):
    return write_three_tones(tmp_path)


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


def test_collator_without_labels(processor):
    rows = [{"input_features": np.ones((length, 9), np.float32), "text": "left aside"} for length in (3, 5)]
    batch = EchoDataCollator(processor)(rows)
    assert set(batch) == {"input_features", "attention_mask"}
    assert batch["input_features"].shape == (2, 5, 9)
    assert batch["attention_mask"].sum(-1).tolist() == [3, 5]

"""Audio that is not speech: the same for the same seed, as loud as asked, and usable as utterances without words."""

import io
import json

import datasets
import numpy as np
import pytest
import soundfile

from conftest import voice
from echo_hf import EchoFeatureExtractor, EchoProcessor, EchoTokenizer
from echo_hf.data import load_sources, prepare_dataset
from echo_hf.data.non_speech import TRAINING_KINDS, make_signal, non_speech_table
from non_speech import FURTHER_KINDS

KINDS = TRAINING_KINDS | FURTHER_KINDS


def make(kind, seconds=1.0, seed=0, **options):
    return make_signal(KINDS[kind], seconds, np.random.default_rng(seed), **options)


def decibels(signal):
    return 10 * np.log10(np.mean(np.square(signal, dtype=np.float64)))


# Signals -------------------------------------------------------------------------------------------------------------


def test_no_kind_of_evaluation_is_trained_on():
    assert not set(TRAINING_KINDS) & set(FURTHER_KINDS)
    assert not set(TRAINING_KINDS.values()) & set(FURTHER_KINDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_form_and_determinism(kind):
    for seconds, rate in [(0.3, 16000), (1.0, 8000)]:
        signal = make(kind, seconds, sampling_rate=rate)
        assert signal.dtype == np.float32 and signal.shape == (round(seconds * rate),)
        assert np.abs(signal).max() <= 1
        assert np.array_equal(signal, make(kind, seconds, sampling_rate=rate))
    assert np.array_equal(make(kind), make(kind, seed=1)) == (kind == "zeros")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zeros"])
@pytest.mark.parametrize("level", [-60.0, -40.0])
def test_is_as_loud_as_asked(kind, level):
    for seed in range(3):
        assert decibels(make(kind, 2.0, seed, level=level)) == pytest.approx(level, abs=0.1)


def test_loud_clicks_do_not_clip():
    # A single impulse in a second cannot have the mean square of full scale: it gets softer and keeps its form.
    loud, soft = make("clicks", level=0.0), make("clicks", level=-60.0)
    assert np.abs(loud).max() == 1
    np.testing.assert_allclose(loud, soft / np.abs(soft).max(), atol=1e-5)


def test_zeros_are_zeros():
    assert not make("zeros", level=0.0).any()


def test_noise_falls_as_its_colour_says():
    for kind, slope in [("white_noise", 0.0), ("pink_noise", -3.0), ("brown_noise", -6.0)]:
        power = np.abs(np.fft.rfft(make(kind, 8.0))) ** 2  # 8 bins a hertz
        octaves = [power[8 * low : 16 * low].mean() for low in (125, 250, 500, 1000, 2000)]
        assert np.diff(10 * np.log10(octaves)) == pytest.approx(np.full(4, slope), abs=0.7)


def test_hum_is_of_the_mains():
    seen = set()
    for seed in range(8):
        power = np.abs(np.fft.rfft(make("hum", 1.0, seed))) ** 2  # a bin a hertz
        matching = [mains for mains in (50, 60) if power[mains::mains].sum() > 0.999 * power.sum()]
        assert len(matching) == 1
        seen.update(matching)
    assert seen == {50, 60}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "hum", "seconds": 0.0}, "not one sample"),
        ({"kind": "hum", "level": 3.0}, "at most 0 dBFS"),
    ],
)
def test_refuses_what_cannot_be_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


# Tables --------------------------------------------------------------------------------------------------------------


def decode(row):
    return soundfile.read(io.BytesIO(row["audio"]["bytes"]))


def test_table_has_kinds_evenly_and_in_bounds():
    table = non_speech_table(20, seed=3, seconds=(0.3, 0.5), levels=(-50.0, -40.0))
    assert all(text == "" for text in table["text"])
    counts = [sum(f"({kind}," in origin for origin in table["origin"]) for kind in TRAINING_KINDS]
    assert sum(counts) == 20 and set(counts) == {2, 3}
    for row in table:
        signal, rate = decode(row)
        assert rate == 16000 and 0.3 <= len(signal) / rate <= 0.5
        if "(zeros," in row["origin"]:
            assert not signal.any()
        else:
            assert -50.1 <= decibels(signal) <= -39.9


def test_longer_table_begins_with_the_shorter():
    short, long, other = non_speech_table(3, 0), non_speech_table(5, 0), non_speech_table(3, 1)
    assert [row for row in short] == [row for row in long.select(range(3))]
    assert short["audio"][1] != other["audio"][1]


def test_table_goes_with_speech(tmp_path):
    soundfile.write(tmp_path / "one.wav", voice(0.5), 16000)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"audio": "one.wav", "text": "one", "speaker": 7}))
    table = datasets.concatenate_datasets([load_sources(tmp_path), non_speech_table(4, 0, seconds=(0.3, 0.5))])
    processor = EchoProcessor(EchoFeatureExtractor(), EchoTokenizer())
    prepared = prepare_dataset(table, processor, allow_empty_text=True, cache_dir=tmp_path / "cache").dataset
    assert prepared["text"][:] == ["one", "", "", "", ""]
    assert prepared["speaker"][:] == [7, None, None, None, None]
    assert len(prepared[1]["labels"]) == 2  # begin and end
    assert not prepared[1]["input_features"].any()  # digital silence
    assert prepared[2]["input_features"].any()


def test_table_refuses_no_rows():
    with pytest.raises(ValueError, match="a clip and a kind"):
        non_speech_table(0, seed=0)

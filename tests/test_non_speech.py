"""Audio that is not speech: the same for the same seed, as loud as asked, and usable as utterances without words."""

import io
import json

import datasets
import numpy as np
import pytest
import soundfile

from conftest import voice
from echo_hf import EchoFeatureExtractor
from echo_hf import EchoProcessor
from echo_hf import EchoTokenizer
from echo_hf import non_speech
from echo_hf.cli import main
from echo_hf.data import load_sources
from echo_hf.data import prepare_dataset
from echo_hf.non_speech import FURTHER_KINDS
from echo_hf.non_speech import TAILS
from echo_hf.non_speech import TRAINING_KINDS
from echo_hf.non_speech import format_non_speech
from echo_hf.non_speech import measure_non_speech
from echo_hf.non_speech import non_speech_signal
from echo_hf.non_speech import non_speech_table
from echo_hf.transcription import load_checkpoint

KINDS = TRAINING_KINDS + FURTHER_KINDS


def make(kind, seconds=1.0, seed=0, **options):
    return non_speech_signal(kind, seconds, np.random.default_rng(seed), **options)


def decibels(signal):
    return 10 * np.log10(np.mean(np.square(signal, dtype=np.float64)))


# Signals -------------------------------------------------------------------------------------------------------------


def test_no_kind_of_evaluation_is_trained_on():
    assert not set(TRAINING_KINDS) & set(FURTHER_KINDS)
    assert len(set(KINDS)) == len(KINDS)


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
        ({"kind": "speech"}, "choose among zeros"),
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


# What a model makes of it --------------------------------------------------------------------------------------------


def write_text(origin):
    """What the recogniser of known output writes, with silence scaling."""
    if "non-speech" in origin:
        return {"white_noise": "Two words.", "wind": "..."}.get(origin.split("(")[1].split(",")[0], "")
    added = {"then silence": " four", "then noise, -60 dBFS": " five six"}
    return "one two three" + next((words for tail, words in added.items() if origin.endswith(tail)), "")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(non_speech, "CLIP_SECONDS", (0.3, 0.5))
    monkeypatch.setattr(non_speech, "TAIL_SECONDS", 1.0)


@pytest.fixture
def known_output(monkeypatch):
    """Recognisers of known output; without silence scaling, and in the pipeline, they write nothing anywhere."""

    def recognize(model, processor, dataset, batch_size, **generate_kwargs):
        texts = [write_text(origin) if model.config.silence_scaling else "" for origin in dataset["origin"]]
        return texts, 0

    monkeypatch.setattr(non_speech, "recognize", recognize)
    monkeypatch.setattr(
        non_speech,
        "make_pipeline",
        lambda model, processor: lambda audio, batch_size: [{"text": ""}] * len(audio),
    )


def test_counts_of_known_output(known_output, checkpoint, tmp_path):
    model, processor = load_checkpoint(checkpoint, "cpu")
    report = measure_non_speech(model, processor, count=2, cache_dir=tmp_path)
    assert model.config.silence_scaling
    silent = {"not_empty": 0.0, "words_per_minute": 0.0}
    clips = {row["kind"]: row for row in report["clips"]}
    assert list(clips) == [*KINDS, "all for training", "all never trained on"]
    for kind in KINDS:
        row = clips[kind]
        assert row["clips"] == 2 and row["trainable"] == (kind in TRAINING_KINDS)
        assert row["seconds"] == clips["zeros"]["seconds"], "all kinds have the same durations"
        assert row["no silence scaling"] == row["pipeline"] == silent
        if kind not in ("white_noise", "wind"):
            assert row["model"] == silent
    minutes = clips["zeros"]["seconds"] / 60
    found = clips["white_noise"]["model"]
    assert found["not_empty"] == 1 and found["words_per_minute"] == pytest.approx(4 / minutes, rel=1e-3)
    assert clips["wind"]["model"] == {"not_empty": 1.0, "words_per_minute": 0.0}, "a text of no words"
    trained, others = clips["all for training"], clips["all never trained on"]
    assert (trained["clips"], trained["model"]["not_empty"]) == (16, 1 / 8)
    assert trained["model"]["words_per_minute"] == pytest.approx(4 / (8 * minutes), rel=1e-3)
    assert (others["clips"], others["model"]["not_empty"]) == (8, 1 / 4)

    tails = {row["tail"]: row for row in report["tails"]}
    assert list(tails) == list(TAILS)
    expected = {"silence": (2, 1.0), "noise, -60 dBFS": (4, 1.0), "noise, -40 dBFS": (0, 0.0)}
    for tail, (words, changed) in expected.items():
        assert tails[tail]["recordings"] == 2
        assert tails[tail]["model"] == {"words": 6, "edits": words, "insertions": words, "changed": changed}
        assert tails[tail]["pipeline"] == {"words": 0, "edits": 0, "insertions": 0, "changed": 0.0}

    lines = format_non_speech(report).splitlines()
    assert lines[0] == "In each cell: model / no silence scaling / pipeline."
    assert any(line.startswith("| white_noise | yes | 2 |") and "| 100% / 0% / 0% |" in line for line in lines)
    assert "| silence | 2 | 6 / 0 / 0 | 2 (2) / 0 (0) / 0 (0) | 100% / 0% / 0% |" in lines


def test_speech_is_that_of_the_source_and_the_tails_follow_it(monkeypatch, checkpoint, tmp_path):
    speech = voice(0.5)
    for name in ("a", "b", "c"):
        soundfile.write(tmp_path / f"{name}.wav", speech, 16000)
        (tmp_path / f"{name}.txt").write_text("said")
    heard = {}

    def recognize(model, processor, dataset, batch_size, **generate_kwargs):
        heard.update(zip(dataset["origin"], dataset["input_features"]))
        return [""] * len(dataset), 0

    monkeypatch.setattr(non_speech, "recognize", recognize)
    model, processor = load_checkpoint(checkpoint, "cpu")
    report = measure_non_speech(model, processor, tmp_path, count=2, cache_dir=tmp_path / "cache")
    assert [row["recordings"] for row in report["tails"]] == [2, 2, 2]
    plain = {origin: features for origin, features in heard.items() if origin.endswith(".wav")}
    assert len(plain) == 2 and all(len(features) == 50 for features in plain.values())
    for origin, features in plain.items():
        followed = [heard[f"{origin}, then {tail}"] for tail in TAILS]
        assert [len(longer) for longer in followed] == [150] * 3
        np.testing.assert_allclose(followed[0][:40, :-1], features[:40, :-1], atol=1e-3)
        assert not followed[0][60:].any() and followed[2][60:].any()


def test_silence_scaling_is_really_off_and_comes_back(capsys, monkeypatch, checkpoint, tmp_path):
    model, processor = load_checkpoint(checkpoint, "cpu")
    scaled = []
    model.get_encoder().register_forward_hook(lambda *call: scaled.append(call[-1].silence is not None))
    monkeypatch.setattr("echo_hf.transcription.load_checkpoint", lambda checkpoint, device: (model, processor))
    options = ["--count", "1", "--batch_size", "8", "--max_new_tokens", "4", "--cache_dir", str(tmp_path)]
    assert main(["non-speech", *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert model.config.silence_scaling and scaled[:2] == [True, True] and scaled[2:4] == [False, False]
    assert all(scaled[4:]) and len(scaled) > 4  # the pipeline
    clips = {row["kind"]: row for row in report["clips"]}
    assert clips["white_noise"]["model"]["not_empty"] == 1  # the checkpoint writes nonsense
    assert clips["zeros"]["pipeline"]["not_empty"] == 0

    model.config.silence_scaling = False
    assert main(["non-speech", *options]) == 0
    assert "In each cell: model / pipeline." in capsys.readouterr().out

"""Words where nobody speaks: counted right for recognisers of known output, and silence scaling really off."""

import json

import numpy as np
import pytest
import soundfile

import non_speech
from conftest import voice
from echo_hf.data.non_speech import TRAINING_KINDS
from echo_hf.inference import load_checkpoint
from non_speech import FURTHER_KINDS, TAILS, format_non_speech, measure_non_speech

KINDS = TRAINING_KINDS | FURTHER_KINDS


def write_text(origin):
    """What the recogniser of known output writes, with silence scaling."""
    if "non-speech" in origin:
        return {"white_noise": "Two words.", "sweep": "..."}.get(origin.split("(")[1].split(",")[0], "")
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
        if kind not in ("white_noise", "sweep"):
            assert row["model"] == silent
    minutes = clips["zeros"]["seconds"] / 60
    found = clips["white_noise"]["model"]
    assert found["not_empty"] == 1 and found["words_per_minute"] == pytest.approx(4 / minutes, rel=1e-3)
    assert clips["sweep"]["model"] == {"not_empty": 1.0, "words_per_minute": 0.0}, "a text of no words"
    trained, others = clips["all for training"], clips["all never trained on"]
    assert (trained["clips"], trained["model"]["not_empty"]) == (14, 1 / 7)
    assert trained["model"]["words_per_minute"] == pytest.approx(4 / (7 * minutes), rel=1e-3)
    assert (others["clips"], others["model"]["not_empty"]) == (4, 1 / 2)

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
    monkeypatch.setattr(non_speech, "load_checkpoint", lambda checkpoint, device: (model, processor))
    options = ["--count", "1", "--batch_size", "8", "--max_new_tokens", "4", "--cache_dir", str(tmp_path)]
    non_speech.main([*options, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert model.config.silence_scaling and scaled[:2] == [True, True] and scaled[2:4] == [False, False]
    assert all(scaled[4:]) and len(scaled) > 4  # the pipeline
    clips = {row["kind"]: row for row in report["clips"]}
    assert clips["white_noise"]["model"]["not_empty"] == 1  # the checkpoint writes nonsense
    assert clips["zeros"]["pipeline"]["not_empty"] == 0

    model.config.silence_scaling = False
    non_speech.main(options)
    assert "In each cell: model / pipeline." in capsys.readouterr().out

"""The study of pitch in its quick form: arms of a tiny model on tones, and the report from rows."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
import soundfile
import torch

import report
import run
from conftest import SAMPLING_RATE, voice
from corpora import add_noise, change_f0, flatten
from echo_hf.pitch_echo import estimate_f0
from models import ARMS, Settings, build_model
from scoring import candidates

TINY = Settings(
    hidden_size=16,
    intermediate_size=16,
    trunk_steps=1,
    arm_steps=2,
    decay_steps=1,
    batch_size=4,
    warmup_steps=1,
)
CORPORA = ("mandarin_words", "mandarin_syllables", "mandarin_syllables_other")


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Three corpora of a few hums each, at other pitches, with toned texts."""
    folder = tmp_path_factory.mktemp("speech")
    for corpus in CORPORA:
        (folder / corpus).mkdir()
        rows = []
        for number, text in enumerate(("ma1", "ma4", "shu3 xue2", "ba5")):
            soundfile.write(folder / corpus / f"{number}.wav", voice(0.5, 110.0 + 30.0 * number), SAMPLING_RATE)
            rows.append({"audio": f"{number}.wav", "text": text, "language": "cmn", "duration": 0.5})
        for split in ("train", "dev", "test"):
            (folder / corpus / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def part():
    return dataclasses.replace(
        run.PARTS[0], arms=("baseline", "input", "all"), seeds=(1, 2), noise=False, settings=TINY
    )


@pytest.fixture(scope="module")
def results(speech, part, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run.Study(speech, folder / "cache", folder / "results.jsonl").work((part,))
    return folder / "results.jsonl"


def read(results):
    return [json.loads(line) for line in results.read_text().splitlines()]


@pytest.mark.slow
def test_each_run_is_a_row_with_its_texts(results, part):
    rows = read(results)
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for seed in (1, 2) for arm in part.arms]
    parameters = [row["parameters"] for row in rows]
    assert max(parameters) < 1.05 * min(parameters)  # 1% at the study's size
    for row in rows:
        assert row["settings"]["arm_steps"] == 2 and len(row["commit"]) == 40
        with gzip.open(results.parent / "texts" / f"primary-{row['arm']}-{row['seed']}.json.gz", "rt") as file:
            texts = json.load(file)
        assert set(texts) == set(row["scores"])
        heard = texts["mandarin_words/test/clean/real"]
        assert len(heard["texts"]) == 4 and heard["right"] == ["1", "4", "32", ""]
        wrong = sum(a != b for one, other in zip(heard["right"], heard["both"]) for a, b in zip(one, other))
        assert row["scores"]["mandarin_words/test/clean/real"]["forced_both"] == [wrong, 4]


@pytest.mark.slow
def test_what_is_done_is_skipped(results, speech, part):
    before = results.read_text()
    run.Study(speech, results.parent / "cache", results).work((part,))
    assert results.read_text() == before


@pytest.mark.slow
def test_the_report_follows_from_the_rows(results):
    found = report.Results(results)
    report.draw(found, results.parent / "figures")
    report.write(found, results.parent / "report.md")
    text = (results.parent / "report.md").read_text()
    rates = [
        report.measure(row["scores"]["mandarin_syllables_other/test/clean/real"], report.FORCED_CHOICE)
        for row in read(results)
        if row["arm"] == "input"
    ]
    mean, half = report.interval(rates)
    assert f"| `input` | 2 | {mean:.1f} ± {half:.1f} |" in text
    assert (results.parent / "figures" / "primary.png").stat().st_size > 1000


def test_all_arms_of_a_seed_start_as_its_trunk(speech, part, tmp_path):
    study = run.Study(speech, tmp_path / "cache", tmp_path / "results.jsonl")
    processor = study.processor(part, ARMS["baseline"])
    trunk = build_model(ARMS["baseline"], TINY, processor, 1, None)
    features = torch.rand(1, 40, 81)
    features[..., -1] = 150.0 + 20.0 * torch.rand(1, 40)
    expected = trunk.eval().model.encoder(features).last_hidden_state
    for name in ("input", "theta", "radius", "gate"):
        model = build_model(ARMS[name], TINY, processor, 1, trunk.state_dict()).eval()
        assert torch.equal(model.model.encoder(features).last_hidden_state, expected), name
    # The gaussian bias takes the last rotary pair of each head; the rest starts as in the trunk.
    biased = build_model(ARMS["bias"], TINY, processor, 1, trunk.state_dict())
    for before, after in zip(trunk.model.encoder.layers, biased.model.encoder.layers):
        kept = before.self_attn.q_proj.weight.unflatten(0, (4, -1))[:, :-2].flatten(0, 1)
        assert torch.equal(after.self_attn.q_proj.weight, kept)


def test_candidates_differ_in_one_tone_alone():
    assert candidates("shu3 xue2 de5", "cmn") == [
        (0, "3", ["shu1 xue2 de5", "shu2 xue2 de5", "shu3 xue2 de5", "shu4 xue2 de5"]),
        (1, "2", ["shu3 xue1 de5", "shu3 xue2 de5", "shu3 xue3 de5", "shu3 xue4 de5"]),
    ]
    assert len(candidates("baa1", "yue")[0][2]) == 6


def test_f0_is_changed_and_nothing_else():
    rows = [{"input_features": np.full((5, 3), float(value))} for value in (100, 200, 0)]
    changed = {
        change: [row["input_features"] for row in change_f0(rows, change)]
        for change in ("real", "zero", "flag", "constant", "shuffled")
    }
    for features in changed.values():
        for before, after in zip(rows, features):
            np.testing.assert_array_equal(after[:, :-1], before["input_features"][:, :-1])
    assert [features[0, -1] for features in changed["zero"]] == [0, 0, 0]
    assert [features[0, -1] for features in changed["flag"]] == [150, 150, 0]
    assert [features[0, -1] for features in changed["constant"]] == [150, 150, 150]
    shuffled = [features[0, -1] for features in changed["shuffled"]]
    assert all(after != before["input_features"][0, -1] for before, after in zip(rows, shuffled))
    with pytest.raises(ValueError, match="'other' is not known"):
        change_f0(rows, "other")


def test_noise_has_the_ratio_that_is_asked_for():
    samples = 0.1 * voice(1.0)
    noisy = add_noise(samples, np.random.default_rng(0).standard_normal(len(samples)), 10.0)
    ratio = 10.0 * np.log10(np.mean(samples**2) / np.mean((noisy - samples) ** 2))
    assert ratio == pytest.approx(10.0, abs=0.1)


def test_flattened_audio_has_one_pitch():
    f0 = estimate_f0(flatten(voice(1.0)), SAMPLING_RATE, 160)
    voiced = f0[f0 > 0]
    low, high = np.percentile(voiced, [10, 90])  # the ends of the voiced run are not steady
    assert len(voiced) > 50 and high < 1.02 * low


def test_intervals_and_corrections_have_known_values():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / np.sqrt(3.0))
    assert report.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    counts = np.ones(20, dtype=int)
    low, high, p = report.bootstrap(-np.ones((3, 20)), counts)
    assert (low, high) == (-100.0, -100.0) and p == 1.0 / report.RESAMPLES
    low, high, p = report.bootstrap(np.tile([1.0, -1.0], (3, 10)), counts)
    assert low < 0 < high and p > 0.5

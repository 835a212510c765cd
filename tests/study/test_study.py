"""The study of pitch in its quick form: arms of a tiny model on tones, and the report from rows."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
import soundfile
import torch

import attention
import report
import run
from comparison import FORCED_CHOICE, RESAMPLES, WORDS, Results, bootstrap, holm, interval, own_test
from conftest import SAMPLING_RATE, voice
from corpora import add_noise, change_f0, flatten
from echo_hf.pitch_echo import estimate_f0
from models import ARMS, Settings, build_model, train
from scoring import candidates, count_errors

TINY = Settings(
    hidden_size=16,
    intermediate_size=16,
    trunk_steps=1,
    arm_steps=2,
    decay_steps=1,
    batch_size=4,
    warmup_steps=1,
)
TONED = ("ma1", "ma4", "shu3 xue2", "ba5")
CORPORA = {  # language and texts
    **dict.fromkeys(("mandarin_words", "mandarin_syllables", "mandarin_syllables_other"), ("cmn", TONED)),
    "cantonese_syllables": ("yue", ("baa1", "baa6", "si4", "jyu5")),
    "mboshi": ("mdw", ("ng\u00e1 ot\u00e9", "wa ba", "adi", "ik\u00f3\u00f3 w\u00f3")),
    "speechocean762": ("en", ("it was good", "call it", "bear", "we like it")),
}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Corpora of a few hums each, at other pitches."""
    folder = tmp_path_factory.mktemp("speech")
    for corpus, (language, texts) in CORPORA.items():
        (folder / corpus).mkdir()
        rows = []
        for number, text in enumerate(texts):
            soundfile.write(folder / corpus / f"{number}.wav", voice(0.5, 110.0 + 30.0 * number), SAMPLING_RATE)
            rows.append({"audio": f"{number}.wav", "text": text, "language": language, "duration": 0.5})
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
    found = Results(results)
    folder = results.parent
    report.draw(found, folder / "figures")
    report.write(found, folder)
    text = (folder / "report.md").read_text()
    scores = {
        (row["arm"], row["seed"]): row["scores"]["mandarin_syllables_other/test/clean/real"]["forced_both"]
        for row in read(results)
    }
    rates = [100.0 * wrong / asked for (arm, _), (wrong, asked) in scores.items() if arm == "input"]
    differences = [
        100.0 * (scores["input", seed][0] - scores["baseline", seed][0]) / scores["input", seed][1] for seed in (1, 2)
    ]
    (mean, half), (shift, width) = interval(rates), interval(differences)
    row = next(line for line in text.splitlines() if line.startswith("| `input` | 2 |"))
    assert f" {mean:.1f} ± {half:.1f} | 2 | {shift:+.1f} ± {width:.1f} |" in row
    for name in report.FIGURES.keys() - {"conditions_tempo_40"}:
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000
        assert f"figures/{name}.png" in text
    assert not (folder / "figures" / "conditions_tempo_40.png").exists()  # its part was not run
    assert "figures/conditions_tempo_40.png" not in text
    details = (folder / "report_details.md").read_text()
    assert "| mandarin_words/test | base syllables, free-running |" in details
    assert "Gains of theta" in details and "Strengths of the bias" in details


@pytest.mark.slow
def test_utterances_are_described_once_in_the_order_of_their_texts(results, speech):
    found = Results(results)
    assert list(found.utterances) == ["mandarin_syllables_other/test", "mandarin_syllables/test", "mandarin_words/test"]
    described = found.describe("mandarin_words/test/clean/real", 4)
    assert described["text"] == list(TONED) and described["audio"] == [f"{number}.wav" for number in range(4)]
    assert all(0.5 < share <= 1.0 for share in described["voiced"])  # hums
    with pytest.raises(ValueError, match="describes 4 utterances of mandarin_words/test, but the runs have 5 texts"):
        found.describe("mandarin_words/test/clean/real", 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mboshi", "cantonese", "mel_23", "minutes_15", "frames_80", "english"])
def test_every_part_runs_and_is_reported(speech, tmp_path, name):
    part = next(part for part in run.PARTS if part.name == name)
    changes = {key: getattr(part.settings, key) for key in ("num_mel_bins", "stem_strides", "minutes")}
    part = dataclasses.replace(
        part, arms=("baseline", "all"), seeds=(1,), settings=dataclasses.replace(TINY, **changes)
    )
    run.Study(speech, tmp_path / "cache", tmp_path / "results.jsonl").work((part,))
    found = Results(tmp_path / "results.jsonl")
    report.write(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    measures = found.measures(name, found.conditions(name)[0])
    assert (measures[0] == FORCED_CHOICE) == (name not in ("mboshi", "english"))
    for measure in measures[:1] if measures[0] == FORCED_CHOICE else measures:
        assert f"## {name}: {measure} (" in text
    assert_counts_follow_from_texts(found, name, "all", 1)


def assert_counts_follow_from_texts(found, part, arm, seed):
    """The errors of the utterances add up to the counts that were stored when the model was tested."""
    row = found.rows[part][arm][seed]
    for condition in found.conditions(part):
        if condition.endswith("/clean"):
            test = own_test(row, condition)
            stored = row["scores"][test]
            for measure in found.measures(part, condition):
                errors, counts = found.errors(part, arm, seed, test, measure)
                if measure == FORCED_CHOICE:
                    assert [errors.sum(), counts.sum()] == stored["forced_both"]
                elif measure == WORDS:
                    assert (errors.sum(), counts.sum()) == (stored["word_errors"], stored["reference_words"])
                elif measure.startswith("tones, free"):
                    assert (errors.sum(), counts.sum()) == (stored["tone_errors"], stored["reference_tones"])


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
    given = [np.full((5, 3), float(value)) for value in (100, 200, 0)]
    changed = {change: change_f0(given, change) for change in ("real", "zero", "flag", "constant", "shuffled")}
    for features in changed.values():
        for before, after in zip(given, features):
            np.testing.assert_array_equal(after[:, :-1], before[:, :-1])
    assert [features[0, -1] for features in changed["zero"]] == [0, 0, 0]
    assert [features[0, -1] for features in changed["flag"]] == [150, 150, 0]
    assert [features[0, -1] for features in changed["constant"]] == [150, 150, 150]
    shuffled = [features[0, -1] for features in changed["shuffled"]]
    assert all(after != before[0, -1] for before, after in zip(given, shuffled))
    with pytest.raises(ValueError, match="'other' is not known"):
        change_f0(given, "other")


@pytest.mark.parametrize("name", ["voicing_flag", "input_constant", "input_shuffled"])
def test_f0_that_a_control_hears_in_training_tells_nothing_of_the_perturbation(speech, part, tmp_path, name):
    study = run.Study(speech, tmp_path / "cache", tmp_path / "results.jsonl")
    arm = ARMS[name]
    processor = study.processor(part, arm)
    model, rows = build_model(arm, TINY, processor, 1, None), study.train_rows(part, arm, processor)
    heard = []
    model.register_forward_pre_hook(lambda _, args, kwargs: heard.append(kwargs), with_kwargs=True)
    train(model, rows, processor, TINY, 1, 4, change=arm.f0)
    f0 = [clip for batch in heard for clip in batch["input_features"][..., -1]]
    if name == "input_shuffled":  # drawn anew in each epoch of two batches
        assert len({round(clip[clip > 0].mean().item()) for clip in f0}) > 4
    else:
        assert all(set(clip.tolist()) <= {0.0, 150.0} for clip in f0)
    if name == "input_constant":
        assert all(((batch["input_features"][..., -1] > 0) == batch["attention_mask"]).all() for batch in heard)


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
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / np.sqrt(3.0))
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    counts = np.ones(20, dtype=int)
    low, high, p = bootstrap(-np.ones((3, 20)), counts)
    assert (low, high) == (-100.0, -100.0) and p == 2.0 / (RESAMPLES + 1)
    low, high, p = bootstrap(np.tile([1.0, -1.0], (3, 10)), counts)
    assert low < 0 < high and p > 0.5


def test_bootstrap_is_as_wide_as_the_spread_of_utterances_and_of_seeds():
    chance = np.random.default_rng(3)
    differences = chance.integers(-1, 2, size=(1, 400))
    low, high, _ = bootstrap(differences, np.full(400, 2))
    assert high - low == pytest.approx(2 * 1.96 * 50.0 * differences.std() / np.sqrt(400), rel=0.05)
    by_seed = np.array([[-2.0], [0.0], [1.0], [3.0]])  # all utterances alike, so seeds alone differ
    low, high, p = bootstrap(np.repeat(by_seed, 50, axis=1), np.full(50, 4))
    assert high - low == pytest.approx(2 * 1.96 * 25.0 * by_seed.std() / np.sqrt(4), rel=0.15) and p > 0.3


def store(folder, runs, described):
    """Writes runs, by part, arm and seed the texts, as the study stores them."""
    (folder / "texts").mkdir()
    rows = []
    for (part, arm, seed), texts in runs.items():
        test, counts = f"{part}/test/clean/real", count_errors("", "", described[f"{part}/test"]["language"][0])
        row = {"part": part, "arm": arm, "seed": seed, "train": [part], "settings": {}, "learned": {}, "parameters": 5}
        rows.append(row | {"machine": "none", "training_seconds": 60, "scores": {test: counts}})
        with gzip.open(folder / "texts" / f"{part}-{arm}-{seed}.json.gz", "wt", encoding="utf-8") as file:
            json.dump({test: {"texts": texts}}, file)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "utterances.json.gz").write_bytes(gzip.compress(json.dumps(described).encode()))
    return Results(folder / "results.jsonl")


def test_arms_are_compared_in_the_seeds_that_both_have_and_with_their_own_baseline(tmp_path):
    described = {
        "mboshi/test": {"text": ["ng\u00e1 ot\u00e9", "wa"], "language": ["mdw"] * 2},
        "english/test": {"text": ["it was"], "language": ["en"]},
        "primary/test": {"text": ["ma1"], "language": ["cmn"]},
    }
    right, wrong = ["ng\u00e1 ot\u00e9", "wa"], ["nga ot\u00e9", "wo"]  # two words, one of them in its tone alone
    runs = {("mboshi", "baseline", seed): wrong for seed in (1, 2)} | {("primary", "baseline", 1): ["ma1"]}
    runs |= {("mboshi", "input", seed): texts for seed, texts in ((2, wrong), (3, right), (1, right))}
    runs |= {("english", "input", 1): ["it is"]}
    found = store(tmp_path, runs, described)
    differences = {
        measure: found.against_baseline("mboshi", "mboshi/test/clean", measure)["input"]
        for measure in found.measures("mboshi", "mboshi/test/clean")
    }
    assert [found.by_seed for found in differences.values()] == [
        pytest.approx((-200 / 3, 0.0)),  # words
        pytest.approx((-25.0, 0.0)),  # tones of four vowels
        pytest.approx((-100 / 3, 0.0)),  # words without tone marks
    ]
    assert differences[WORDS].share == -50.0
    assert differences[WORDS].interval[0] == pytest.approx(-100 / 3)
    assert found.rates("mboshi", "input", "mboshi/test/clean", WORDS) == pytest.approx([0.0, 200 / 3, 0.0])
    assert found.rates("mboshi", "input", "mboshi/test/clean", WORDS, "real") == []  # as trained, so not changed
    # English was trained on other speech than the primary part, so its baseline is not that of the primary part.
    assert found.baseline_part("english") is None
    assert found.against_baseline("english", "english/test/clean", WORDS) == {}
    report.write(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| `input` | 3 | 5 | 22.2 ± 95.6 | 2 | -33.3 ± 423.5 |" in text
    assert "| `input` | 1 | 5 | 50.0 |  |" in text.split("## english")[1]


def test_gains_are_drawn_where_one_mechanism_has_run(tmp_path):
    described = {"primary/test": {"text": ["ma1"], "language": ["cmn"]}}
    found = store(tmp_path, {("primary", arm, 1): ["ma1"] for arm in ("baseline", "radius")}, described)
    report.draw_gains(found, tmp_path / "gains.png")
    assert not (tmp_path / "gains.png").exists()
    found.rows["primary"]["radius"][1]["learned"] = {"model.encoder.rotary_emb.gain": [0.4]}
    report.draw_gains(found, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").stat().st_size > 1000


def test_attention_that_follows_the_contour_is_told_from_attention_that_follows_distance():
    chance = np.random.default_rng(4)
    queries, keys = np.divmod(np.arange(60 * 30), 30)  # two utterances of 30 frames
    offsets = queries % 30 - keys
    contour = chance.standard_normal(60)
    likeness = -np.abs(contour[queries] - contour[queries // 30 * 30 + keys])
    elsewhere = 3.0 * np.abs(offsets) + 5.0 * contour[queries]  # depends on the distance and the query
    logs = (likeness + elsewhere, elsewhere - 2.0 * likeness, elsewhere + chance.standard_normal(len(queries)))
    follows, avoids, neither = attention.correlate(np.stack((likeness, *logs), axis=1), offsets, queries)
    assert follows == pytest.approx(1.0, abs=1e-3) and avoids == pytest.approx(-1.0, abs=1e-3)
    assert abs(neither) < 0.1


@pytest.mark.slow
def test_attention_of_models_that_were_left_is_stored_once_and_reported(results, speech, monkeypatch):
    settings = {part.name: dataclasses.replace(part, settings=TINY) for part in run.PARTS}
    monkeypatch.setattr(attention, "PARTS", tuple(settings.values()))
    arguments = ["--speech", str(speech), "--cache", str(results.parent / "cache"), "--output"]
    monkeypatch.setattr("sys.argv", ["attention.py", *arguments, str(results.parent / "attention.jsonl")])
    attention.main()
    attention.main()
    found = Results(results)
    assert [(row["arm"], row["seed"]) for row in found.attention] == [
        (arm, seed) for arm in ("all", "baseline", "input") for seed in (1, 2)
    ]
    for row in found.attention:
        shapes = {np.shape(row[way]) for way in ("real", "given", "spoken")}
        assert len(shapes) == 1 and np.abs(row["real"]).max() <= 1.0
        if row["arm"] == "baseline":  # it does not hear F0
            assert row["real"] == row["spoken"]
    report.write(found, results.parent)
    assert "| primary | `baseline` | 2 |" in (results.parent / "report_details.md").read_text()


def test_thirds_have_the_same_tones():
    tones = np.array(list("111111444444"))
    values = np.array([6, 5, 4, 3, 2, 1, 60, 10, 50, 20, 40, 30])
    groups = report.thirds(values, tones)
    assert groups.tolist() == [2, 2, 1, 1, 0, 0, 2, 0, 2, 0, 1, 1]


def test_stored_runs_fit_the_described_utterances():
    """What is in the repository: texts in the order of the utterances, and counts that follow from them."""
    path = report.HERE / "utterances.json.gz"
    assert path.stat().st_size < 100_000
    found = Results(report.HERE / "results.jsonl")
    assert {"/".join(test) for part in run.PARTS for test in part.tests} == set(found.utterances)
    for part in found.rows:
        arm, rows = next(iter(found.rows[part].items()))
        assert_counts_follow_from_texts(found, part, arm, next(iter(rows)))
        for condition in found.conditions(part):
            test = own_test(next(iter(rows.values())), condition)
            told = found.texts(part, arm, next(iter(rows)))[test]
            described = found.describe(test, len(told["texts"]))
            if "right" in told:
                asked = [candidates(*utterance) for utterance in zip(described["text"], described["language"])]
                assert ["".join(tone for _, tone, _ in choices) for choices in asked] == told["right"]

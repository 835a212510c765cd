"""The study of a fine-tuned Whisper in its quick form: a tiny Whisper on a few hums, and tables from known rows."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile

import tiny_whisper
import whisper
from conftest import SAMPLING_RATE, voice

TEXTS = ("ma1", "ma4", "ba5")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of the Mandarin part: corpora of a few hums, and a tiny Whisper to start from."""
    folder = tmp_path_factory.mktemp("whisper_study")
    for corpus in whisper.PARTS["mandarin"].tests:
        (folder / corpus).mkdir()
        rows = []
        for number, text in enumerate(TEXTS):
            duration = 0.5 if number else 1.5  # the first is longer than the window
            soundfile.write(folder / corpus / f"{number}.wav", voice(duration, 110.0 + 30.0 * number), SAMPLING_RATE)
            rows.append({"audio": f"{number}.wav", "text": text, "duration": duration})
        for split in ("train", "test"):
            (folder / corpus / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_whisper.make_whisper().save_pretrained(folder / "base")
    tiny_whisper.make_processor().save_pretrained(folder / "base")
    settings = [
        "--steps",
        "2",
        "--batch",
        "2",
        "--window",
        "1",
        "--seeds",
        "0",
        "--results",
        str(folder / "rows.jsonl"),
    ]
    return ["mandarin", "--speech", str(folder), "--whisper", str(folder / "base"), *settings]


@pytest.mark.slow
def test_runs_are_rows_once_and_are_reported(arguments, monkeypatch, capsys):
    part = dataclasses.replace(whisper.PARTS["mandarin"], max_new_tokens=4)
    monkeypatch.setitem(whisper.PARTS, "mandarin", part)
    whisper.main(arguments)
    results = whisper.parse(arguments).results
    before = results.read_text()
    whisper.main(arguments)
    assert results.read_text() == before
    rows = whisper.read_results(results)
    assert [(row["arm"], row["seed"], row["steps"]) for row in rows] == [("without", 0, 2), ("stem+gate+radius", 0, 2)]
    for row in rows:
        assert set(row["tests"]) == set(part.tests) and np.isfinite(row["train_loss"])
        for test in row["tests"].values():
            assert test["beyond_window"] == 1 and len(test["texts"]) == len(TEXTS)
            assert ("shuffled" in test) == (row["arm"] != "without")
            assert [total for _, total in test["as recorded"]["counts"]["words"]] == [1, 1, 1]
    capsys.readouterr()
    whisper.main(["report", "--results", str(results)])
    assert "| stem+gate+radius, shuffled | 1 |" in capsys.readouterr().out


def test_every_step_of_a_seed_has_the_same_batch_and_an_epoch_has_every_utterance():
    batches = list(whisper.draw_batches(7, 3, 7, seed=1))
    assert batches == list(whisper.draw_batches(7, 3, 7, seed=1)) != list(whisper.draw_batches(7, 3, 7, seed=2))
    drawn = [index for batch in batches for index in batch]
    assert [sorted(drawn[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3


def row(arm, seed, errors):
    counts = {"words": [[error, 2] for error in errors]}
    settings = dict.fromkeys(whisper.SETTINGS)
    tests = {"en": {"as recorded": {"counts": counts}}}
    return {"part": "speechocean", "arm": arm, "seed": seed, **settings, "tests": tests}


def test_tables_have_known_rates_and_pair_the_seeds_that_both_arms_have():
    rows = [row("without", 0, [1, 1, 1]), row("without", 1, [2, 2, 2]), row("stem", 0, [0, 0, 0])]
    lines = whisper.report(rows).splitlines()
    assert "| without, as recorded | 2 | 75.0 | 75.0 to 75.0 | |" in lines
    assert "| stem, as recorded | 1 | 0.0 | 0.0 to 0.0 | -50.0 to -50.0 |" in lines  # seed 0 alone


def test_bootstrap_is_as_wide_as_the_spread_of_utterances():
    errors = np.random.default_rng(5).integers(0, 3, size=400)
    samples = np.stack((errors, np.full(400, 2)), axis=1)[None]
    low, high = whisper.bootstrap(samples)
    assert high - low == pytest.approx(2 * 1.96 * 50.0 * errors.std() / np.sqrt(400), rel=0.05)
    assert whisper.bootstrap(samples, samples) == (0.0, 0.0)


def test_a_line_that_was_cut_off_is_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"seed": 0}\n{"seed": 1, "te')
    assert whisper.read_results(path) == [{"seed": 0}]
    assert whisper.read_results(tmp_path / "none.jsonl") == []


@pytest.mark.slow
def test_stored_rates_follow_from_the_stored_counts():
    rows = whisper.read_results(whisper.RESULTS)
    assert len(rows) > 0
    for stored in rows:
        for test in stored["tests"].values():
            for condition in ("as recorded", "silence", "shuffled"):
                if condition in test:
                    for unit, counts in test[condition]["counts"].items():
                        errors, total = np.sum(counts, axis=0)
                        assert test[condition]["rates"][unit] == pytest.approx(errors / total)

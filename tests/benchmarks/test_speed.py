"""The benchmark: that it runs and measures what it says, never how fast anything is."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import f0_trackers
import speed
from echo_hf.feature_extraction_echo import EchoFeatureExtractor
from echo_hf.metrics import format_table
from echo_hf.pitch_echo import TRACKERS, estimate_f0
from f0_trackers import benchmark_trackers
from speed import (
    SECTIONS,
    benchmark_transcription,
    echo_model,
    measure,
    model_inputs,
    peak_memory,
    peer_extractors,
    run_benchmark,
    synthetic_voice,
    transcription,
)

CPU = torch.device("cpu")


def test_cases_run_in_turns_after_a_warm_up():
    calls = []
    times = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, device=CPU)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"} and all(value >= 0 for value in times.values())


@pytest.mark.skipif(peak_memory(lambda: None, CPU) is None, reason="this system does not tell a process's peak")
def test_peak_memory_sees_what_is_freed_again():
    def allocate():
        torch.ones(64 * 2**18)  # 64 MiB

    assert 60 < peak_memory(allocate, CPU) < 80
    assert peak_memory(lambda: None, CPU) < 8


def test_echo_is_compared_at_the_peers_size():
    with torch.device("meta"):
        parameters = echo_model("all", "27m", torch.device("meta"), torch.float32).num_parameters()
    assert 25e6 < parameters < 29e6


def test_inputs_are_voiced_in_part_and_as_long_as_asked():
    model = echo_model("all", "2m", CPU, torch.float32)
    inputs = model_inputs(model, 2, 3, CPU, torch.float32)
    assert inputs["input_features"].shape == (3, 200, 81)
    f0 = inputs["input_features"][..., -1]
    assert ((f0 == 0) | (f0 >= 100) & (f0 <= 200)).all() and 0.2 < (f0 > 0).float().mean() < 0.8


def test_synthetic_voice_has_the_f0_that_it_says():
    f0 = estimate_f0(synthetic_voice(2), 16000, 160, "dio")
    voiced = f0[f0 > 0]
    assert 0.5 < len(voiced) / len(f0) < 0.8
    assert np.mean((voiced > 115) & (voiced < 185)) > 0.9


def tiny_peer(name):
    """A peer of one layer, with the settings that `peer_models` gives it."""
    layers = {f"{side}_{kind}": 1 for side in ("encoder", "decoder") for kind in ("layers", "num_hidden_layers")}
    heads = {
        f"{side}_{kind}": 2 for side in ("encoder", "decoder") for kind in ("attention_heads", "num_attention_heads")
    }
    width = {"hidden_size": 16, "intermediate_size": 16, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = getattr(transformers, f"{name}Config")
    known = config().to_dict()
    settings = {key: value for key, value in {**layers, **heads, **width}.items() if key in known}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config(**settings)).eval()
    model.generation_config.pad_token_id = model.config.pad_token_id = model.config.eos_token_id
    model.generation_config.max_length = 448
    return model


@pytest.mark.parametrize("name", ["Moonshine", "Speech2Text", "Whisper"])
def test_peers_transcribe_audio_to_so_many_tokens(name):
    model = tiny_peer(name)
    extractor = peer_extractors()[model.config.model_type]
    audio = [synthetic_voice(1.0), synthetic_voice(0.5)]
    short, longer = (transcription(model, extractor, audio, count)() for count in (3, 5))
    assert len(longer) == 2 and len(longer[0]) - len(short[0]) == 2


@pytest.mark.parametrize("ctc_weight", [0.0, 0.5])
def test_echo_transcribes_audio_to_so_many_tokens(ctc_weight):
    model = echo_model("all", "2m", CPU, torch.float32, vocab_size=64)
    extractor = EchoFeatureExtractor(f0_method="autocorrelation")
    ids = transcription(model, extractor, [synthetic_voice(1.0), synthetic_voice(0.5)], 5, ctc_weight)()
    assert len(ids) == 2 and len(ids[0]) == 1 + 5


def test_transcription_compares_each_echo_with_the_fastest_peer(monkeypatch):
    kinds = {"Echo": "echo", "Echo, 80 ms frames": "echo", "A": "moonshine", "B": "whisper"}
    models = {name: SimpleNamespace(config=SimpleNamespace(model_type=kind)) for name, kind in kinds.items()}
    echo = ("", ", autocorrelation", " with CTC", " with CTC, autocorrelation")
    echo = [name + case for name in list(kinds)[:2] for case in echo]
    times = iter(((2.0, 1.0), (3.0, 4.0)))  # seconds of A and B in each row

    def fake(cases, rounds, device):
        assert sorted(cases) == sorted([*echo, "A", "B"])
        a, b = next(times)
        return dict.fromkeys(cases, 0.5) | {"Echo": 2.0, "A": a, "B": b}

    monkeypatch.setattr(speed, "measure", fake)
    monkeypatch.setattr(speed, "benchmark_drafts", lambda *_: [{"recording": "en"}])
    tables = benchmark_transcription(models, 1, CPU, torch.float32, shapes=((2, 1), (5, 8)))
    shape = {"seconds": 5, "batch": 8, "tokens": 20}
    assert list(tables) == ["ms", "fastest peer : Echo", "real speech"]
    assert tables["ms"][1] == shape | {f"{name} ms": 500.0 for name in echo} | {
        "Echo ms": 2e3,
        "A ms": 3e3,
        "B ms": 4e3,
    }
    first, second, worst, best = tables["fastest peer : Echo"]
    assert second == shape | dict.fromkeys(echo, 6.0) | {"Echo": 1.5}
    assert worst == {"seconds": "worst row"} | dict.fromkeys(echo, 2.0) | {"Echo": 0.5}
    assert best == {"seconds": "best row"} | dict.fromkeys(echo, 6.0) | {"Echo": 1.5}
    assert first["Echo"] == 0.5


def test_drafts_are_measured_in_float32_only(monkeypatch):
    kinds = {"Echo": "echo", "A": "whisper"}
    models = {name: SimpleNamespace(config=SimpleNamespace(model_type=kind)) for name, kind in kinds.items()}
    monkeypatch.setattr(speed, "measure", lambda cases, *_: dict.fromkeys(cases, 1.0))
    assert "real speech" not in benchmark_transcription(models, 1, CPU, torch.bfloat16, shapes=((2, 1),))


def test_sections_have_their_own_number_of_rounds(monkeypatch):
    seen = {}
    for section in ("features", "pitch"):
        monkeypatch.setattr(
            speed, f"benchmark_{section}", lambda rounds, section=section, **_: seen.update({section: rounds})
        )
    monkeypatch.setitem(speed.ROUNDS, "pitch", 2)
    run_benchmark(("features", "pitch"))
    assert seen == {"features": 5, "pitch": 2}
    run_benchmark(("features", "pitch"), rounds=7)
    assert seen == {"features": 7, "pitch": 7}


def test_table_has_all_columns_and_three_digits():
    table = format_table([{"a": "x", "b": 1.23456}, {"a": "y", "c": 12345.6, "b": None}])
    assert table.splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| x | 1.23 |  |",
        "| y |  | 12346 |",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sections": ("speed",)}, "speed.*features"),
        ({"dtype": "float33"}, "float33"),
        ({"device": "no"}, "cannot run on 'no'"),
        ({"size": "3m"}, "size '3m'"),
        ({"compiled": True}, "Only transcription, generation, training are measured compiled, not pitch"),
    ],
)
def test_unknown_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        run_benchmark(**{"sections": ("pitch",), **settings})


def test_what_was_measured_is_kept_when_a_later_section_fails(tmp_path, capsys, monkeypatch):
    rows = [{"audio": "1 s", "ms": 2.0}]
    monkeypatch.setattr(speed, "benchmark_pitch", lambda **_: rows)
    monkeypatch.setattr(speed, "benchmark_scaling", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        speed.main(["pitch", "scaling", "--quick", "--output", str(tmp_path / "speed.json")])
    assert json.loads((tmp_path / "speed.json").read_text())["pitch"] == rows
    assert "| 1 s | 2" in capsys.readouterr().out


@pytest.mark.slow
def test_every_section_runs_and_writes_its_rows(tmp_path, capsys):
    speed.main(["--quick", "--output", str(tmp_path / "speed.json")])
    results = json.loads((tmp_path / "speed.json").read_text())
    shown = capsys.readouterr().out
    for section in SECTIONS:
        assert results[section] and section in shown
        tables = results[section] if isinstance(results[section], dict) else {section: results[section]}
        assert all(tables.values())
        for row in (row for rows in tables.values() for row in rows):
            numbers = [value for name, value in row.items() if name.endswith(("ms", "fast", "ratio"))]
            numbers = [value for value in numbers if value is not None]
            assert all(math.isfinite(value) and value > 0 for value in numbers)
    assert results["features"][0]["ratio"] == 1.0
    row = results["generation"][0]
    fastest = min(value for name, value in row.items() if name.endswith(" ms") and not name.startswith("Echo"))
    assert row["Echo, times as fast"] == pytest.approx(fastest / row["Echo ms"])
    assert 27 < results["parameters"]["Moonshine-tiny"] < 27.2
    english, together = results["transcription"]["real speech"]
    assert english["recording"] == "en" and together["drafts ms"] == english["drafts ms"]
    assert english["no drafts : drafts"] == pytest.approx(english["no drafts ms"] / english["drafts ms"])


def test_trackers_have_a_row_for_each_signal(monkeypatch):
    signals = dict(list(f0_trackers.f0_test_signals().items())[:2])
    monkeypatch.setattr(f0_trackers, "f0_test_signals", lambda: signals)
    rows = benchmark_trackers()
    assert {row["tracker"] for row in rows} == set(TRACKERS) and len(rows) == 2 * len(TRACKERS)
    assert all(0 <= value <= 100 for row in rows for name, value in row.items() if name.endswith("%"))
    clean = {row["tracker"]: row for row in rows if row["signal"] == rows[0]["signal"]}
    assert clean["dio"]["GPE %"] < 5

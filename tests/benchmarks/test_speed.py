"""The benchmark: that it runs and measures what it says, never how fast anything is."""

import json
import math

import pytest
import torch

import f0_trackers
import speed
from echo_hf.metrics import format_table
from echo_hf.pitch_echo import TRACKERS
from f0_trackers import benchmark_trackers
from speed import SECTIONS, echo_model, measure, model_inputs, peak_memory, run_benchmark

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
        ({"compiled": True}, "Only generation and training are measured compiled, not pitch"),
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
        for row in results[section]:
            numbers = [value for name, value in row.items() if name.endswith(("ms", "fast", "ratio"))]
            numbers = [value for value in numbers if value is not None]
            assert all(math.isfinite(value) and value > 0 for value in numbers)
    assert results["features"][0]["ratio"] == 1.0
    row = results["generation"][0]
    fastest = min(value for name, value in row.items() if name.endswith(" ms") and not name.startswith("Echo"))
    assert row["Echo, times as fast"] == pytest.approx(fastest / row["Echo ms"])
    assert 27 < results["parameters"]["Moonshine-tiny"] < 27.2


def test_trackers_have_a_row_for_each_signal(monkeypatch):
    signals = dict(list(f0_trackers.f0_test_signals().items())[:2])
    monkeypatch.setattr(f0_trackers, "f0_test_signals", lambda: signals)
    rows = benchmark_trackers()
    assert {row["tracker"] for row in rows} == set(TRACKERS) and len(rows) == 2 * len(TRACKERS)
    assert all(0 <= value <= 100 for row in rows for name, value in row.items() if name.endswith("%"))
    clean = {row["tracker"]: row for row in rows if row["signal"] == rows[0]["signal"]}
    assert clean["dio"]["GPE %"] < 5

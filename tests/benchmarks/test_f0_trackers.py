"""F0 measures and signals: known answers."""

import math

import numpy as np
import pytest

from f0_trackers import TRACKERS, benchmark_trackers, f0_metrics, f0_test_signals, synthetic_voice


def test_f0_metrics_have_the_known_answer():
    semitone = 2 ** (1 / 12)
    reference = np.array([0.0, 0.0, 100.0, 100.0, 100.0, 100.0, 100.0, 200.0])
    estimate = np.array([0.0, 150.0, 0.0, 100.0, 200.0, 130.0, 100.0 * semitone, 200.0 * semitone**0.25])
    result = f0_metrics(reference, estimate)
    assert result["gpe"] == pytest.approx(2 / 5)  # 200 and 130 for 100, of five frames voiced in both
    assert result["vde"] == pytest.approx(2 / 8)
    assert result["ffe"] == pytest.approx(4 / 8)
    assert result["rpa"] == pytest.approx(2 / 6)  # a semitone is more than 50 cents, a quarter of it is less
    assert result["rca"] == pytest.approx(3 / 6)  # and an octave is forgiven
    assert result["cents"] == pytest.approx((0 + 100 + 25) / 3)


def test_chroma_forgives_octaves_in_both_directions():
    reference = np.full(4, 200.0)
    estimate = 200.0 * np.array([0.25, 0.5, 2.0, 2.0 ** (2 + 40 / 1200)])
    result = f0_metrics(reference, estimate)
    assert (result["rpa"], result["rca"], result["gpe"]) == (0.0, 1.0, 1.0)
    assert math.isnan(result["cents"])


def test_f0_metrics_without_voice():
    silent = f0_metrics(np.zeros(3), np.zeros(3))
    assert (silent["vde"], silent["ffe"]) == (0.0, 0.0)
    assert all(math.isnan(silent[name]) for name in ("gpe", "rpa", "rca", "cents"))
    assert f0_metrics(np.full(3, 100.0), np.zeros(3))["rpa"] == 0.0


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_f0_of_other_shapes_is_refused(shapes):
    with pytest.raises(ValueError, match="shapes"):
        f0_metrics(np.ones(shapes[0]), np.ones(shapes[1]))


def test_a_synthetic_voice_has_the_harmonics_of_its_f0():
    f0 = np.full(16000, 200.0)
    power = np.abs(np.fft.rfft(synthetic_voice(f0))) ** 2  # bins of 1 Hz
    near_harmonics = np.zeros(len(power), dtype=bool)
    for harmonic in range(200, 3801, 200):
        near_harmonics[harmonic - 40 : harmonic + 41] = True
    assert power[near_harmonics].sum() > 0.998 * power.sum()  # the rest is the fading in and out
    without = np.abs(np.fft.rfft(synthetic_voice(f0, first_harmonic=2))) ** 2
    assert without[100:300].sum() < 1e-3 * power[100:300].sum()
    assert np.all(synthetic_voice(np.zeros(100)) == 0)


def test_f0_test_signals_are_what_they_say():
    signals = f0_test_signals()
    clean, f0 = signals["clean"]
    assert len(f0) == len(clean) // 160 + 1 and 71 < f0[f0 > 0].min() < 90 and 400 < f0.max() < 500
    voiced = np.repeat(f0[:-1] > 0, 160)
    for name, decibels in [("20 dB", 20), ("0 dB", 0)]:
        noise = signals[name][0] - clean
        ratio = np.mean(clean[voiced] ** 2) / np.mean(noise**2)
        assert 10 * np.log10(ratio) == pytest.approx(decibels, abs=0.5)
    power = np.abs(np.fft.rfft(signals["telephone"][0])) ** 2
    frequencies = np.fft.rfftfreq(len(clean), 1 / 16000)
    assert power[(frequencies < 190) | (frequencies > 3510)].sum() < 1e-9 * power.sum()
    for name, (waveform, _) in f0_test_signals().items():
        np.testing.assert_array_equal(waveform, signals[name][0])


def test_every_tracker_is_compared_on_every_signal(monkeypatch):
    clean = f0_test_signals()["clean"]
    monkeypatch.setattr("f0_trackers.f0_test_signals", lambda: {"clean": clean})
    rows = benchmark_trackers()
    assert [(row["signal"], row["tracker"]) for row in rows] == [("clean", tracker) for tracker in TRACKERS]
    assert all(row["GPE %"] < 1 and row["RPA %"] > 95 for row in rows)

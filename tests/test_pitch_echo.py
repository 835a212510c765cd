"""Pitch: known answers on synthetic voices, and each published formula against a plain transcription of it."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from echo_hf import autocorrelation_echo, pitch_echo
from echo_hf.pitch_echo import (
    check_sampling_rate,
    estimate_f0,
    estimate_f0_batch,
    interpolate_f0,
    voicing,
)
from f0_trackers import f0_metrics, f0_test_signals


def voice(f0, sampling_rate=16000, harmonics=8):
    """A harmonic tone; `f0` has the frequency in Hz at every sample."""
    phase = 2 * np.pi * np.cumsum(f0) / sampling_rate
    return 0.1 * sum(np.sin(k * phase) / k for k in range(1, harmonics + 1))


TRACKERS = tuple(pitch_echo.TRACKERS)
every_tracker = pytest.mark.parametrize("method", TRACKERS)


def contour(seed=0, frames=137):
    """A random F0 contour with voiced and unvoiced runs, some of it under 100 Hz."""
    generator = np.random.default_rng(seed)
    f0 = generator.uniform(75, 400, frames)
    f0[np.repeat(generator.random(frames // 10 + 1) < 0.4, 10)[:frames]] = 0.0
    return f0


# F0 ------------------------------------------------------------------------------------------------------------------


@every_tracker
@pytest.mark.parametrize("sampling_rate", [8000, 16000, 22050])
@pytest.mark.parametrize("frequency", [90.0, 200.0, 400.0])
def test_f0_of_a_harmonic_tone_is_its_frequency(frequency, sampling_rate, method):
    tone = voice(np.full(sampling_rate, frequency), sampling_rate)
    f0 = estimate_f0(tone, sampling_rate, sampling_rate // 100, method)
    inner = f0[5:-5]
    assert f0.dtype == np.float64
    assert np.all(np.abs(inner / frequency - 1) < 0.01)


@every_tracker
def test_f0_follows_a_glide_at_the_time_of_each_frame(method):
    true_f0 = np.linspace(120, 300, 32000)
    f0 = estimate_f0(voice(true_f0), 16000, 160, method)
    expected = true_f0[np.minimum(np.arange(len(f0)) * 160, 31999)]
    # One frame is 0.9 Hz here, so this bound would notice a shift of three frames.
    assert np.max(np.abs(f0 - expected)[10:-10]) < 2.5


@every_tracker
def test_f0_is_zero_where_there_is_no_voice(method):
    tone = voice(np.full(16000, 150.0))
    f0 = estimate_f0(np.concatenate([np.zeros(16000), tone, np.zeros(16000)]), 16000, 160, method)
    assert np.all(f0[:95] == 0) and np.all(f0[206:] == 0)
    assert np.all(f0[110:190] > 0)
    assert np.all(estimate_f0(np.zeros(4000), 16000, 160, method) == 0)


@every_tracker
def test_f0_does_not_depend_on_the_level(method):
    tone = voice(np.full(8000, 180.0))
    faint, loud = (estimate_f0(scale * tone, 16000, 160, method) for scale in (1e-3, 1.0))
    np.testing.assert_allclose(faint, loud, atol=1e-3)


@every_tracker
@pytest.mark.parametrize(("sampling_rate", "hop_length"), [(16000, 160), (22050, 256), (11025, 128), (16000, 320)])
def test_one_f0_value_a_hop_and_one_more(sampling_rate, hop_length, method):
    noise = np.random.default_rng(0).normal(size=hop_length * 45)
    for samples in [hop_length * k for k in range(1, 45)] + [hop_length * 10 - 1, hop_length * 10 + 1]:
        assert estimate_f0(noise[:samples], sampling_rate, hop_length, method).shape == (samples // hop_length + 1,)


@pytest.mark.parametrize(("method", "speed"), [("dio", 1), ("dio_fast", 4)])
def test_dio_and_stonemask_at_the_hop_as_published(method, speed):
    pyworld = pytest.importorskip("pyworld")
    audio = voice(np.linspace(100, 250, 16000)) + 0.01 * np.random.default_rng(0).normal(size=16000)
    f0, times = pyworld.dio(audio, 16000, f0_floor=71.0, f0_ceil=500.0, frame_period=160 / 16000 * 1000, speed=speed)
    np.testing.assert_array_equal(estimate_f0(audio, 16000, 160, method), pyworld.stonemask(audio, f0, times, 16000))


@every_tracker
def test_long_audio_in_pieces_is_as_in_one_go(monkeypatch, method):
    true_f0 = 180 + 40 * np.sin(np.arange(16000 * 6) / 3000)
    audio = voice(true_f0) * (np.sin(np.arange(16000 * 6) / 5000) > -0.5)  # with pauses
    whole = estimate_f0(audio, 16000, 160, method)
    monkeypatch.setattr(pitch_echo, "CHUNK_SECONDS", 1.0)
    monkeypatch.setattr(pitch_echo, "CONTEXT_SECONDS", 0.5)
    pieces = estimate_f0(audio, 16000, 160, method)
    assert np.array_equal(pieces > 0, whole > 0) and 0.5 < np.mean(whole > 0) < 0.9
    np.testing.assert_allclose(pieces, whole, atol=0.01)


@every_tracker
def test_a_coarse_grid_is_tracked_on_a_fine_one(method):
    # A voiced sound of 40 ms is two frames of 20 ms, which DIO would discard.
    audio = np.zeros(16000)
    audio[8000:8960] = voice(np.full(960, 200.0))
    fine, coarse = (estimate_f0(audio, 16000, hop_length, method) for hop_length in (160, 320))
    np.testing.assert_array_equal(coarse, fine[::2])
    assert coarse.max() > 0


@every_tracker
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["silence", "tone", "noise"])
def test_very_short_audio(frames, kind, method):
    samples = 160 * frames
    audio = {
        "silence": np.zeros(samples),
        "tone": voice(np.full(samples, 200.0)),
        "noise": np.random.default_rng(0).normal(size=samples),
    }[kind]
    f0 = estimate_f0(audio, 16000, 160, method)
    assert f0.shape == (frames + 1,) and np.isfinite(f0).all()


@every_tracker
@pytest.mark.parametrize("kind", ["constant", "click", "square", "tiny", "huge"])
def test_odd_signals_give_finite_f0(kind, method):
    square = np.sign(np.sin(2 * np.pi * 150 * np.arange(8000) / 16000))
    audio = {
        "constant": np.ones(8000),
        "click": np.eye(1, 8000, 4000)[0],
        "square": square,
        "tiny": 1e-30 * square,
        "huge": 1e30 * square,
    }[kind]
    f0 = estimate_f0(audio, 16000, 160, method)
    assert np.isfinite(f0).all() and np.all((f0 == 0) | ((f0 > 50) & (f0 < 600)))


def test_another_tracker_is_one_function(monkeypatch):
    heard = {}

    def flat(waveform, sampling_rate, frame_period, f0_min, f0_max):
        heard.update(waveform=waveform, arguments=(sampling_rate, frame_period, f0_min, f0_max))
        return np.full(int(1000 * len(waveform) / sampling_rate / frame_period) + 1, f0_min)

    monkeypatch.setitem(pitch_echo.TRACKERS, "flat", flat)
    f0 = estimate_f0(np.ones(1600, dtype=np.float32)[::2], 16000, 80, method="flat", f0_min=90.0, f0_max=400.0)
    np.testing.assert_array_equal(f0, np.full(11, 90.0))
    assert heard["arguments"] == (16000, 5.0, 90.0, 400.0)
    assert heard["waveform"].dtype == np.float64 and heard["waveform"].flags.c_contiguous


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "crepe"}, "'crepe'.*dio"),
        ({"f0_min": 500.0, "f0_max": 71.0}, "f0_min"),
        *(({"f0_min": value}, "f0_min") for value in (0.0, 1e-9, 1e-3, 0.1, -71.0, np.nan, "71", None, True)),
        *(({"f0_max": value}, "f0_max") for value in (9000.0, 1e9, np.inf, np.nan, "500", None)),
        ({"f0_max": 900.0, "sampling_rate": 1600}, "<= 800 Hz at a sampling rate of 1600 Hz"),
        *(({"hop_length": value}, "hop_length") for value in (0, -160, 16001, 10**9, 160.5, True, "160", None)),
        *(({"sampling_rate": value}, "sampling_rate") for value in (0, 1, 7, -16000, 10**9, np.inf, 16000.5, "16000")),
    ],
)
@every_tracker
def test_settings_that_cannot_work_are_named(method, arguments, message):
    """Before anything is allocated, and before native code that checks nothing is reached."""
    settings = {"sampling_rate": 16000, "hop_length": 160, "method": method, **arguments}
    with pytest.raises(ValueError, match=message):
        estimate_f0(np.zeros(1600), **settings)


@every_tracker
@pytest.mark.parametrize("f0_range", [(20.0, 2000.0), (20.0, 21.0), (1999.0, 2000.0)])
def test_the_widest_settings_work(method, f0_range):
    noise = np.random.default_rng(0).normal(size=4000)
    for sampling_rate, hop_length in ((16000, 16000), (16000, 40), (4000, 40)):
        f0 = estimate_f0(noise, sampling_rate, hop_length, method, *f0_range)
        assert len(f0) == 4000 // hop_length + 1 and np.isfinite(f0).all()


@pytest.mark.parametrize("rate", [16000, 16000.0, np.int32(16000), np.float64(16000), np.array(16000)])
def test_a_sampling_rate_of_any_numeric_type_is_an_int(rate):
    checked = check_sampling_rate(rate)
    assert checked == 16000 and type(checked) is int


@pytest.mark.parametrize("waveform", [np.zeros(0), np.zeros((2, 1600)), np.array([0.0, np.nan]), np.array([np.inf])])
def test_waveforms_that_cannot_be_tracked_are_refused(waveform):
    with pytest.raises(ValueError, match="1-D, not empty and finite"):
        estimate_f0(waveform, 16000, 160)


def test_a_failed_import_of_pyworld_names_the_remedy(monkeypatch, tmp_path):
    # What pyworld 0.3.5 does where setuptools has no pkg_resources any more.
    (tmp_path / "pyworld.py").write_text("import pkg_resources\n")
    monkeypatch.delitem(sys.modules, "pyworld", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    with pytest.raises(ImportError, match=r"pkg_resources.*pip install pyworld-prebuilt.*setuptools<82"):
        estimate_f0(np.zeros(1600), 16000, 160)


def test_the_module_imports_neither_pyworld_nor_torch():
    code = "import sys, echo_hf.pitch_echo; assert not {'pyworld', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The autocorrelation tracker -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def test_signals():
    return f0_test_signals()


@pytest.mark.parametrize(
    "name", ["clean", "20 dB", "10 dB", "5 dB", "0 dB", "no fundamental", "telephone", "telephone, 10 dB"]
)
def test_autocorrelation_is_no_worse_than_dio(name, test_signals):
    waveform, f0 = test_signals[name]
    dio = f0_metrics(f0, estimate_f0(waveform, 16000, 160, "dio"))
    result = f0_metrics(f0, estimate_f0(waveform, 16000, 160, "autocorrelation"))
    assert result["gpe"] <= dio["gpe"] and result["gpe"] < 0.02
    assert result["vde"] <= dio["vde"] + 0.002 and result["vde"] < 0.025  # two frames more, of a thousand
    # DIO with StoneMask is exact to 0.4 cents on clean voice. Nobody hears two cents, a fiftieth of a semitone.
    assert result["cents"] < 2.0 or result["cents"] <= dio["cents"]


@pytest.mark.parametrize("seed", range(20))
def test_the_path_is_the_best_of_all(seed):
    """Against every path there is, one by one."""
    generator = np.random.default_rng(seed)
    lag = generator.uniform(10.0, 200.0, (6, 3))
    score = -np.sort(-generator.uniform(0.0, 1.0, (6, 3)), axis=1)
    score[seed % 6] *= seed % 2  # some have a frame without voice

    def value(path):
        total = sum(score[frame, choice] for frame, choice in enumerate(path))
        for frame, (here, there) in enumerate(zip(path, path[1:])):
            octaves = min(1.0, abs(np.log2(lag[frame, here] / lag[frame + 1, there])))
            total -= autocorrelation_echo.JUMP_COST * octaves * min(score[frame, 0], score[frame + 1, 0])
        return total

    best = max(itertools.product(range(3), repeat=6), key=value)
    found = autocorrelation_echo.best_path(torch.from_numpy(lag), torch.from_numpy(score))[:, 0].tolist()
    voiced = score[:, 0] > 0  # where all candidates have a score of 0, it does not matter which
    np.testing.assert_array_equal(np.array(found)[voiced], np.array(best)[voiced])


def test_the_path_mends_an_octave_error_and_leaves_a_leap():
    lag = torch.tensor([[40.0, 80.0]] * 30)
    score = torch.tensor([[0.9, 0.8]] * 30)
    swapped = slice(10, 14)  # where the octave below fits a little better
    lag[swapped] = lag[swapped].flip(1)
    chosen = lag.gather(1, autocorrelation_echo.best_path(lag, score))
    assert (chosen == 40.0).all()
    score[20:, 1] = 0.0  # from here on it is the only one there is
    lag[20:] = lag[20:].flip(1)
    chosen = lag.gather(1, autocorrelation_echo.best_path(lag, score))[:, 0]
    assert (chosen[:20] == 40.0).all() and (chosen[20:] == 80.0).all()


def test_short_runs_of_voice_and_leaps_within_are_none():
    f0 = torch.full((20,), 100.0)
    f0[15:] = 200.0  # after a leap of an octave three frames are left, which are too few
    voiced = torch.zeros(20, dtype=torch.bool)
    voiced[[1, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]] = True
    kept = autocorrelation_echo._in_long_runs(voiced, f0, 4)
    assert kept.nonzero()[:, 0].tolist() == [8, 9, 10, 11, 12, 13, 14]
    assert autocorrelation_echo._in_long_runs(voiced, f0, 2).tolist() == [v and i != 1 for i, v in enumerate(voiced)]
    assert not autocorrelation_echo._in_long_runs(voiced[:2], f0[:2], 4).any()


def test_autocorrelation_keeps_the_octave_where_every_other_period_is_weaker():
    """As in a voice that creaks: the period is doubled for a while, within a steady contour."""
    f0 = np.full(32000, 200.0)
    audio = voice(f0, harmonics=20)
    creak = np.where(np.abs(np.arange(32000) - 16000) < 400, 0.15, 0.0)  # 50 ms
    audio = audio * (1.0 + creak * np.sin(2 * np.pi * 100.0 * np.arange(32000) / 16000))
    tracked = estimate_f0(audio, 16000, 160, "autocorrelation")[5:-5]
    assert np.all(np.abs(tracked / 200.0 - 1.0) < 0.02)


def hum(frequency, equal=False):
    times = np.arange(16000) / 16000
    return sum(0.05 / (1 if equal else k) * np.sin(2 * np.pi * frequency * k * times + k * k) for k in range(1, 11))


NO_VOICE = {
    "silence": np.zeros(16000),
    "offset": np.full(16000, 0.3),
    "offset with noise": 0.3 + 0.001 * np.random.default_rng(0).normal(size=16000),
    "white noise": 0.1 * np.random.default_rng(1).normal(size=48000),
    "hum of 50 Hz": hum(50.0),
    "hum of 50 Hz, harmonics as loud": hum(50.0, equal=True),
    "hum of 60 Hz": hum(60.0),
    "hum of 60 Hz, harmonics as loud": hum(60.0, equal=True),
    "hum with offset and noise": 0.1 + hum(50.0) + 0.003 * np.random.default_rng(2).normal(size=16000),
    "click": np.eye(1, 16000, 8000)[0],
}


@pytest.mark.parametrize("kind", NO_VOICE)
def test_autocorrelation_hears_no_voice_where_there_is_none(kind):
    f0 = estimate_f0(NO_VOICE[kind], 16000, 160, "autocorrelation")
    # At its ends, hum is no longer known for what it is: fewer than two periods are left in the window.
    assert np.count_nonzero(f0) <= (3 if "hum" in kind else 0.005 * len(f0))


def test_autocorrelation_refuses_tones_outside_the_range():
    times = np.arange(8000) / 16000
    frequencies = [30.0, 50.0, 62.0, *np.arange(510.0, 2000.0, 35.0), *np.arange(2000.0, 8000.0, 470.0)]
    tracks = estimate_f0_batch(
        [np.sin(2 * np.pi * frequency * times) for frequency in frequencies], 16000, 160, "autocorrelation"
    )
    for frequency, f0 in zip(frequencies, tracks):
        assert np.count_nonzero(f0[3:-3]) == 0, frequency
    tracks = estimate_f0_batch([np.sin(2 * np.pi * f * times) for f in (80, 240, 490)], 16000, 160, "autocorrelation")
    for frequency, f0 in zip((80, 240, 490), tracks):
        assert np.all(np.abs(f0[3:-3] / frequency - 1) < 0.01)


def test_autocorrelation_within_a_narrower_range():
    tone = voice(np.full(16000, 150.0))
    assert np.all(estimate_f0(tone, 16000, 160, "autocorrelation", f0_min=200.0)[5:-5] == 0)
    assert np.all(estimate_f0(tone, 16000, 160, "autocorrelation", f0_max=120.0)[5:-5] == 0)
    low = estimate_f0(voice(np.full(16000, 50.0)), 16000, 160, "autocorrelation", f0_min=40.0)
    high = estimate_f0(voice(np.full(16000, 900.0)), 16000, 160, "autocorrelation", f0_max=1000.0)
    assert np.all(np.abs(low[8:-8] / 50 - 1) < 0.01) and np.all(np.abs(high[8:-8] / 900 - 1) < 0.01)


@pytest.mark.parametrize("level", [1e-30, 1.0, 1e30])
def test_a_batch_does_not_change_an_f0(level, test_signals):
    waveform = level * test_signals["10 dB"][0]
    utterances = [waveform[start:stop] for start, stop in [(0, 40000), (40000, 40001), (70000, 90777), (5000, 5700)]]
    for method in TRACKERS:
        alone = [estimate_f0(utterance, 16000, 160, method) for utterance in utterances]
        for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
            batch = estimate_f0_batch([utterances[i] for i in order], 16000, 160, method)
            for i, f0 in zip(order, batch):
                np.testing.assert_array_equal(f0 > 0, alone[i] > 0)
                np.testing.assert_allclose(f0, alone[i], rtol=1e-5)


def test_frames_are_correlated_a_part_at_a_time(test_signals, monkeypatch):
    waveform = test_signals["10 dB"][0]
    whole = estimate_f0(waveform, 16000, 160, "autocorrelation")
    monkeypatch.setattr(autocorrelation_echo, "CORRELATION_FRAMES", 37)
    parts = estimate_f0(waveform, 16000, 160, "autocorrelation")
    np.testing.assert_array_equal(parts > 0, whole > 0)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_several_threads_change_nothing(monkeypatch, test_signals):
    waveform = test_signals["20 dB"][0]
    utterances = [waveform[start : start + 20000] for start in range(0, 160000, 20000)]
    monkeypatch.setattr(pitch_echo, "_num_threads", lambda: 4)
    for threaded, utterance in zip(estimate_f0_batch(utterances, 16000, 160), utterances):
        np.testing.assert_array_equal(threaded, estimate_f0(utterance, 16000, 160))


def test_autocorrelation_takes_whole_numbers_and_float32(test_signals):
    pcm = np.round(test_signals["clean"][0][:20000] * 32768 / 2).astype(np.int16)
    pcm[5] = -32768  # whose absolute value does not fit
    expected = estimate_f0(pcm / 32768, 16000, 160, "autocorrelation")
    assert np.count_nonzero(expected) > 50
    for given in (pcm, pcm.astype(np.float32) / 32768):
        np.testing.assert_array_equal(estimate_f0(given, 16000, 160, "autocorrelation"), expected)


def test_a_failed_import_of_torch_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        estimate_f0(np.zeros(1600), 16000, 160, "autocorrelation")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_autocorrelation_in_a_process_forked_after_torch_has_used_threads():
    code = """
import os, signal, numpy as np, torch
from echo_hf.pitch_echo import estimate_f0
torch.set_num_threads(2)
matrix = torch.randn(600, 600)
(matrix @ matrix).sin().sum()
audio = np.random.default_rng(0).normal(size=160000)
f0 = estimate_f0(audio, 16000, 160, "autocorrelation")
child = os.fork()
if child == 0:
    signal.alarm(30)  # if it waits for threads that were not forked
    same = np.array_equal(estimate_f0(audio, 16000, 160, "autocorrelation") > 0, f0 > 0)
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0 and torch.get_num_threads() == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fast_dio_agrees_with_dio(test_signals):
    waveform, f0 = test_signals["20 dB"]
    dio, fast = (estimate_f0(waveform, 16000, 160, method) for method in ("dio", "dio_fast"))
    result = f0_metrics(dio, fast)
    assert result["gpe"] == 0 and result["vde"] < 0.06 and 0 < result["cents"] < 5, "StoneMask refines both"


# Voicing -------------------------------------------------------------------------------------------------------------


def test_f0_is_carried_across_unvoiced_frames():
    carried = interpolate_f0([0.0, 0.0, 100.0, 0.0, 400.0, 300.0, 0.0])
    np.testing.assert_allclose(carried, [100, 100, 100, 200, 400, 300, 300])  # straight in log-F0, held at the ends
    np.testing.assert_array_equal(carried[[2, 4, 5]], [100.0, 400.0, 300.0])
    np.testing.assert_array_equal(interpolate_f0(np.zeros(3)), np.zeros(3))


@pytest.mark.parametrize("sampling_rate", [4000, 8000, 16000, 22050, 48000])
@pytest.mark.parametrize("frequency", [75.0, 153.0, 301.0, 499.0])
def test_voicing_of_a_tone_is_one(frequency, sampling_rate):
    hop_length = sampling_rate // 100
    tone = 0.3 + 0.1 * np.sin(2 * np.pi * frequency * np.arange(sampling_rate) / sampling_rate)
    # Few frames are voiced: in the others F0 is carried.
    f0 = np.where(np.arange(101) % 7 == 3, frequency, 0.0)
    for audio in (tone, voice(np.full(sampling_rate, frequency), sampling_rate), 1e-3 * tone, 1e30 * tone):
        result = voicing(audio, f0, sampling_rate, hop_length)
        assert result.shape == (101,) and result.dtype == np.float32
        assert np.all((result > 0.97) & (result <= 1.0))


@pytest.mark.parametrize("frequency", [75.0, 153.0, 301.0, 499.0])
def test_voicing_of_noise_is_low(frequency):
    noise = 0.1 * np.random.default_rng(0).normal(size=48000)
    result = voicing(noise, np.full(301, frequency), 16000, 160)
    assert np.all((result >= 0) & (result < 0.75)) and result.mean() < 0.1


def test_voicing_is_the_share_of_the_periodic_power():
    generator = np.random.default_rng(0)
    # Noise under 600 Hz, where the filter before the correlation changes neither much.
    spectrum = np.fft.rfft(generator.normal(size=160000))
    noise = np.fft.irfft(spectrum * (np.fft.rfftfreq(160000, 1 / 16000) < 600), 160000)
    noise *= np.sqrt(0.5 / np.mean(noise**2))  # as strong as the tone
    tone = np.sin(2 * np.pi * 200 * np.arange(160000) / 16000)
    for share in (0.9, 0.5, 0.2):
        mixed = 0.1 * (np.sqrt(share) * tone + np.sqrt(1 - share) * noise)
        assert abs(voicing(mixed, np.full(1000, 200.0), 16000, 160).mean() - share) < 0.07


def test_voicing_is_the_correlation_of_two_windows_a_period_apart():
    """Against the formula in float64, without the filter, at a rate and at lags where nothing is interpolated."""
    generator = np.random.default_rng(0)
    audio = 0.1 * voice(np.full(8000, 125.0), 8000) + 0.01 * generator.normal(size=8000)
    f0 = 8000 / generator.integers(17, 100, 101)
    taps = np.hanning(13)[1:-1]  # 1.2 ms
    filtered = np.convolve(audio, taps / taps.sum(), mode="same")
    expected = []
    for frame in range(101):
        lag = round(8000 / f0[frame])
        start = int(np.floor(frame * 80 - (200 + 8000 / f0[frame]) / 2 + 0.5))
        start = max(0, min(start, 8000 - 200 - lag - 2))
        expected.append(np.corrcoef(filtered[start : start + 200], filtered[start + lag : start + lag + 200])[0, 1])
    result = voicing(audio, f0, 8000, 80)
    np.testing.assert_allclose(result, np.clip(expected, 0, 1), atol=1e-4)


def test_voicing_of_silence_and_without_f0_is_zero():
    tone = voice(np.full(16000, 150.0))
    assert np.all(voicing(np.zeros(16000), np.full(101, 150.0), 16000, 160) == 0)
    assert np.all(voicing(tone, np.zeros(101), 16000, 160) == 0)
    falls = voicing(np.concatenate([tone, np.zeros(16000)]), np.full(201, 150.0), 16000, 160)
    assert falls[:97].min() > 0.97 and falls[103:].max() == 0


@pytest.mark.parametrize("samples", [1, 2, 159, 160, 400, 801])
def test_voicing_of_very_short_audio(samples):
    audio = voice(np.full(samples, 200.0)) + 0.01
    result = voicing(audio, np.full(samples // 160 + 1, 200.0), 16000, 160)
    assert result.shape == (samples // 160 + 1,) and np.all((result >= 0) & (result <= 1))


def test_voicing_does_not_depend_on_how_frames_are_grouped(monkeypatch):
    audio, f0 = np.random.default_rng(0).normal(size=16000), contour(frames=101)
    whole = voicing(audio, f0, 16000, 160)
    monkeypatch.setattr(pitch_echo, "VOICING_FRAMES", 7)
    np.testing.assert_allclose(voicing(audio, f0, 16000, 160), whole, atol=1e-6)


def test_voicing_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="1-D, not empty and finite"):
        voicing(np.full(160, np.nan), np.zeros(2), 16000, 160)
    for f0 in ([np.nan, 1.0], [-1.0], [1e9], [], [[100.0]]):
        with pytest.raises(ValueError, match="f0 must be 1-D"):
            voicing(np.zeros(160), np.array(f0), 16000, 160)
    with pytest.raises(ValueError, match="hop_length"):
        voicing(np.zeros(160), np.zeros(2), 16000, 0)

"""Pitch: known answers on synthetic voices, and each published formula against a plain transcription of it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from echo_hf import pitch_echo
from echo_hf.pitch_echo import accumulated_phase
from echo_hf.pitch_echo import aperiodicity_code
from echo_hf.pitch_echo import estimate_f0
from echo_hf.pitch_echo import estimate_f0_batch
from echo_hf.pitch_echo import normalise_pitch
from echo_hf.pitch_echo import num_aperiodicity_bands
from echo_hf.pitch_echo import pitch_per_token
from echo_hf.pitch_echo import spectral_envelope_code
from f0_trackers import f0_metrics
from f0_trackers import f0_test_signals


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


def test_dio_and_stonemask_at_the_hop_as_published():
    pyworld = pytest.importorskip("pyworld")
    audio = voice(np.linspace(100, 250, 16000)) + 0.01 * np.random.default_rng(0).normal(size=16000)
    f0, times = pyworld.dio(audio, 16000, f0_floor=71.0, f0_ceil=500.0, frame_period=160 / 16000 * 1000)
    np.testing.assert_array_equal(estimate_f0(audio, 16000, 160), pyworld.stonemask(audio, f0, times, 16000))


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
    assert np.isfinite(spectral_envelope_code(audio, f0, 16000, 160)).all()
    assert np.isfinite(aperiodicity_code(audio, f0, 16000, 160)).all()


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
        ({"f0_min": 0.0}, "f0_min"),
        ({"f0_max": 9000.0}, "8000 Hz"),
    ],
)
def test_settings_that_cannot_work_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_f0(np.zeros(1600), 16000, 160, **arguments)


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
    monkeypatch.setattr(pitch_echo, "CORRELATION_FRAMES", 37)
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
    assert result["gpe"] == 0 and result["vde"] < 0.06 and 0 < result["cents"] < 20


# Pitch per token -----------------------------------------------------------------------------------------------------


def transcribed_token_pitch(f0, hop_seconds, spans, method):
    """The notes of the method, word for word: a token at a time, one frame at a time."""
    times = [frame * hop_seconds for frame in range(len(f0))]
    tokens = []
    for start, end in spans:
        inside = [f for time, f in zip(times, f0) if start - 1e-9 <= time <= end + 1e-9]
        if not inside:
            later = [f for time, f in zip(times, f0) if time >= start]
            inside = [later[0] if later else f0[-1]]
        value = {"mean": sum(inside) / len(inside), "median": sorted(inside), "last": inside[-1]}[method]
        if method == "median":
            middle = len(value) // 2
            value = value[middle] if len(value) % 2 else (value[middle - 1] + value[middle]) / 2
        tokens.append(0.0 if value < 100 else value)
    tokens = [tokens[0]] + tokens
    return [(f - 71) / (500 - 71) if f != 0 else 0.0 for f in tokens]


@pytest.mark.parametrize("method", ["mean", "median", "last"])
@pytest.mark.parametrize("num_tokens", [1, 2, 10, 31, 137, 400])
def test_token_pitch_by_label_length(num_tokens, method):
    f0 = contour(seed=num_tokens)
    duration = len(f0) * 0.01
    spans = [(i * duration / num_tokens, (i + 1) * duration / num_tokens) for i in range(num_tokens)]
    pitch = pitch_per_token(f0, 0.01, num_tokens=num_tokens, method=method)
    assert pitch.shape == (num_tokens + 1,)
    np.testing.assert_allclose(pitch, transcribed_token_pitch(f0, 0.01, spans, method), atol=1e-12)


@pytest.mark.parametrize("method", ["mean", "median", "last"])
@pytest.mark.parametrize("rate", [3.0, 10.0, 25.0, 170.0])
def test_token_pitch_by_fixed_rate(rate, method):
    f0 = contour(seed=5)
    pitch = pitch_per_token(f0, 0.01, tokens_per_second=rate, method=method)
    assert len(pitch) - 1 == np.ceil(round(1.37 * rate, 6))
    spans = [(i / rate, (i + 1) / rate) for i in range(len(pitch) - 1)]
    np.testing.assert_allclose(pitch, transcribed_token_pitch(f0, 0.01, spans, method), atol=1e-12)


def test_token_pitch_by_fixed_rate_does_not_tell_the_number_of_labels():
    f0 = contour(seed=6)
    longest = pitch_per_token(f0, 0.01, num_tokens=40, tokens_per_second=10.0)
    for num_tokens in (1, 5, 13, 20):
        pitch = pitch_per_token(f0, 0.01, num_tokens=num_tokens, tokens_per_second=10.0)
        np.testing.assert_array_equal(pitch, longest[: num_tokens + 1])
    assert np.all(longest[1 + 14 :] == 0)  # 1.37 s hold 14 tokens; behind them nobody speaks


def test_token_pitch_of_a_constant_voice():
    pitch = pitch_per_token(np.full(100, 285.5), 0.01, num_tokens=7)
    np.testing.assert_allclose(pitch, np.full(8, 0.5))  # halfway between 71 and 500 Hz
    assert np.all(pitch_per_token(np.full(100, 99.9), 0.01, num_tokens=7) == 0)


def test_token_pitch_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="num_tokens.*tokens_per_second"):
        pitch_per_token(np.ones(5), 0.01)
    with pytest.raises(ValueError, match="'max'.*mean, median, last"):
        pitch_per_token(np.ones(5), 0.01, num_tokens=2, method="max")
    with pytest.raises(ValueError, match="at least one frame"):
        pitch_per_token(np.ones(0), 0.01, num_tokens=2)
    with pytest.raises(ValueError, match="tokens_per_second"):
        pitch_per_token(np.ones(5), 0.01, tokens_per_second=0.0)
    with pytest.raises(ValueError, match="num_tokens"):
        pitch_per_token(np.ones(5), 0.01, num_tokens=0)


def test_normalised_pitch():
    np.testing.assert_allclose(normalise_pitch([0.0, 71.0, 285.5, 500.0]), [0.0, 0.0, 0.5, 1.0])


# Accumulated phase ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial_phase", [0.0, 1.0, -2.0, 9.0])
def test_accumulated_phase_formula(initial_phase):
    f0, phase, expected = contour(), initial_phase, []
    for value in f0:
        phase = phase + 2 * np.pi * value * 0.01
        expected.append(phase % (2 * np.pi))
    result = accumulated_phase(f0, 0.01, initial_phase)
    difference = np.abs(result - expected)
    assert np.max(np.minimum(difference, 2 * np.pi - difference)) < 1e-10
    assert np.all((0 <= result) & (result < 2 * np.pi))


def test_accumulated_phase_stands_still_without_voice():
    phase = accumulated_phase(np.array([130.0, 110.0, 0.0, 0.0, 210.0]), 0.01)
    assert phase[1] == phase[2] == phase[3] != phase[4]
    np.testing.assert_allclose(phase[0], 2 * np.pi * 0.3)


def test_accumulated_phase_keeps_its_precision_for_an_hour():
    phase = accumulated_phase(np.full(360_000, 125.0), 0.01)  # a quarter of a cycle more in each frame
    np.testing.assert_allclose(phase[3::4], 0.0, atol=1e-6)


# WORLD's codes -------------------------------------------------------------------------------------------------------


def test_envelope_code_has_the_resonance_of_the_voice():
    # Fewer harmonics is a darker voice: the first cosine of the log envelope, bass against treble, is larger.
    dark, bright = voice(np.full(16000, 150.0), harmonics=4), voice(np.full(16000, 150.0), harmonics=40)
    codes = [spectral_envelope_code(audio, np.full(100, 150.0), 16000, 160, num_bands=13) for audio in (dark, bright)]
    assert codes[0].shape == (100, 13)
    assert np.median(codes[0][:, 1]) > np.median(codes[1][:, 1])


def test_envelope_code_of_silence_is_constant():
    code = spectral_envelope_code(np.zeros(16000), np.zeros(100), 16000, 160)
    assert np.ptp(code, axis=0).max() < 1e-9


def test_world_codes_do_not_depend_on_how_frames_are_grouped(monkeypatch):
    # With noise, because WORLD adds a little of its own: it must not be all there is between the harmonics.
    audio = voice(np.full(16000, 150.0)) + 1e-2 * np.random.default_rng(0).normal(size=16000)
    f0 = np.full(100, 150.0)
    whole = [code(audio, f0, 16000, 160) for code in (spectral_envelope_code, aperiodicity_code)]
    monkeypatch.setattr(pitch_echo, "ENVELOPE_FRAMES", 7)
    parts = [code(audio, f0, 16000, 160) for code in (spectral_envelope_code, aperiodicity_code)]
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(parts[1], whole[1], atol=0.05)  # dB


def test_aperiodicity_tells_noise_from_voice():
    noise = 0.1 * np.random.default_rng(0).normal(size=16000)
    tone = voice(np.full(16000, 150.0), harmonics=50)
    f0 = np.full(100, 150.0)
    assert np.median(aperiodicity_code(noise, f0, 16000, 160)) > np.median(aperiodicity_code(tone, f0, 16000, 160)) + 6
    assert np.all(np.abs(aperiodicity_code(tone, np.zeros(100), 16000, 160)) < 1e-9)  # unvoiced is noise, 0 dB


def test_number_of_aperiodicity_bands_is_worlds():
    pyworld = pytest.importorskip("pyworld")
    for sampling_rate in (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 96000):
        assert num_aperiodicity_bands(sampling_rate) == pyworld.get_num_aperiodicities(sampling_rate)
    with pytest.raises(ValueError, match="8000 Hz"):
        aperiodicity_code(np.zeros(800), np.zeros(10), 8000, 80)

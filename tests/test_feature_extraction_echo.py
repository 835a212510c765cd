"""Features: known answers, equal results for every way of giving the same audio, and errors that name the remedy."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from transformers.audio_utils import mel_filter_bank

from echo_hf import EchoProcessor, EchoTokenizer, feature_extraction_echo, pitch_echo
from echo_hf.feature_extraction_echo import (
    EchoFeatureExtractor,
    load_audio,
    log_mel_spectrogram,
    resample_audio,
    to_mono,
)
from echo_hf.pitch_echo import voicing

RATE = 16000  # Hz
ALL_GROUPS = {"spectrogram": 80, "voicing": 1, "pitch": 1}


def voice(seconds=0.5, frequency=200.0, rate=RATE, seed=0):
    """A harmonic tone in a little noise, as 16-bit PCM, so that every format below holds the same audio exactly."""
    time = np.arange(int(seconds * rate)) / rate
    tone = sum(np.sin(2 * np.pi * frequency * k * time) / k for k in range(1, 9))
    noise = np.random.default_rng(seed).normal(size=len(time))
    return np.round((0.1 * tone + 0.001 * noise) * 32768).astype(np.int16)


def as_float(pcm):
    return (pcm / 32768).astype(np.float32)


def wav_bytes(samples, rate=RATE, **kwargs):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", **kwargs)
    return buffer.getvalue()


@pytest.fixture
def extractor():
    return EchoFeatureExtractor()


@pytest.fixture
def reference(extractor):
    return extractor(as_float(voice()), sampling_rate=RATE)["input_features"]


# Known answers -------------------------------------------------------------------------------------------------------


def test_shape_and_types(extractor):
    features = extractor([as_float(voice(0.5)), as_float(voice(0.309))], sampling_rate=RATE, return_tensors="pt")
    assert set(features) == {"input_features", "attention_mask"}
    assert features["input_features"].shape == (2, 50, 81) and features["input_features"].dtype == torch.float32
    assert features["attention_mask"].sum(1).tolist() == [50, 30] and not features["attention_mask"].is_floating_point()
    assert torch.all(features["input_features"][1, 30:] == 0)
    assert extractor.feature_size == 81


def test_pitch_is_the_last_channel_in_hz(reference):
    assert np.all(np.abs(reference[0, 5:-5, -1] / 200 - 1) < 0.01)


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 2500.0, 6000.0])
def test_a_tone_peaks_in_its_mel_channel(frequency):
    tone = 0.1 * np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE)
    log_mel = log_mel_spectrogram(tone, RATE, 160, 400, 80)
    # Slaney's scale: 15 mel a kHz up to 1 kHz, then 27 mel for each factor of 6.4; channels lie evenly from 0 to 8 kHz.
    mel = [15 * f / 1000 if f <= 1000 else 15 + 27 * np.log(f / 1000) / np.log(6.4) for f in (frequency, RATE / 2)]
    expected = mel[0] / mel[1] * 81 - 1
    assert np.all(np.abs(log_mel[5:-5].argmax(axis=1) - expected) <= 1.0)
    assert log_mel.max() == 2.0 and log_mel.min() >= 0.0


def test_log_mel_is_the_formula_over_the_plain_transform():
    audio = as_float(voice(0.3)) * 0.5
    stft = torch.stft(
        torch.from_numpy(audio).double(),
        400,
        160,
        window=torch.hann_window(400, dtype=torch.float64),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = stft.abs().numpy()[:, : len(audio) // 160].T ** 2
    log_mel = np.log10(np.maximum(power @ mel_filter_bank(201, 80, 0.0, 8000.0, RATE, "slaney", "slaney"), 1e-10))
    floor = max(log_mel.max(), -2.0) - 8.0
    expected = (np.maximum(log_mel, floor) - floor) / 4.0
    np.testing.assert_allclose(log_mel_spectrogram(audio, RATE, 160, 400, 80), expected, atol=1e-6)


def test_frames_are_centred_at_their_hop():
    click = np.zeros(1600, dtype=np.float32)
    click[800] = 0.5
    energy = log_mel_spectrogram(click, RATE, 160, 400, 80).max(axis=1)
    assert energy.argmax() == 5 and energy[4] == energy[6] > 0


def test_the_level_does_not_matter_but_for_faint_audio():
    audio = as_float(voice())
    loud = log_mel_spectrogram(audio, RATE, 160, 400, 80)
    np.testing.assert_allclose(log_mel_spectrogram(audio / 4, RATE, 160, 400, 80), loud, atol=1e-5)
    faint = log_mel_spectrogram(1e-4 * audio, RATE, 160, 400, 80)
    assert 0 < faint.max() < 1.5


@pytest.mark.parametrize("samples", [160, 400, 16000])
def test_silence_is_zero_in_every_channel(extractor, samples):
    assert np.all(extractor(np.zeros(samples), sampling_rate=RATE)["input_features"] == 0)
    groups = EchoFeatureExtractor(ALL_GROUPS)(np.zeros(samples), sampling_rate=RATE)["input_features"]
    np.testing.assert_allclose(groups, 0, atol=1e-9)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_very_short_audio(frames):
    features = EchoFeatureExtractor(ALL_GROUPS)(as_float(voice())[: 160 * frames], sampling_rate=RATE)
    assert features["input_features"].shape == (1, frames, 82) and np.isfinite(features["input_features"]).all()


def test_long_audio_is_transformed_in_pieces(monkeypatch):
    audio = as_float(voice(1.0))
    whole = log_mel_spectrogram(audio, RATE, 160, 400, 80)
    monkeypatch.setattr(feature_extraction_echo, "SPECTROGRAM_SAMPLES", 7 * 400)
    np.testing.assert_allclose(log_mel_spectrogram(audio, RATE, 160, 400, 80), whole, atol=1e-6)


def test_extra_groups_lie_in_their_order():
    audio = as_float(voice(0.505))
    shuffled = dict(reversed(ALL_GROUPS.items()))
    extractor = EchoFeatureExtractor(shuffled)
    features = extractor(audio, sampling_rate=RATE)["input_features"][0]
    plain = EchoFeatureExtractor()(audio, sampling_rate=RATE)["input_features"][0]
    assert list(extractor.feature_groups) == list(ALL_GROUPS) and extractor.feature_size == features.shape[1] == 82
    spectrogram, periodicity, pitch = np.split(features, [80, 81], axis=1)
    np.testing.assert_array_equal(np.concatenate([spectrogram, pitch], axis=1), plain)
    np.testing.assert_allclose(periodicity[:, 0], voicing(audio, pitch[:, 0], RATE, 160), atol=1e-5)
    assert periodicity.min() > 0.9 and periodicity.max() <= 1


def test_without_pitch_no_f0_is_estimated(monkeypatch, reference):
    def refuse(*arguments, **settings):
        raise AssertionError("F0 was estimated")

    monkeypatch.setattr(feature_extraction_echo, "estimate_f0_batch", refuse)
    features = EchoFeatureExtractor({"spectrogram": 80})(as_float(voice()), sampling_rate=RATE)["input_features"]
    np.testing.assert_array_equal(features, reference[..., :80])


# The same audio, given otherwise -------------------------------------------------------------------------------------


def test_a_batch_does_not_change_an_utterance():
    extractor = EchoFeatureExtractor(ALL_GROUPS)
    utterances = [as_float(voice(seconds, 120 + 90 * seconds)) for seconds in (0.13, 0.8, 0.01, 0.46)]
    alone = [extractor(utterance, sampling_rate=RATE)["input_features"][0] for utterance in utterances]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        batch = extractor([utterances[i] for i in order], sampling_rate=RATE)
        for row, i in enumerate(order):
            frames = len(alone[i])
            assert batch["attention_mask"][row].sum() == frames
            np.testing.assert_array_equal(batch["input_features"][row, :frames], alone[i])
            assert np.all(batch["input_features"][row, frames:] == 0)


def test_a_batch_does_not_change_the_f0_of_a_batch_tracker():
    extractor = EchoFeatureExtractor(f0_method="autocorrelation")
    utterances = [as_float(voice(seconds, 120 + 90 * seconds)) for seconds in (0.13, 0.8, 0.01, 0.46)]
    batch = extractor(utterances, sampling_rate=RATE)
    for row, utterance in enumerate(utterances):
        alone = extractor(utterance, sampling_rate=RATE)["input_features"][0]
        np.testing.assert_allclose(batch["input_features"][row, : len(alone)], alone, rtol=1e-5)
        assert np.all(batch["input_features"][row, len(alone) :] == 0)
    assert np.all(np.abs(batch["input_features"][1, 5:75, -1] / 192 - 1) < 0.01)


def test_the_device_is_where_a_batch_tracker_computes(monkeypatch):
    extractor, devices = EchoFeatureExtractor(f0_method="autocorrelation"), []
    track = pitch_echo.BATCH_TRACKERS["autocorrelation"]

    def heard(*arguments, device):
        devices.append(torch.device(device))
        return track(*arguments, device="cpu")

    monkeypatch.setitem(pitch_echo.BATCH_TRACKERS, "autocorrelation", heard)
    for device in ("cpu", torch.device("cuda", 1)):
        features = extractor(as_float(voice()), sampling_rate=RATE, device=device, return_tensors="pt")
        assert features["input_features"].device == torch.device("cpu")
    assert devices == [torch.device("cpu"), torch.device("cuda", 1)]


def test_the_same_audio_in_other_types(extractor, reference):
    pcm = voice()
    audio = as_float(pcm)
    for given in (
        pcm,
        pcm.astype(np.int32) * 65536,
        audio.astype(np.float64),
        audio.tolist(),
        tuple(audio.tolist()),
        torch.from_numpy(audio),
        torch.from_numpy(pcm),
        torch.from_numpy(audio).requires_grad_(),
        audio[None],
        [audio[None]],
        {"array": audio, "sampling_rate": RATE},
        {"array": audio, "sampling_rate": float(RATE)},
        {"array": audio, "sampling_rate": torch.tensor(RATE)},
        {"raw": pcm, "sampling_rate": RATE},
        {"array": audio},
        np.repeat(audio, 2)[::2],
    ):
        np.testing.assert_array_equal(extractor(given, sampling_rate=RATE)["input_features"], reference)


def test_coarse_types_are_near(extractor, reference):
    pcm = voice()
    eight_bits = (np.round(pcm / 256) + 128).astype(np.uint8)
    np.testing.assert_allclose(to_mono(eight_bits), as_float(pcm), atol=1 / 128)
    np.testing.assert_allclose(to_mono(torch.from_numpy(as_float(pcm)).bfloat16()), as_float(pcm), atol=2e-3)
    np.testing.assert_allclose(to_mono(as_float(pcm).astype(np.float16)), as_float(pcm), atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("kind", ["array", "int16", "tensor", "raw_speech"])
def test_a_2d_array_is_a_batch_of_recordings(extractor, rows, kind):
    pcm = np.stack([voice(seed=seed) for seed in range(rows)])
    batch = {"int16": pcm, "tensor": torch.from_numpy(as_float(pcm))}.get(kind, as_float(pcm))
    given = {"raw_speech" if kind == "raw_speech" else "audio": batch}
    features = extractor(**given, sampling_rate=RATE)["input_features"]
    listed = extractor([as_float(row) for row in pcm], sampling_rate=RATE)["input_features"]
    np.testing.assert_array_equal(features, listed)
    assert len(features) == rows


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channels_of_an_array_are_an_error_that_says_how_to_mix_them(extractor, channels):
    audio = np.stack([as_float(voice(seed=seed)) for seed in range(channels)], axis=1)
    with pytest.raises(ValueError, match=r"audio of shape .* looks like \(samples, channels\).*audio.mean\(axis=1\)"):
        extractor(audio, sampling_rate=RATE)
    for given, name in (([audio], r"audio\[0\]"), ({"array": audio, "sampling_rate": RATE}, "audio")):
        with pytest.raises(ValueError, match=rf"{name} must be 1-D.*audio.mean\(axis=1\)"):
            extractor(given, sampling_rate=RATE)
    if channels > 1:
        with pytest.raises(ValueError, match=r"audio\[0\] must be 1-D.*audio.mean\(axis=0\)"):
            extractor([audio.T], sampling_rate=RATE)


def test_channels_of_a_file_are_averaged(extractor, tmp_path):
    left, right = as_float(voice(seed=1)), as_float(voice(seed=2))
    stereo = np.stack([left, right])
    np.testing.assert_allclose(to_mono(stereo, channel_axis=0), (left + right) / 2, atol=1e-8)
    np.testing.assert_allclose(to_mono(stereo.T, channel_axis=1), (left + right) / 2, atol=1e-8)
    np.testing.assert_array_equal(to_mono(np.array([[0.25, 0.75]]), channel_axis=1), [0.5])  # a single sample
    soundfile.write(tmp_path / "stereo.wav", stereo.T, RATE, subtype="FLOAT")
    expected = extractor((left + right) / 2, sampling_rate=RATE)["input_features"]
    np.testing.assert_allclose(extractor(tmp_path / "stereo.wav")["input_features"], expected, atol=1e-5)
    with pytest.raises(ValueError, match="9 channels; up to 8"):
        to_mono(np.zeros((100, 9)), channel_axis=1)


def test_files_are_as_arrays(extractor, reference, tmp_path):
    path = tmp_path / "voice.wav"
    path.write_bytes(wav_bytes(voice()))
    flac = tmp_path / "stereo.flac"
    soundfile.write(flac, np.stack([voice(), voice()], axis=1), RATE)
    content = path.read_bytes()
    for given in (
        path,
        str(path),
        flac,
        content,
        bytearray(content),
        io.BytesIO(content),
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(path)},
        {"bytes": content, "path": "gone.wav"},
    ):
        # A file says its own rate: the argument is for arrays and does not matter.
        np.testing.assert_array_equal(extractor(given, sampling_rate=8000)["input_features"], reference)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(extractor(file)["input_features"], reference)
    batch = extractor([path, content, voice(), as_float(voice()).tolist(), {"path": str(flac)}], sampling_rate=RATE)
    for row in batch["input_features"]:
        np.testing.assert_array_equal(row, reference[0])


def test_load_audio_keeps_channels_and_rate():
    stereo = np.stack([voice(), voice(seed=1)], axis=1)
    samples, rate = load_audio(wav_bytes(stereo, 8000))
    assert rate == 8000 and samples.dtype == np.float32
    np.testing.assert_array_equal(samples, as_float(stereo))


def test_batches_in_other_containers(extractor, reference):
    row = as_float(voice())
    many = np.tile(row, (9, 1))  # more rows than an array has channels
    ragged = np.array([row, row[:3200]], dtype=object)
    for batch in (many, torch.from_numpy(many), list(many), tuple(many), ragged, [row.tolist(), row.tolist()]):
        features = extractor(batch, sampling_rate=RATE)["input_features"]
        assert len(features) == len(batch)
        np.testing.assert_array_equal(features[0], reference[0])


def test_a_decoder_of_torchcodec(extractor, reference):
    class Decoder:  # the part of `torchcodec.decoders.AudioDecoder` that `datasets.Audio` users hand on
        def get_all_samples(self):
            class Samples:
                data, sample_rate = torch.from_numpy(as_float(voice()))[None], RATE

            return Samples()

    np.testing.assert_array_equal(extractor([Decoder()])["input_features"], reference)


def test_resampled_when_asked(extractor, reference):
    wide = as_float(voice(rate=48000))
    features = extractor({"array": wide, "sampling_rate": 48000}, resample=True)["input_features"]
    assert features.shape == reference.shape
    assert np.all(np.abs(features[0, 5:-5, -1] / 200 - 1) < 0.01)
    tone = features[0, 10:-10, :40] - reference[0, 10:-10, :40]
    assert np.abs(tone).mean() < 0.15
    by_default = EchoFeatureExtractor(resample=True)
    np.testing.assert_array_equal(by_default(wide, sampling_rate=48000)["input_features"], features)
    np.testing.assert_array_equal(by_default(wav_bytes(wide, 48000, subtype="FLOAT"))["input_features"], features)


def test_features_are_the_same_each_time_whatever_torch_is_set_to(extractor):
    full = EchoFeatureExtractor(ALL_GROUPS)
    first = full(as_float(voice()), sampling_rate=RATE)["input_features"]
    try:
        torch.set_default_dtype(torch.float64)
        again = full(as_float(voice()), sampling_rate=RATE)["input_features"]
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(first, again)


# Padding -------------------------------------------------------------------------------------------------------------


def test_padding_and_truncation_count_frames(extractor):
    audio = [as_float(voice(0.5)), as_float(voice(0.2))]
    padded = extractor(audio, sampling_rate=RATE, padding="max_length", max_length=64)
    assert padded["input_features"].shape == (2, 64, 81) and padded["attention_mask"].sum(1).tolist() == [50, 20]
    cut = extractor(audio, sampling_rate=RATE, max_length=30, truncation=True)
    assert cut["input_features"].shape == (2, 30, 81) and cut["attention_mask"].sum(1).tolist() == [30, 20]
    assert extractor(audio, sampling_rate=RATE, pad_to_multiple_of=16)["input_features"].shape == (2, 64, 81)
    assert "attention_mask" not in extractor(audio, sampling_rate=RATE, return_attention_mask=False)


def test_without_padding_a_list(extractor):
    audio = [as_float(voice(0.5)), as_float(voice(0.2))]
    features = extractor(audio, sampling_rate=RATE, padding=False)
    assert [f.shape for f in features["input_features"]] == [(50, 81), (20, 81)]
    assert [len(mask) for mask in features["attention_mask"]] == [50, 20]
    # and `pad` makes the batch of it later, as in a data collator
    together = extractor.pad([{"input_features": f} for f in features["input_features"]], return_tensors="pt")
    expected = extractor(audio, sampling_rate=RATE, return_tensors="pt")
    assert torch.equal(together["input_features"], expected["input_features"])
    assert torch.equal(together["attention_mask"], expected["attention_mask"])


# Errors --------------------------------------------------------------------------------------------------------------

GOOD = np.zeros(1600, dtype=np.float32)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ([], "audio is empty"),
        (np.zeros(0), "audio is empty"),
        (np.zeros((2, 0)), "audio is empty"),
        ([GOOD, np.zeros(0)], r"audio\[1\] is empty"),
        ([GOOD, GOOD, []], r"audio\[2\] is empty"),
        (np.array([0.0, np.nan] * 800), "audio has 800 NaN or infinite.*nan_to_num"),
        ([GOOD, np.full(1600, np.inf)], r"audio\[1\] has 1600 NaN or infinite"),
        (np.full(1600, 1e300), "infinite"),
        (GOOD[:159], "audio has 159 samples.*one frame of 160.*pad"),
        ([GOOD, GOOD[:1]], r"audio\[1\] has 1 samples"),
        (np.zeros((2, 3, 1600)), r"audio must be 1-D.*\(2, 3, 1600\)"),
        ([np.zeros((20, 1600))], r"audio\[0\] must be 1-D.*\(20, 1600\)"),
        (np.zeros((9, 0)), "audio is empty"),
        (np.zeros(1600, dtype=np.int64), "int64.*np.int16"),
        ([0, 1, 2] * 1000, "int64"),
        (np.zeros(1600, dtype=complex), "complex"),
        (np.zeros(1600, dtype=bool), "bool"),
        ([None], r"audio\[0\] must hold numbers"),
        (None, "audio must hold numbers"),
        (["no such file.wav"], r"audio\[0\]: No audio file at 'no such file.wav'"),
        ("https://example.org/voice.wav", "downloaded first"),
        (".", "'.' is a folder"),
        ([GOOD, b"not audio"], r"audio\[1\]: Cannot read <bytes> as audio.*ffmpeg"),
        (b"", "Nothing to read"),
        (io.StringIO("text"), "binary mode"),
        ({"text": "hello"}, r"\['text'\].*array, raw, bytes, path"),
        ([[0.0, [1.0]]], r"audio\[0\] is not an array of numbers"),
    ],
)
def test_audio_that_cannot_be_used_is_named(extractor, audio, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        extractor(audio, sampling_rate=RATE)


def test_a_file_that_is_not_audio_is_named(extractor, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"audio: Cannot read .*notes\.txt as audio"):
        extractor(path)


def test_another_rate_is_an_error_that_names_both(extractor):
    for given in (
        {"array": GOOD, "sampling_rate": 8000},
        wav_bytes(voice(), 8000),
    ):
        with pytest.raises(ValueError, match=r"audio\[0\].*8000 Hz.*16000 Hz.*resample=True"):
            extractor([given], sampling_rate=RATE)
    with pytest.raises(ValueError, match="44100 Hz.*16000 Hz"):
        extractor(GOOD, sampling_rate=44100)


@pytest.mark.parametrize("rate", [np.nan, np.inf, 0, 1, 7, 999, -16000, 16000.5, 10**7, "16000", True, [16000], b""])
@pytest.mark.parametrize("resample", [False, True])
def test_a_sampling_rate_that_cannot_be_is_refused_wherever_it_is_given(rate, resample):
    extractor = EchoFeatureExtractor({"spectrogram": 8}, resample=resample)
    message = r"sampling_rate.* must be a whole number from 1000 to 1000000 \(Hz\), got"
    for given in (
        lambda: extractor(GOOD, sampling_rate=rate),
        lambda: extractor([GOOD, {"array": GOOD, "sampling_rate": rate}], sampling_rate=RATE),
        lambda: extractor({"raw": GOOD, "sampling_rate": rate}),
        lambda: EchoProcessor(extractor, EchoTokenizer())(GOOD, sampling_rate=rate),
        lambda: resample_audio(GOOD, rate, RATE),
        lambda: EchoFeatureExtractor(sampling_rate=rate),
    ):
        with pytest.raises(ValueError, match=message):
            given()
    assert type(EchoFeatureExtractor(sampling_rate=16000.0).sampling_rate) is int
    with pytest.raises(ValueError, match="target_rate must be"):
        resample_audio(GOOD, RATE, rate)


def test_a_sampling_rate_in_a_header_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="a sampling rate of 7 Hz. Its header"):
        load_audio(wav_bytes(voice(), 7))


def test_audio_and_raw_speech_are_one_and_the_same(extractor, reference):
    np.testing.assert_array_equal(
        extractor(raw_speech=as_float(voice()), sampling_rate=RATE)["input_features"], reference
    )
    with pytest.raises(ValueError, match="audio or raw_speech.*both"):
        extractor(GOOD, raw_speech=GOOD, sampling_rate=RATE)


def test_features_that_are_not_finite_are_not_padded(extractor):
    good = np.zeros((5, 81), dtype=np.float32)
    for value in (np.nan, np.inf):
        bad = np.full((3, 81), value, dtype=np.float32)
        for batch in ([{"input_features": good}, {"input_features": bad}], {"input_features": [good, bad]}):
            for return_tensors in ("np", "pt"):
                with pytest.raises(ValueError, match="recording 1 hold NaN or infinite"):
                    extractor.pad(batch, return_tensors=return_tensors)
    # Resampling overshoots: near the largest number that is infinity.
    loudest = np.sign(voice(rate=8000).astype(np.float32)) * np.finfo(np.float32).max
    with pytest.raises(ValueError, match="NaN or infinite"):
        extractor(loudest, sampling_rate=8000, resample=True)


@pytest.mark.parametrize("module", ["soxr", "soundfile"])
def test_a_missing_package_is_named(extractor, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {module}"):
        if module == "soxr":
            extractor(GOOD, sampling_rate=8000, resample=True)
        else:
            extractor("voice.wav")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_groups": {"pitch": 1}}, "spectrogram"),
        ({"feature_groups": {"spectrogram": 80, "loudness": 1}}, "loudness"),
        ({"feature_groups": {"spectrogram": 80, "waveform": 160}}, "no 'waveform'. Leave it out"),
        ({"feature_groups": {"spectrogram": 80, "voicing": 2}}, "'voicing' is a single channel"),
        ({"feature_groups": {"spectrogram": 1}}, "at least 2"),
        ({"sampling_rate": 0}, "sampling_rate"),
        ({"padding_side": "left"}, "padding_side must be 'right'"),
        ({"hop_length": 10.5}, "hop_length"),
        ({"n_fft": 401}, "n_fft.*even"),
        ({"n_fft": 128}, "n_fft.*hop_length"),
        ({"n_fft": 10**9}, "n_fft.*at most sampling_rate"),
        ({"n_fft": "400"}, "n_fft"),
        ({"hop_length": 10**9, "n_fft": 2 * 10**9}, "hop_length"),
        ({"sampling_rate": 10**9}, "sampling_rate"),
        ({"feature_groups": {"spectrogram": 10**9}}, "'spectrogram' must be at most"),
        ({"padding_value": float("nan")}, "padding_value"),
        ({"padding_value": float("inf")}, "padding_value"),
        ({"padding_value": None}, "padding_value"),
        ({"f0_method": "crepe"}, "crepe"),
        ({"f0_min": 600.0}, "f0_min"),
        ({"f0_min": 1e-9}, "f0_min"),
        ({"f0_max": 1e9}, "f0_max"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        EchoFeatureExtractor(**settings)


def test_f0_settings_do_not_matter_without_f0():
    EchoFeatureExtractor({"spectrogram": 40}, sampling_rate=1000, hop_length=8, n_fft=200, f0_min=600.0)


# Saving, pickling, datasets ------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    extractor = EchoFeatureExtractor(
        {"pitch": 1, "voicing": 1, "spectrogram": 64}, hop_length=200, f0_max=400.0, resample=True
    )
    extractor.save_pretrained(tmp_path)
    loaded = EchoFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert list(loaded.feature_groups) == ["spectrogram", "voicing", "pitch"]
    audio = as_float(voice())
    np.testing.assert_array_equal(
        loaded(audio, sampling_rate=RATE)["input_features"], extractor(audio, sampling_rate=RATE)["input_features"]
    )
    other = EchoFeatureExtractor.from_pretrained(tmp_path, feature_groups={"spectrogram": 80})
    assert other.feature_size == 80 and other.hop_length == 200
    assert "mel" not in loaded.to_json_string()


def test_pickled_and_unchanged_by_use(extractor, reference):
    before = pickle.dumps(extractor)
    copy = pickle.loads(before)
    np.testing.assert_array_equal(copy(as_float(voice()), sampling_rate=RATE)["input_features"], reference)
    assert pickle.dumps(copy) == before  # or `datasets` would not find what it has cached


@pytest.mark.parametrize("f0_method", ["dio", "autocorrelation"])
def test_in_datasets_map_with_processes(f0_method):
    extractor = EchoFeatureExtractor(f0_method=f0_method)
    reference = extractor(as_float(voice()), sampling_rate=RATE)["input_features"]
    rows = [{"bytes": wav_bytes(voice()), "path": None}, {"bytes": wav_bytes(voice(0.3)), "path": None}] * 2
    dataset = Dataset.from_dict({"audio": rows})
    mapped = dataset.map(
        lambda batch: extractor(batch["audio"], padding=False),
        batched=True,
        batch_size=2,
        num_proc=2,
        remove_columns="audio",
    )
    mapped = mapped.with_format("numpy")
    assert [np.shape(mapped[i]["input_features"]) for i in range(4)] == [(50, 81), (30, 81)] * 2
    for i in (0, 2):
        np.testing.assert_allclose(mapped[i]["input_features"], reference[0], rtol=1e-5)


def test_missing_rate_is_warned_of_once():
    code = (
        "import numpy as np; from echo_hf.feature_extraction_echo import EchoFeatureExtractor as E;"
        "e = E({'spectrogram': 8}); [e(np.zeros(1600)) for _ in range(3)]"
    )
    errors = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    assert errors.count("taken to be 16000 Hz") == 1

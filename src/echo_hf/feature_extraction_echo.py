"""Features of Echo: audio in, one array of frames and channels out, with F0 in Hz as its last channel.

Features are extracted from each utterance by itself, before padding, so they do not depend on the batch. All is numpy
but for the F0 method "autocorrelation", so that worker processes can be forked."""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from numbers import Number, Real
from typing import Any

import numpy as np
from transformers.audio_utils import mel_filter_bank
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import TensorType, is_torch_tensor, logging

from .configuration_echo import attach_module, validate_feature_groups
from .pitch_echo import (
    HIGHEST_RATE,
    LOWEST_RATE,
    check_hop_length,
    check_sampling_rate,
    check_tracker,
    estimate_f0_batch,
    voicing,
)

attach_module(__name__)
logger = logging.get_logger(__name__)

# Log-mel values are decades of power (1 decade = 10 dB); a full-scale sine at 1 kHz is 2.4.
MEL_POWER_FLOOR = 1e-10  # under the noise of 16-bit audio
DYNAMIC_RANGE = 8.0  # decades kept under the utterance's peak
MIN_PEAK = -2.0  # decades; a fainter peak counts as this one, so that noise is not scaled up to speech
DECADES_PER_UNIT = 4.0  # scales the features to 0 (silence, padding) to 2 (the peak)

MAX_CHANNELS = 8  # of a recording
BLOCK_FRAMES = 1 << 19  # samples a channel read from a file at a time, 11 s at 48 kHz
SPECTROGRAM_SAMPLES = 1 << 16  # transformed at a time, to stay in the cache
AUDIO_KEYS = ("array", "raw", "bytes", "path")  # of a dict that holds audio, the first that is not None


def is_file(source) -> bool:
    """Whether `source` is what [`open_audio`] opens, rather than samples."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(source, "read")


@contextmanager
def open_audio(source) -> Iterator[tuple[Any, str]]:
    """Opens an audio file with soundfile: WAV, FLAC, Ogg Vorbis and Opus, MP3.

    Args:
        source: a path (`str` or `os.PathLike`), the bytes of a file, or a file opened in binary mode.

    Returns:
        A context of the `soundfile.SoundFile` and its name in messages.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the source is empty, is not audio that can be read, or has an impossible sampling rate, found now
            or by reading within the context.
        `ImportError`: soundfile is not installed.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, its libsndfile is not
        raise ImportError(f"Reading audio files needs soundfile ({error}): `pip install soundfile`.") from error
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        if os.path.isdir(name):
            raise ValueError(f"{name!r} is a folder. Give the audio files in it.")
        if not os.path.isfile(name):
            raise FileNotFoundError(f"No audio file at {name!r}. A URL has to be downloaded first.")
        if not name.isascii() and os.name == "posix":  # soundfile would encode it as UTF-8
            source = os.fsencode(name)
    else:
        name = str(getattr(source, "name", f"<{type(source).__name__}>"))
        content = source.read() if hasattr(source, "read") else bytes(source)
        if not isinstance(content, bytes) or not content:
            raise ValueError(f"Nothing to read from {name}: open it in binary mode, positioned at its start.")
        source = io.BytesIO(content)
    try:
        try:
            file = soundfile.SoundFile(source)
        except TypeError as error:  # a name that ends in .raw
            raise soundfile.SoundFileError(str(error)) from error
        with file:
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                raise ValueError(f"{name} claims a sampling rate of {file.samplerate} Hz. Its header must be wrong.")
            yield file, name
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", str(error)).removeprefix("Error : ").rstrip(".")
        if "possibly a pipe" in reason:  # a damaged MP3
            reason = "no audio is found in it"
        raise ValueError(
            f"Cannot read {name} as audio: it is damaged, or of a format that soundfile does not know ({reason})."
            " Convert it first, e.g. `ffmpeg -i INPUT -ac 1 OUTPUT.wav`."
        ) from error


def load_audio(source) -> tuple[np.ndarray, int]:
    """Reads an audio file whole; `source` and errors as in [`open_audio`].

    Returns:
        float32 samples in [-1, 1], shape `(samples,)` or `(samples, channels)`, and the sampling rate in Hz.
    """
    with open_audio(source) as (file, _):
        # A block at a time, since the header's length may be wrong.
        blocks = [file.read(BLOCK_FRAMES, dtype="float32")]
        while len(blocks[-1]) == BLOCK_FRAMES:
            blocks.append(file.read(BLOCK_FRAMES, dtype="float32"))
        return np.concatenate(blocks), file.samplerate


def to_mono(samples, name: str = "audio", channel_axis: int | None = None) -> np.ndarray:
    """Samples of any kind as one float32 channel, shape `(samples,)`.

    Args:
        samples: array, tensor or list of numbers, shape `(samples,)` or `(1, samples)`. Integers are PCM, scaled by the
            range of their type (uint8 is centered at 128).
        name: what an error calls them.
        channel_axis: the axis of a 2-D array's channels, up to 8, which are averaged. Without it several rows are an
            error.

    Raises:
        `ValueError`: not numeric, 64-bit integers, several rows, more than 8 channels, empty, or NaN or infinite.
    """
    if is_torch_tensor(samples):
        samples = samples.detach().cpu()
        samples = (samples.float() if samples.is_floating_point() else samples).numpy()  # numpy has no bfloat16
    try:
        samples = np.asarray(samples)
    except ValueError as error:
        raise ValueError(f"{name} is not an array of numbers ({error}). A batch must be a flat list.") from error
    if samples.dtype.kind not in "fiu":
        raise ValueError(f"{name} must hold numbers, not {samples.dtype}. Give samples, a file's path or its bytes.")
    if samples.size == 0:
        raise ValueError(f"{name} is empty (shape {samples.shape}). Leave recordings without samples out.")
    if samples.ndim == 2 and len(samples) == 1 and channel_axis is None:
        samples = samples[0]
    if samples.ndim != 1 and (samples.ndim != 2 or channel_axis is None):
        remedy = ""
        if samples.ndim == 2:
            remedy = f" Average its channels before: `audio.mean(axis={int(np.argmin(samples.shape))})`."
        raise ValueError(f"{name} must be 1-D, one channel of one recording, got shape {samples.shape}.{remedy}")
    if samples.dtype.kind in "iu":
        if samples.dtype.itemsize == 8:
            raise ValueError(
                f"{name} holds {samples.dtype}, whose full scale is not known. Convert 16-bit PCM with"
                " `np.asarray(audio, dtype=np.int16)`, or give floats in [-1, 1]."
            )
        full_scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
        samples = (samples - (full_scale if samples.dtype.kind == "u" else 0.0)) / full_scale
    if samples.ndim == 2:
        if samples.shape[channel_axis] > MAX_CHANNELS:
            raise ValueError(
                f"{name} has {samples.shape[channel_axis]} channels; up to {MAX_CHANNELS} are averaged. Give one."
            )
        samples = samples.mean(axis=channel_axis)
    with np.errstate(over="ignore"):  # the next check reports infinite samples
        samples = samples.astype(np.float32)
    return _check_finite(samples, name)


def _check_finite(samples: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(samples).all():
        raise ValueError(
            f"{name} has {np.count_nonzero(~np.isfinite(samples))} NaN or infinite samples. Repair it, e.g. with"
            " `np.nan_to_num`, or leave it out."
        )
    return samples


def import_soxr():
    """The module soxr, or an `ImportError` that says how to install it."""
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"Resampling audio needs soxr ({error}): `pip install soxr`.") from error
    return soxr


def resample_audio(waveform: np.ndarray, sampling_rate: int, target_rate: int) -> np.ndarray:
    """One finite channel, `(samples,)`, from one sampling rate to another (Hz), by soxr at high quality; float32.

    Raises:
        `ValueError`: a rate is no whole number from 1000 to 1000000 Hz; samples near the largest number overflow.
        `ImportError`: soxr is not installed.
    """
    sampling_rate = check_sampling_rate(sampling_rate)
    target_rate = check_sampling_rate(target_rate, "target_rate")
    return _check_finite(
        import_soxr().resample(waveform, sampling_rate, target_rate, quality="HQ"), "The resampled audio"
    )


@lru_cache(maxsize=8)
def _mel_filters(sampling_rate: int, n_fft: int, num_mels: int) -> np.ndarray:
    # Not an attribute of the extractor, so that it is not saved, pickled or hashed.
    filters = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=num_mels,
        min_frequency=0.0,
        max_frequency=sampling_rate / 2,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    filters.flags.writeable = False
    return filters


def log_mel_spectrogram(
    waveform: np.ndarray, sampling_rate: int, hop_length: int, n_fft: int, num_mels: int
) -> np.ndarray:
    """Log-mel spectrogram of one utterance, `(samples,)` to `(samples // hop_length, num_mels)`, float32, in [0, 2].

    `log_mel = log10(max(mel_power, 1e-10))`, `floor = max(peak, -2) - 8` with `peak` the maximum over the utterance,
    `feature = (max(log_mel, floor) - floor) / 4`. This is Whisper's form
    (https://github.com/openai/whisper/blob/main/whisper/audio.py) with a floor of 0 at any level, so that silence
    equals padding. Frame t is centered at sample `t * hop_length`, under a periodic Hann window of `n_fft` samples;
    zeros surround the audio. Mel channels lie from 0 Hz to half the sampling rate."""
    num_frames = len(waveform) // hop_length
    window = np.hanning(n_fft + 1)[:-1]
    padded = np.pad(waveform, n_fft // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop_length][:num_frames]
    filters = _mel_filters(sampling_rate, n_fft, num_mels)
    log_mel = np.empty((num_frames, num_mels), dtype=np.float32)
    block = max(1, SPECTROGRAM_SAMPLES // n_fft)
    for start in range(0, num_frames, block):
        part = slice(start, start + block)
        spectrum = np.fft.rfft(frames[part] * window)  # complex128 (frames, n_fft // 2 + 1)
        mel_power = (spectrum.real**2 + spectrum.imag**2) @ filters
        log_mel[part] = np.log10(np.maximum(mel_power, MEL_POWER_FLOOR))
    floor = max(log_mel.max(), np.float32(MIN_PEAK)) - np.float32(DYNAMIC_RANGE)
    return (np.maximum(log_mel, floor) - floor) / np.float32(DECADES_PER_UNIT)


class EchoFeatureExtractor(SequenceFeatureExtractor):
    r"""Turns audio into `input_features` of shape `(batch, frames, channels)`, in these groups:

    | group | channels | values |
    |---|---|---|
    | `spectrogram` | up to 1024 | log-mel, 0 (80 dB under the peak, silence) to 2; see [`log_mel_spectrogram`] |
    | `voicing` | 1 | correlation of the waveform at its F0, 0 (noise) to 1 (periodic); see [`voicing`] |
    | `pitch` | 1 | F0 in Hz, 0 = unvoiced |

    Args:
        feature_groups (`dict[str, int]`, *optional*, defaults to `{"spectrogram": 80, "pitch": 1}`):
            Name and number of channels of each group. F0 is estimated only for `pitch`.
        sampling_rate (`int`, defaults to 16000): Sampling rate of the features' audio in Hz.
        hop_length (`int`, defaults to 160): Samples from one frame to the next.
        n_fft (`int`, defaults to 400): Samples under the window of the spectrogram.
        f0_method (`str`, defaults to `"dio_fast"`):
            Tracker of F0: `"dio"` (WORLD's DIO and StoneMask), `"dio_fast"` (the same, DIO on every fourth sample) or
            `"autocorrelation"` (torch, a whole batch at once, on any device; finds voices whose fundamental is missing
            or in noise, which DIO does not).
        f0_min (`float`, defaults to 71.0): Lowest F0 in Hz.
        f0_max (`float`, defaults to 500.0): Highest F0 in Hz.
        padding_value (`float`, defaults to 0.0): Value of padding frames, in all channels.
        resample (`bool`, defaults to `False`): Whether audio of another sampling rate is resampled, or is an error.
        return_attention_mask (`bool`, defaults to `True`): Whether `attention_mask` (1 = frame) is returned.

    Raises:
        `ValueError`: a setting cannot work; the message names it.

    Example:

    ```python
    >>> import numpy as np
    >>> from echo_hf import EchoFeatureExtractor

    >>> feature_extractor = EchoFeatureExtractor()
    >>> features = feature_extractor(np.zeros(16000, dtype=np.float32), sampling_rate=16000, return_tensors="pt")
    >>> features.input_features.shape
    torch.Size([1, 100, 81])

    ```
    """

    model_input_names = ["input_features", "attention_mask"]
    _auto_class = "AutoFeatureExtractor"

    def __init__(
        self,
        feature_groups: dict[str, int] | None = None,
        sampling_rate: int = 16000,
        hop_length: int = 160,
        n_fft: int = 400,
        f0_method: str = "dio_fast",
        f0_min: float = 71.0,
        f0_max: float = 500.0,
        padding_value: float = 0.0,
        resample: bool = False,
        return_attention_mask: bool = True,
        **kwargs,
    ):
        groups = validate_feature_groups({"spectrogram": 80, "pitch": 1} if feature_groups is None else feature_groups)
        kwargs["feature_size"] = sum(groups.values())  # a saved value may be that of other groups
        super().__init__(
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        self.feature_groups = groups
        self.hop_length = hop_length
        self.n_fft = n_fft
        self.f0_method = f0_method
        self.f0_min = f0_min
        self.f0_max = f0_max
        self.resample = resample
        self._check()

    def _check(self):
        if self.padding_side != "right":
            raise ValueError(f"padding_side must be 'right', where the encoder expects it, got {self.padding_side!r}.")
        is_number = isinstance(self.padding_value, Real) and not isinstance(self.padding_value, bool)
        if not is_number or not np.isfinite(self.padding_value):
            raise ValueError(f"padding_value must be a finite number, got {self.padding_value!r}.")
        self.sampling_rate = check_sampling_rate(self.sampling_rate)
        check_hop_length(self.hop_length, self.sampling_rate)
        if isinstance(self.n_fft, bool) or not isinstance(self.n_fft, int) or self.n_fft % 2:
            raise ValueError(f"n_fft must be an even whole number, got {self.n_fft!r}.")
        if not self.hop_length <= self.n_fft <= self.sampling_rate:
            raise ValueError(
                f"n_fft ({self.n_fft}) must be at least hop_length ({self.hop_length}) and at most sampling_rate"
                f" ({self.sampling_rate})."
            )
        if self.feature_size < 2:
            raise ValueError("feature_groups: a single channel cannot be padded as a sequence; give at least 2.")
        if "pitch" in self.feature_groups:
            check_tracker(self.f0_method, self.f0_min, self.f0_max, self.sampling_rate)

    def __call__(
        self,
        audio=None,
        sampling_rate: int | None = None,
        padding=True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | TensorType | None = None,
        return_attention_mask: bool | None = None,
        resample: bool | None = None,
        device: str = "cpu",
        raw_speech=None,
        **kwargs,
    ) -> BatchFeature:
        """Features of one recording or of a batch.

        Args:
            audio: One recording, or a list of recordings of any kind:

                - numpy array, torch tensor or list of numbers, shape `(samples,)`: floats in [-1, 1], or integer PCM.
                  A 2-D array is a batch, `(recordings, samples)`.
                - path, bytes or binary file object of an audio file; up to 8 channels are averaged.
                - dict with `"array"` or `"raw"`, and `"sampling_rate"`; or with `"bytes"` or `"path"`, as `datasets`
                  gives them.
            sampling_rate (`int`, *optional*):
                Of arrays that do not say their own, in Hz. The extractor's, with a warning, if not given.
            padding, max_length, truncation, pad_to_multiple_of, return_tensors, return_attention_mask:
                As of [`~SequenceFeatureExtractor.pad`], with lengths in frames.
            resample (`bool`, *optional*): As the extractor's if not given.
            device (`str`, defaults to `"cpu"`): Where the F0 method "autocorrelation" computes.
            raw_speech (*optional*): Another name of `audio`, which other extractors have.
            kwargs: Ignored: what callers of any extractor pass.

        Returns:
            [`BatchFeature`] with `input_features`, float32 `(batch, frames, channels)`, and `attention_mask`, int
            `(batch, frames)`. A recording of n samples has `n // hop_length` frames; frame t lies at
            `t * hop_length / sampling_rate` seconds.

        Raises:
            `ValueError`: a recording is empty, not finite, shorter than a hop, not numeric, has several channels in an
                array, cannot be read, or has another sampling rate and is not to be resampled.
            `FileNotFoundError`: there is no file at a path.
        """
        if audio is not None and raw_speech is not None:
            raise ValueError("Give audio or raw_speech, which are the same; it got both.")
        audio = raw_speech if audio is None else audio
        features = self._hear(audio, sampling_rate, resample, device)
        padded = self.pad(
            BatchFeature({"input_features": features}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
        )
        if return_tensors is None and (padding is False or padding == "do_not_pad"):
            return BatchFeature({key: list(value) for key, value in padded.items()})
        return padded.convert_to_tensors(return_tensors)

    def _hear(self, audio, sampling_rate: int | None, resample: bool | None, device: str) -> list[np.ndarray]:
        """Features of each recording, `(frames, channels)`; the arguments as in `__call__`."""
        resample = self.resample if resample is None else resample
        recordings, is_batch = _as_batch(audio)
        waveforms = [
            self._read(recording, f"audio[{index}]" if is_batch else "audio", sampling_rate, resample)
            for index, recording in enumerate(recordings)
        ]
        f0 = [None] * len(waveforms)
        if "pitch" in self.feature_groups:
            settings = (self.sampling_rate, self.hop_length, self.f0_method, self.f0_min, self.f0_max)
            f0 = estimate_f0_batch(waveforms, *settings, device=device)
        return [self._extract(waveform, track) for waveform, track in zip(waveforms, f0)]

    def pad(self, processed_features, *args, **kwargs) -> BatchFeature:
        """As `SequenceFeatureExtractor.pad`, with a `ValueError` for features or padding that are not finite."""
        padded = super().pad(processed_features, *args, **kwargs)
        for index, features in enumerate(padded["input_features"]):
            is_finite = features.isfinite() if is_torch_tensor(features) else np.isfinite(features)
            if not is_finite.all():
                raise ValueError(
                    f"input_features of recording {index} hold NaN or infinite values. Make them anew, from samples in"
                    " [-1, 1]."
                )
        return padded

    def _read(self, recording, name: str, sampling_rate: int | None, resample: bool) -> np.ndarray:
        """A recording of any kind as float32 samples `(samples,)` at the extractor's rate; `name` is for errors."""
        samples, rate, channel_axis = recording, None, None
        if hasattr(recording, "get_all_samples"):  # the decoder of torchcodec, which `datasets.Audio` gives
            decoded = recording.get_all_samples()
            samples, rate, channel_axis = decoded.data, decoded.sample_rate, 0
        elif isinstance(recording, Mapping):
            samples = next((recording[key] for key in AUDIO_KEYS if recording.get(key) is not None), None)
            rate = recording.get("sampling_rate")
            if samples is None:
                raise ValueError(f"{name} is a dict with {list(recording)}; it needs one of {', '.join(AUDIO_KEYS)}.")
        if is_file(samples):
            try:
                samples, rate = load_audio(samples)
                channel_axis = 1
            except (ValueError, FileNotFoundError) as error:
                kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                raise kind(f"{name}: {error}") from error
        if rate is not None:
            rate = check_sampling_rate(rate, f"The sampling_rate of {name}")
        elif sampling_rate is not None:
            rate = check_sampling_rate(sampling_rate)
        else:
            rate = self.sampling_rate
            logger.warning_once(
                f"The sampling rate of the audio is not given and taken to be {self.sampling_rate} Hz. Pass"
                " `sampling_rate`, so that audio of another rate is noticed."
            )
        waveform = to_mono(samples, name, channel_axis)
        if rate != self.sampling_rate:
            if not resample:
                raise ValueError(
                    f"{name} has a sampling rate of {rate} Hz, and features are made at {self.sampling_rate} Hz. Pass"
                    " `resample=True`, or resample it before."
                )
            waveform = resample_audio(waveform, rate, self.sampling_rate)
        if len(waveform) < self.hop_length:
            raise ValueError(
                f"{name} has {len(waveform)} samples at {self.sampling_rate} Hz, less than one frame of"
                f" {self.hop_length}. Leave it out, or pad it with zeros."
            )
        return waveform

    def _extract(self, waveform: np.ndarray, f0: np.ndarray | None) -> np.ndarray:
        """Samples `(samples,)` and F0 at every hop to features, float32 `(frames, channels)`."""
        groups, rate, hop_length = self.feature_groups, self.sampling_rate, self.hop_length
        features = [log_mel_spectrogram(waveform, rate, hop_length, self.n_fft, groups["spectrogram"])]
        if f0 is not None:
            f0 = f0[: len(features[0])]  # the tracker has one frame more
        if "voicing" in groups:
            features.append(voicing(waveform, f0, rate, hop_length)[:, None])
        if "pitch" in groups:
            features.append(f0[:, None])
        return np.concatenate(features, axis=1, dtype=np.float32)


def _as_batch(audio) -> tuple[list, bool]:
    """The recordings in `audio`, and whether it was a batch rather than one recording."""
    if isinstance(audio, Sequence) and not is_file(audio):
        if len(audio) == 0:
            raise ValueError("audio is empty: give at least one recording, of at least one sample.")
        return (list(audio), True) if not isinstance(audio[0], Number) else ([audio], False)
    if getattr(getattr(audio, "dtype", None), "kind", "") == "O":
        return list(audio), True
    shape = tuple(getattr(audio, "shape", ()))  # of an array or a tensor
    if len(shape) != 2 or 0 in shape:
        return [audio], False
    return array_rows(audio), True


def array_rows(audio) -> list:
    """Recordings of an array or tensor `(recordings, samples)`; a `ValueError` if it looks like channels."""
    if audio.shape[1] <= MAX_CHANNELS and audio.shape[1] < audio.shape[0]:
        raise ValueError(
            f"audio of shape {tuple(audio.shape)} looks like (samples, channels), and a 2-D array is a batch,"
            " (recordings, samples). Average its channels before: `audio.mean(axis=1)`."
        )
    return list(audio)

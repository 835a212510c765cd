"""Pitch: a waveform in, F0 on the frames of the spectrogram out.

F0 is in Hz and 0 where unvoiced. A tracker is a function in `TRACKERS`; `estimate_f0` and `estimate_f0_batch` call it.
pyworld and torch are imported where they are first needed: a model needs no pyworld, and processes that only make
features can be forked without torch."""

import math
import operator
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real

import numpy as np

# Beyond these trackers hang, take all memory, or read memory that is not theirs.
LOWEST_RATE, HIGHEST_RATE = 1000, 1_000_000  # Hz, of audio
LOWEST_F0, HIGHEST_F0 = 20.0, 2000.0  # Hz; voices lie within, from creak to whistle

# The range of F0 in speech, that of Echo's published pitch per token.
F0_FLOOR, F0_CEILING = 71.0, 500.0  # Hz

# DIO discards voiced runs under 3 frames, so a coarse grid would lose short voiced sounds.
LONGEST_FRAME_PERIOD = 10.0  # ms

# Longer audio is tracked in pieces, because DIO takes about 1.5 MB a second of audio.
CHUNK_SECONDS = 60.0
CONTEXT_SECONDS = 2.0  # on either side of a piece: many times the longest period

# Voicing is measured below about 1 kHz, over 25 ms and as much a period later, as in Ghahremani et al.
VOICING_FILTER_SECONDS = 0.0012  # length of the Hann window that filters: half the amplitude at 830 Hz, none at 1.7 kHz
VOICING_RATE = 8000.0  # Hz, at least, to which the sampling rate is lowered
VOICING_WINDOW_SECONDS = 0.025
VOICING_POWER_FLOOR = 1e-12  # mean square, under the noise of 16-bit audio
VOICING_FRAMES = 2048  # held at a time

IMPORTING_PROCESS = os.getpid()  # another one has been forked from it


def _import_pyworld():
    # pyworld 0.3.5 imports pkg_resources, which setuptools 82 removed; a build for another numpy gives a ValueError.
    try:
        import pyworld
    except (ImportError, ValueError) as error:
        raise ImportError(
            f"F0 needs pyworld, which cannot be imported here ({error}). Run `pip install"
            " pyworld-prebuilt`; or, to keep pyworld 0.3.5 itself, `pip install 'setuptools<82'`."
        ) from error
    return pyworld


def track_dio(
    waveform: np.ndarray, sampling_rate: int, frame_period: float, f0_min: float, f0_max: float
) -> np.ndarray:
    """F0 by DIO and StoneMask (Morise et al., "WORLD", https://doi.org/10.1587/transinf.2015EDP7457).

    Args:
        waveform: shape `(samples,)`, float64.
        sampling_rate: Hz.
        frame_period: ms from one frame to the next.
        f0_min, f0_max: range of F0 in Hz.

    Returns:
        float64, shape `(frames,)`, `frames = floor(duration / frame_period) + 1`: F0 in Hz, 0 = unvoiced.
    """
    pyworld = _import_pyworld()
    f0, times = pyworld.dio(waveform, sampling_rate, f0_floor=f0_min, f0_ceil=f0_max, frame_period=frame_period)
    return pyworld.stonemask(waveform, f0, times, sampling_rate)


def track_dio_fast(
    waveform: np.ndarray, sampling_rate: int, frame_period: float, f0_min: float, f0_max: float
) -> np.ndarray:
    """F0 by DIO at a fourth of the sampling rate and StoneMask at all of it; otherwise as [`track_dio`]."""
    pyworld = _import_pyworld()
    # Under 4 kHz DIO loses the harmonics that it compares.
    speed = int(min(4, max(1, sampling_rate // 4000)))
    f0, times = pyworld.dio(
        waveform, sampling_rate, f0_floor=f0_min, f0_ceil=f0_max, frame_period=frame_period, speed=speed
    )
    return pyworld.stonemask(waveform, f0, times, sampling_rate)


def track_autocorrelation_batch(
    waveforms: Sequence[np.ndarray],
    sampling_rate: int,
    frame_period: float,
    f0_min: float,
    f0_max: float,
    device: str = "cpu",
) -> list[np.ndarray]:
    """F0 of several utterances, by [`autocorrelation_echo.track_autocorrelation`]; an `ImportError` without torch."""
    try:
        import torch

        from .autocorrelation_echo import track_autocorrelation
    except ImportError as error:
        raise ImportError(f"The F0 method 'autocorrelation' needs torch ({error}): `pip install torch`.") from error

    if os.getpid() != IMPORTING_PROCESS:
        # OpenMP would wait forever for threads that were not forked.
        torch.set_num_threads(1)
    return track_autocorrelation(waveforms, sampling_rate, frame_period, f0_min, f0_max, device)


# Trackers that take several utterances at once, and a device.
BATCH_TRACKERS = {"autocorrelation": track_autocorrelation_batch}
# Another tracker is a function with the arguments of `track_dio`, entered here by name.
TRACKERS = {"dio": track_dio, "dio_fast": track_dio_fast, **BATCH_TRACKERS}


def check_sampling_rate(sampling_rate, name: str = "sampling_rate") -> int:
    """A sampling rate (Hz) of any numeric type as an `int`; `name` is what an error calls it.

    Raises:
        `ValueError`: it is no whole number from 1000 to 1000000 Hz.
    """
    value = sampling_rate
    if isinstance(value, Real) and not isinstance(value, Integral) and math.isfinite(value) and value == int(value):
        value = int(value)
    try:
        value = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        value = None
    if value is None or not LOWEST_RATE <= value <= HIGHEST_RATE:
        raise ValueError(
            f"{name} must be a whole number from {LOWEST_RATE} to {HIGHEST_RATE} (Hz), got {sampling_rate!r}. Give the"
            " rate at which the audio was recorded, such as 16000."
        )
    return value


def check_hop_length(hop_length, sampling_rate: int):
    """Raises a `ValueError` if `hop_length` is no whole number of samples from 1 to a second."""
    if isinstance(hop_length, bool) or not isinstance(hop_length, Integral) or not 1 <= hop_length <= sampling_rate:
        raise ValueError(
            f"hop_length must be a whole number of samples from 1 to {sampling_rate} (a second), got {hop_length!r}."
        )


def check_tracker(method: str, f0_min: float, f0_max: float, sampling_rate: int):
    """Raises a `ValueError` that says which setting of a tracker cannot work, and what can."""
    if method not in TRACKERS:
        raise ValueError(f"F0 method {method!r} is not known; choose one of {', '.join(TRACKERS)}.")
    for name, value in (("f0_min", f0_min), ("f0_max", f0_max)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name} must be a number (Hz), got {value!r}.")
    highest = min(HIGHEST_F0, sampling_rate / 2)
    if not LOWEST_F0 <= f0_min < f0_max <= highest:
        raise ValueError(
            f"f0_min ({f0_min} Hz) and f0_max ({f0_max} Hz) must satisfy {LOWEST_F0:g} <= f0_min < f0_max <="
            f" {highest:g} Hz at a sampling rate of {sampling_rate} Hz; speech lies within {F0_FLOOR:g} to"
            f" {F0_CEILING:g} Hz."
        )


def estimate_f0(
    waveform: np.ndarray,
    sampling_rate: int,
    hop_length: int,
    method: str = "dio_fast",
    f0_min: float = F0_FLOOR,
    f0_max: float = F0_CEILING,
) -> np.ndarray:
    """F0 of one utterance, one value every `hop_length` samples.

    Give the utterance without padding: zeros at the end change DIO's last frames. Audio of more than a minute is
    tracked in overlapping pieces, so that memory does not grow with it.

    Args:
        waveform: shape `(samples,)`, any scale.
        sampling_rate: Hz.
        hop_length: samples from one frame to the next; frame t lies at `t * hop_length / sampling_rate` seconds.
        method: a name in `TRACKERS`: `"dio"`, `"dio_fast"` or `"autocorrelation"`.
        f0_min, f0_max: range of F0 in Hz.

    Returns:
        float64, shape `(samples // hop_length + 1,)`: F0 in Hz, 0 = unvoiced.

    Raises:
        `ValueError`: the waveform is not 1-D, is empty or not finite, or a setting is not possible.
        `ImportError`: pyworld or torch is needed and cannot be imported.
    """
    return estimate_f0_batch([waveform], sampling_rate, hop_length, method, f0_min, f0_max)[0]


def estimate_f0_batch(
    waveforms: Sequence[np.ndarray],
    sampling_rate: int,
    hop_length: int,
    method: str = "dio_fast",
    f0_min: float = F0_FLOOR,
    f0_max: float = F0_CEILING,
    device: str = "cpu",
) -> list[np.ndarray]:
    """F0 of several utterances; arguments, results and errors as of [`estimate_f0`].

    pyworld's trackers run in as many threads as there are cores, or in one in a forked process. `device` is where a
    tracker in `BATCH_TRACKERS` computes."""
    sampling_rate = check_sampling_rate(sampling_rate)
    check_hop_length(hop_length, sampling_rate)
    check_tracker(method, f0_min, f0_max, sampling_rate)
    waveforms = [_check_waveform(waveform) for waveform in waveforms]
    frame_period = 1000.0 * hop_length / sampling_rate  # ms
    # A coarse grid is tracked on a finer one. The margin is for periods like 10.000000000000002 ms.
    refinement = max(1, math.ceil(frame_period / LONGEST_FRAME_PERIOD - 1e-6))
    settings = (sampling_rate, frame_period / refinement, f0_min, f0_max)
    chunk = max(1, int(CHUNK_SECONDS * sampling_rate / hop_length))
    context = math.ceil(CONTEXT_SECONDS * sampling_rate / hop_length)
    f0 = [np.zeros(len(waveform) // hop_length + 1) for waveform in waveforms]
    places = [
        (index, start, min(start + chunk, len(track)))
        for index, track in enumerate(f0)
        for start in range(0, len(track), chunk)
    ]
    firsts = [max(0, start - context) for _, start, _ in places]
    pieces = [
        waveforms[index][first * hop_length : (stop + context) * hop_length]
        for (index, _, stop), first in zip(places, firsts)
    ]
    if method in BATCH_TRACKERS:
        tracks = BATCH_TRACKERS[method](pieces, *settings, device=device)
    else:

        def track_one(piece):
            return TRACKERS[method](np.ascontiguousarray(piece, dtype=np.float64), *settings)

        # pyworld releases Python's lock while it computes.
        with ThreadPoolExecutor(max(1, min(len(pieces), _num_threads()))) as pool:
            tracks = list(pool.map(track_one, pieces))
    for (index, start, stop), first, track in zip(places, firsts, tracks):
        track = track[::refinement]
        # Where the period in ms is not exact in binary, DIO may give one frame less.
        f0[index][start:stop] = track[np.minimum(np.arange(start - first, stop - first), len(track) - 1)]
    return f0


def _num_threads() -> int:
    if os.getpid() != IMPORTING_PROCESS:
        return 1  # worker processes share the cores already
    affinity = getattr(os, "sched_getaffinity", None)  # what this process may use; not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def interpolate_f0(f0: np.ndarray) -> np.ndarray:
    """F0 `(frames,)` in Hz carried across unvoiced frames: log-F0 is linear between voiced neighbors and constant at
    the ends; float64. All 0 if no frame is voiced."""
    f0 = np.asarray(f0, dtype=np.float64)
    voiced = np.flatnonzero(f0)
    if len(voiced) == 0:
        return np.zeros(len(f0))
    carried = np.exp(np.interp(np.arange(len(f0)), voiced, np.log(f0[voiced])))
    carried[voiced] = f0[voiced]
    return carried


def voicing(waveform: np.ndarray, f0: np.ndarray, sampling_rate: int, hop_length: int) -> np.ndarray:
    """How periodic the waveform is at its F0.

    The correlation coefficient of two windows of 25 ms, one period apart and centered at the frame, below about 1 kHz;
    0 where it is negative. It is 1 for a periodic sound, and about `s / (s + n)` for one of power s in noise of power
    n. The period is that of F0 carried across unvoiced frames. After Ghahremani et al., "A pitch extraction algorithm
    tuned for automatic speech recognition" (https://doi.org/10.1109/ICASSP.2014.6854049), who map the correlation
    further.

    Args:
        waveform: shape `(samples,)`, in [-1, 1].
        f0: shape `(frames,)`, Hz, 0 = unvoiced, on frames `hop_length` samples apart.
        sampling_rate: Hz.
        hop_length: samples from one frame to the next.

    Returns:
        float32, shape `(frames,)`, in [0, 1]; 0 without any voiced frame.

    Raises:
        `ValueError`: the waveform or F0 is not 1-D, is empty or not finite, or a setting is not possible.
    """
    sampling_rate = check_sampling_rate(sampling_rate)
    check_hop_length(hop_length, sampling_rate)
    waveform, f0 = _check_waveform(waveform), _check_f0(f0, sampling_rate)
    carried = interpolate_f0(f0)
    result = np.zeros(len(f0), dtype=np.float32)
    if carried[0] == 0:
        return result

    factor = max(1, int(sampling_rate / VOICING_RATE))
    rate = sampling_rate / factor  # Hz
    lowered = _lower_rate(waveform, factor, VOICING_FILTER_SECONDS, sampling_rate)
    lags = rate / carried  # samples of the lower rate
    width = round(VOICING_WINDOW_SECONDS * rate)
    # A cubic interpolates the correlations at four whole lags, `whole - 1` to `whole + 2`.
    whole = np.maximum(np.floor(lags).astype(np.int64), 1)
    starts = np.floor(np.arange(len(f0)) * (hop_length / factor) - (width + lags) / 2.0 + 0.5).astype(np.int64)
    # Windows lie within the utterance, where it is long enough.
    starts = np.maximum(np.minimum(starts, len(lowered) - width - whole - 2), 0)
    lowered = np.pad(lowered, (0, max(0, int((starts + whole).max()) + width + 2 - len(lowered))))
    weights = _cubic_weights(np.clip(lags - whole, 0.0, 1.0))
    windows = np.lib.stride_tricks.sliding_window_view(lowered, width)
    longer = np.lib.stride_tricks.sliding_window_view(lowered, width + 3)
    for first in range(0, len(f0), VOICING_FRAMES):
        part = slice(first, first + VOICING_FRAMES)
        here = windows[starts[part]]
        here = here - here.mean(axis=1, keepdims=True)
        there = np.lib.stride_tricks.sliding_window_view(longer[(starts + whole - 1)[part]], width, axis=1)
        products = np.einsum("fw,flw->fl", here, there)
        mean = there.mean(axis=2)
        power = np.einsum("flw,flw->fl", there, there) - width * mean**2
        floor = VOICING_POWER_FLOOR * width
        scale = np.sqrt((np.einsum("fw,fw->f", here, here) + floor)[:, None] * (np.maximum(power, 0.0) + floor))
        result[part] = np.clip(np.sum(products / scale * weights[part], axis=1), 0.0, 1.0)
    return result


def _cubic_weights(fraction: np.ndarray) -> np.ndarray:
    """Lagrange's weights of values at -1, 0, 1 and 2 for the cubic's value at `fraction`; `(frames, 4)`."""
    before, after = fraction + 1.0, 1.0 - fraction
    further = 2.0 - fraction
    return np.stack(
        [
            -fraction * after * further / 6.0,
            before * after * further / 2.0,
            before * fraction * further / 2.0,
            -before * fraction * after / 6.0,
        ],
        axis=1,
    )


def _lower_rate(waveform: np.ndarray, factor: int, seconds: float, sampling_rate: int) -> np.ndarray:
    """Every `factor`-th sample of the waveform filtered by a Hann window of so many seconds; float32."""
    half = max(1, round(seconds / 2 * sampling_rate))
    taps = np.hanning(2 * half + 3)[1:-1].astype(np.float32)
    taps /= taps.sum()
    count = -(-len(waveform) // factor)
    # Scaled to full scale if louder, so that squares fit.
    padded = np.pad(waveform / max(1.0, float(np.abs(waveform).max())), (half, half + factor)).astype(np.float32)
    lowered = np.zeros(count, dtype=np.float32)
    for first, tap in enumerate(taps):
        lowered += tap * padded[first : first + factor * count : factor]
    return lowered


def _check_waveform(waveform) -> np.ndarray:
    # WORLD checks nothing.
    waveform = np.asarray(waveform)
    if waveform.ndim != 1 or len(waveform) == 0 or not np.isfinite(waveform).all():
        raise ValueError(f"The waveform must be 1-D, not empty and finite, got shape {waveform.shape}.")
    return waveform


def _check_f0(f0, sampling_rate: int) -> np.ndarray:
    f0 = np.asarray(f0)
    if f0.ndim != 1 or len(f0) == 0 or not np.all((f0 >= 0) & (f0 <= sampling_rate / 2)):
        raise ValueError(
            f"f0 must be 1-D, not empty and within 0 to {sampling_rate / 2:g} Hz (half the sampling rate) in every"
            f" frame, got shape {f0.shape}."
        )
    return f0

"""Pitch: a waveform in, F0 on the frames of the spectrogram out.

F0 is in Hz and 0 where the voice is not voiced; "pitch" is the normalised value. A tracker is a plain function in
`TRACKERS`, and `estimate_f0` is the one entry to all of them. Everything here is numpy in float64. pyworld is imported
where it is first needed, so that a model that is given its features never asks for it.
"""

import math

import numpy as np

# Published constants of Echo's pitch per token.
F0_FLOOR = 71.0  # Hz, WORLD's lowest F0; normalised to 0
F0_CEILING = 500.0  # Hz, normalised to 1
TOKEN_F0_THRESHOLD = 100.0  # Hz; a token whose F0 is below counts as unvoiced

# DIO discards voiced runs under 3 frames, whatever a frame lasts: on a coarser grid it loses short voiced sounds.
LONGEST_FRAME_PERIOD = 10.0  # ms

# Longer audio is tracked in pieces, because DIO holds the whole signal in every band: about 1.5 MB a second of audio.
# The context is what a piece hears on either side beyond the frames it gives: many times the longest period (14 ms).
CHUNK_SECONDS = 60.0
CONTEXT_SECONDS = 2.0

ENVELOPE_FRAMES = 1000  # frames of WORLD's full spectra held at a time (513 values each at 16 kHz)
ENVELOPE_POWER_FLOOR = 1e-10  # under all speech, above the 1e-17 WORLD adds to an empty spectrum: silence is constant

TOKEN_PITCH_METHODS = {"mean": np.mean, "median": np.median, "last": lambda values: values[-1]}


def _import_pyworld():
    # pyworld 0.3.5 imports pkg_resources, which setuptools 82 removed; a build for another numpy gives a ValueError.
    try:
        import pyworld
    except (ImportError, ValueError) as error:
        raise ImportError(
            f"F0 and WORLD's features need pyworld, which cannot be imported here ({error}). Run `pip install"
            " pyworld-prebuilt`; or, to keep pyworld 0.3.5 itself, `pip install 'setuptools<82'`."
        ) from error
    return pyworld


def track_dio(
    waveform: np.ndarray, sampling_rate: int, frame_period: float, f0_min: float, f0_max: float
) -> np.ndarray:
    """F0 by DIO, refined by StoneMask (Morise et al., "WORLD", https://doi.org/10.1587/transinf.2015EDP7457).

    Args:
        waveform: shape `(samples,)`, float64.
        sampling_rate: Hz.
        frame_period: time from one frame to the next, in ms.
        f0_min, f0_max: range of F0 in Hz.

    Returns:
        float64, shape `(frames,)`, `frames = floor(duration / frame_period) + 1`: F0 in Hz, 0 = unvoiced.
    """
    pyworld = _import_pyworld()
    f0, times = pyworld.dio(waveform, sampling_rate, f0_floor=f0_min, f0_ceil=f0_max, frame_period=frame_period)
    return pyworld.stonemask(waveform, f0, times, sampling_rate)


# Another tracker is a function with the arguments of `track_dio`, entered here under the name that `method` takes.
TRACKERS = {"dio": track_dio}


def check_tracker(method: str, f0_min: float, f0_max: float, sampling_rate: int):
    """Raises a `ValueError` that says which of the settings of a tracker cannot work, and what can."""
    if method not in TRACKERS:
        raise ValueError(f"F0 method {method!r} is not known; choose one of {', '.join(TRACKERS)}.")
    if not 0 < f0_min < f0_max <= sampling_rate / 2:
        raise ValueError(
            f"f0_min ({f0_min} Hz) and f0_max ({f0_max} Hz) must satisfy 0 < f0_min < f0_max <= {sampling_rate / 2:g}"
            f" Hz, half the sampling rate; speech lies within {F0_FLOOR:g} to {F0_CEILING:g} Hz."
        )


def estimate_f0(
    waveform: np.ndarray,
    sampling_rate: int,
    hop_length: int,
    method: str = "dio",
    f0_min: float = F0_FLOOR,
    f0_max: float = F0_CEILING,
) -> np.ndarray:
    """F0 of one utterance, one value every `hop_length` samples.

    Give it the utterance without padding: zeros at the end change DIO's last frames. Audio of more than a minute is
    tracked in overlapping pieces, so that memory does not grow with it.

    Args:
        waveform: shape `(samples,)`, any scale.
        sampling_rate: Hz.
        hop_length: samples from one frame to the next; frame t lies at `t * hop_length / sampling_rate` seconds.
        method: a name in `TRACKERS`.
        f0_min, f0_max: range of F0 in Hz.

    Returns:
        float64, shape `(samples // hop_length + 1,)`: F0 in Hz, 0 = unvoiced.

    Raises:
        `ValueError`: the waveform is not 1-D, is empty or not finite, or a setting is not possible.
        `ImportError`: pyworld is needed and cannot be imported; the message says what to install.
    """
    check_tracker(method, f0_min, f0_max, sampling_rate)
    waveform = _check_waveform(waveform)
    frame_period = 1000.0 * hop_length / sampling_rate  # ms
    # A coarse grid is tracked on a finer one that contains it. The margin is for periods like 10.000000000000002 ms.
    refinement = max(1, math.ceil(frame_period / LONGEST_FRAME_PERIOD - 1e-6))
    num_frames = len(waveform) // hop_length + 1
    chunk = max(1, int(CHUNK_SECONDS * sampling_rate / hop_length))
    context = math.ceil(CONTEXT_SECONDS * sampling_rate / hop_length)
    f0 = np.zeros(num_frames)
    for start in range(0, num_frames, chunk):
        stop, first = min(start + chunk, num_frames), max(0, start - context)
        piece = np.ascontiguousarray(waveform[first * hop_length : (stop + context) * hop_length], dtype=np.float64)
        track = TRACKERS[method](piece, sampling_rate, frame_period / refinement, f0_min, f0_max)[::refinement]
        # Where the period in ms is not exact in binary, DIO may count one frame less: the last value stands in for it.
        f0[start:stop] = track[np.minimum(np.arange(start - first, stop - first), len(track) - 1)]
    return f0


def align_f0(f0: np.ndarray, num_frames: int) -> np.ndarray:
    """F0 on another number of frames by the nearest index, `floor(i * F / T)` for i in 0..T-1.

    Values are chosen, never averaged or interpolated: what lies between a voiced and an unvoiced frame is not a pitch.

    Args:
        f0: shape `(F,)`.
        num_frames: T, the number of frames wanted.

    Returns:
        shape `(T,)`, values of `f0`.

    Raises:
        `ValueError`: `f0` is empty, or fewer than one frame is wanted.
    """
    f0 = np.asarray(f0)
    if f0.ndim != 1 or len(f0) == 0 or num_frames < 1:
        raise ValueError(f"Cannot align F0 of shape {f0.shape} to {num_frames} frames; both need at least one frame.")
    # In whole numbers, where a product in floating point could round below the index that is meant.
    return f0[np.minimum(np.arange(num_frames) * len(f0) // num_frames, len(f0) - 1)]


def normalise_pitch(f0: np.ndarray) -> np.ndarray:
    """Pitch of F0 in Hz: `(f0 - 71) / (500 - 71)` where `f0` is not zero; zero stays zero. Any shape."""
    f0 = np.asarray(f0, dtype=np.float64)
    return np.where(f0 == 0.0, 0.0, (f0 - F0_FLOOR) / (F0_CEILING - F0_FLOOR))


def pitch_per_token(
    f0: np.ndarray,
    hop_seconds: float,
    num_tokens: int | None = None,
    tokens_per_second: float | None = None,
    method: str = "mean",
    duration: float | None = None,
) -> np.ndarray:
    """One normalised pitch for each token, from the F0 of the token's span of time.

    By label length (`num_tokens` alone) the duration is split evenly over the tokens. That tells how many labels there
    are, which a model must not know when it generates: this form is for analysis. By a fixed rate
    (`tokens_per_second`), token i spans `[i, i + 1) / tokens_per_second` whatever the label length; tokens after the
    end of the audio are unvoiced.

    A token takes the mean, the median or the last value of the frames in its span, unvoiced ones included, at least
    one frame; a result below 100 Hz becomes 0. The first token's value is repeated in front for the BOS position.

    Args:
        f0: shape `(frames,)`, Hz, 0 = unvoiced.
        hop_seconds: time from one frame to the next, in seconds.
        num_tokens: number of tokens without BOS. With `tokens_per_second` alone: as many as the duration holds.
        tokens_per_second: fixed token rate in Hz.
        method: `"mean"`, `"median"` or `"last"`.
        duration: of the audio, in seconds; `frames * hop_seconds` when not given.

    Returns:
        float64, shape `(num_tokens + 1,)`: pitch as in [`normalise_pitch`].

    Raises:
        `ValueError`: no frames, no tokens, neither a number nor a rate of tokens, or an unknown method.
    """
    f0 = np.asarray(f0, dtype=np.float64)
    if f0.ndim != 1 or len(f0) == 0:
        raise ValueError(f"f0 must be 1-D with at least one frame, got shape {f0.shape}.")
    if method not in TOKEN_PITCH_METHODS:
        raise ValueError(f"Token pitch {method!r} is not known; choose one of {', '.join(TOKEN_PITCH_METHODS)}.")
    if num_tokens is None and tokens_per_second is None:
        raise ValueError("Give num_tokens, or tokens_per_second for spans that do not tell the number of labels.")
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second must be above 0, got {tokens_per_second}.")
    duration = len(f0) * hop_seconds if duration is None else duration
    if num_tokens is None:
        num_tokens = max(1, math.ceil(round(duration * tokens_per_second, 9)))
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}.")

    span = duration / num_tokens if tokens_per_second is None else 1.0 / tokens_per_second  # seconds
    # To the nanosecond, or rounding decides to which side a frame on the edge of a span belongs (it belongs to both).
    edges = np.round(np.arange(num_tokens + 1) * span, 9)
    times = np.round(np.arange(len(f0)) * hop_seconds, 9)
    firsts = np.searchsorted(times, edges[:-1], side="left")
    lasts = np.searchsorted(times, edges[1:], side="right")
    values = np.zeros(num_tokens)
    for token, (first, last) in enumerate(zip(firsts, lasts)):
        if tokens_per_second is not None and edges[token] >= round(duration, 9):
            break
        first = min(first, len(f0) - 1)
        values[token] = TOKEN_PITCH_METHODS[method](f0[first : max(last, first + 1)])
    values[values < TOKEN_F0_THRESHOLD] = 0.0
    return normalise_pitch(np.concatenate([values[:1], values]))


def accumulated_phase(f0: np.ndarray, hop_seconds: float, initial_phase: float = 0.0) -> np.ndarray:
    """Phase of an oscillator that follows F0: `(phi0 + cumsum(2 pi f0 hop_seconds)) mod 2 pi`.

    It stands still while the voice is unvoiced. The sum is taken in cycles, which is the same modulo whole cycles and
    keeps its precision over an hour.

    Args:
        f0: shape `(frames,)`, Hz, 0 = unvoiced.
        hop_seconds: time from one frame to the next, in seconds.
        initial_phase: phi0 in radians.

    Returns:
        float64, shape `(frames,)`: radians in `[0, 2 pi)`.
    """
    cycles = initial_phase / (2.0 * np.pi) + np.cumsum(np.asarray(f0, dtype=np.float64) * hop_seconds)
    return 2.0 * np.pi * (cycles % 1.0)


def spectral_envelope_code(
    waveform: np.ndarray, f0: np.ndarray, sampling_rate: int, hop_length: int, num_bands: int = 24
) -> np.ndarray:
    """WORLD's spectral envelope (CheapTrick, https://doi.org/10.1016/j.specom.2014.09.003), coded to a few values.

    The code is WORLD's own: the cosine transform of the log envelope on a mel axis.

    Args:
        waveform: shape `(samples,)`.
        f0: shape `(frames,)`, Hz, on frames `hop_length` samples apart.
        sampling_rate: Hz.
        hop_length: samples from one frame to the next.
        num_bands: number of values a frame.

    Returns:
        float64, shape `(frames, num_bands)`.
    """
    pyworld = _import_pyworld()

    def code(waveform, f0, times):
        envelope = np.maximum(pyworld.cheaptrick(waveform, f0, times, sampling_rate), ENVELOPE_POWER_FLOOR)
        return pyworld.code_spectral_envelope(envelope, sampling_rate, num_bands)

    return _by_frames(code, waveform, f0, sampling_rate, hop_length)


def num_aperiodicity_bands(sampling_rate: int) -> int:
    """Bands of WORLD's coded aperiodicity: 3 kHz apart, up to 15 kHz or 3 kHz under half the sampling rate (in Hz).

    1 at 16 kHz, 5 from 36 kHz on, none under 12 kHz.
    """
    return max(0, int(min(15000.0, sampling_rate / 2 - 3000.0) / 3000.0))


def aperiodicity_code(waveform: np.ndarray, f0: np.ndarray, sampling_rate: int, hop_length: int) -> np.ndarray:
    """WORLD's band aperiodicity (D4C, https://doi.org/10.1016/j.specom.2016.09.001): noise against voice, by band.

    Args:
        waveform: shape `(samples,)`.
        f0: shape `(frames,)`, Hz, on frames `hop_length` samples apart.
        sampling_rate: Hz, at least 12000.
        hop_length: samples from one frame to the next.

    Returns:
        float64, shape `(frames, num_aperiodicity_bands(sampling_rate))`: dB, from -60 (periodic) to 0 (noise).

    Raises:
        `ValueError`: the sampling rate leaves no band.
    """
    if num_aperiodicity_bands(sampling_rate) < 1:
        raise ValueError(f"WORLD codes no aperiodicity under 12000 Hz, and the sampling rate is {sampling_rate} Hz.")
    pyworld = _import_pyworld()

    def code(waveform, f0, times):
        return pyworld.code_aperiodicity(pyworld.d4c(waveform, f0, times, sampling_rate), sampling_rate)

    return _by_frames(code, waveform, f0, sampling_rate, hop_length)


def _by_frames(code, waveform, f0, sampling_rate, hop_length):
    # WORLD makes a full spectrum for every frame, and only the code of it is kept: so a part of the frames at a time.
    waveform = np.ascontiguousarray(_check_waveform(waveform), dtype=np.float64)
    f0 = np.ascontiguousarray(f0, dtype=np.float64)
    times = np.arange(len(f0)) * (hop_length / sampling_rate)  # seconds
    parts = [slice(start, start + ENVELOPE_FRAMES) for start in range(0, len(f0), ENVELOPE_FRAMES)]
    return np.concatenate([code(waveform, f0[part], times[part]) for part in parts])


def _check_waveform(waveform) -> np.ndarray:
    # WORLD reads memory as it lies and checks nothing.
    waveform = np.asarray(waveform)
    if waveform.ndim != 1 or len(waveform) == 0 or not np.isfinite(waveform).all():
        raise ValueError(f"The waveform must be 1-D, not empty and finite, got shape {waveform.shape}.")
    return waveform

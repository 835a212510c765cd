"""Pitch: a waveform in, F0 on the frames of the spectrogram out.

F0 is in Hz and 0 where the voice is not voiced; "pitch" is the normalised value. A tracker is a plain function in
`TRACKERS`, and `estimate_f0` is the one entry to all of them; `estimate_f0_batch` is the same for several utterances,
which a tracker in `BATCH_TRACKERS` takes at once. Everything outside that tracker is numpy in float64. pyworld and
torch are imported where they are first needed, so that a model that is given its features never asks for pyworld, and
processes that only make features can be forked without torch.
"""

import math
import operator
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from numbers import Integral
from numbers import Real

import numpy as np

# Bounds of what settings may be. Beyond them trackers hang, take all memory, or read memory that is not theirs.
LOWEST_RATE, HIGHEST_RATE = 1000, 1_000_000  # Hz, of audio
LOWEST_F0, HIGHEST_F0 = 20.0, 2000.0  # Hz; voices lie within, from creak to whistle

# The range of F0 in speech, that of Echo's published pitch per token.
F0_FLOOR = 71.0  # Hz, WORLD's lowest F0
F0_CEILING = 500.0  # Hz

# DIO discards voiced runs under 3 frames, whatever a frame lasts: on a coarser grid it loses short voiced sounds.
LONGEST_FRAME_PERIOD = 10.0  # ms

# Longer audio is tracked in pieces, because DIO holds the whole signal in every band: about 1.5 MB a second of audio.
# The context is what a piece hears on either side beyond the frames it gives: many times the longest period (14 ms).
CHUNK_SECONDS = 60.0
CONTEXT_SECONDS = 2.0

# The autocorrelation tracker. Lengths that hang on F0 are for its default range, and grow with a wider one.
WINDOW_PERIODS = 3.2  # of the lowest F0 under the window (45 ms at 71 Hz)
WINDOW_EXPONENT = 0.6  # of the sine window: flatter than Hann, so that an onset is heard in time
LONGEST_LAG_PERIODS = 1.57  # of the lowest F0: the period of mains hum at 50 Hz has to be seen, to be refused
SHORTEST_LAG_PERIODS = 0.2  # of the highest F0: so has that of a tone above the range
TRACKING_RATES = 8.0  # the sampling rate at which it works is at least this many times the highest F0 (4 kHz)
BANDWIDTH = 3.2  # times the highest F0: the harmonics it hears (1600 Hz), whichever of them are there
FILTER_SECONDS = 0.006  # length of the filter before the sampling rate is lowered
LAG_STEPS = 2  # lags to a sample of the lower rate
OCTAVE_COST = 0.05  # correlation that a lag twice as long must be better by; a period fits twice as well as once
OUTSIDE_OCTAVES = 0.05  # by which lags under the range are favoured: a tone fits its own and their multiples alike
NEIGHBOUR_WEIGHT = 0.25  # of the frame before and of that after, where a lag is chosen
VOICED_CORRELATION = 0.45  # at least, of a voiced frame; white noise reaches 0.35
PEAK_RANGE = 50.0  # dB; quieter than this under the largest sample of the utterance is unvoiced
ONSET_RANGE = 10.0  # dB; so is what is quieter than this under the loudest frame up to two away: it is not yet there
LEAST_OVERLAP = 0.01  # share of the frame's energy by which its correlation is divided at least
CORRELATION_FRAMES = 512  # held at a time on the CPU, to stay in its cache
ACCELERATOR_FRAMES = 16384  # held at a time elsewhere: about 100 MB
FILTER_OUTPUTS = 32  # samples filtered by one row of a matrix product

# Voicing is heard below about 1 kHz, over 25 ms and as much a period later, as in Ghahremani et al.
VOICING_FILTER_SECONDS = 0.0012  # length of the Hann window that filters: half the amplitude at 830 Hz, none at 1.7 kHz
VOICING_RATE = 8000.0  # Hz, at least, to which the sampling rate is lowered: enough to look between the samples
VOICING_WINDOW_SECONDS = 0.025
VOICING_POWER_FLOOR = 1e-12  # mean square; what is under the noise of 16-bit audio has no period
VOICING_FRAMES = 2048  # held at a time

ENVELOPE_FRAMES = 1000  # frames of WORLD's full spectra held at a time (513 values each at 16 kHz)
ENVELOPE_POWER_FLOOR = 1e-10  # under all speech, above the 1e-17 WORLD adds to an empty spectrum: silence is constant

IMPORTING_PROCESS = os.getpid()  # another one has been forked from it


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


def track_dio_fast(
    waveform: np.ndarray, sampling_rate: int, frame_period: float, f0_min: float, f0_max: float
) -> np.ndarray:
    """F0 by DIO on the waveform at a fourth of its sampling rate, not refined. As [`track_dio`] otherwise."""
    # At a rate under 4 kHz DIO loses the harmonics it compares, and F0 itself at half of that.
    speed = int(min(4, max(1, sampling_rate // 4000)))
    return _import_pyworld().dio(
        waveform, sampling_rate, f0_floor=f0_min, f0_ceil=f0_max, frame_period=frame_period, speed=speed
    )[0]


@lru_cache(maxsize=8)
def _autocorrelation_tables(sampling_rate: int, f0_min: float, f0_max: float) -> dict:
    """What the autocorrelation tracker computes once: lengths in samples, filter, window, and what they imply."""
    f0_min, f0_max = min(f0_min, F0_FLOOR), max(f0_max, F0_CEILING)
    decimation = max(1, int(sampling_rate / (TRACKING_RATES * f0_max)))
    rate = sampling_rate / decimation  # Hz
    half_filter = round(FILTER_SECONDS / 2 * sampling_rate)
    width = 2 * round(WINDOW_PERIODS / f0_min * rate / 2)
    lags = min(math.ceil(LONGEST_LAG_PERIODS / f0_min * rate) + 1, width - 1)

    taps = np.arange(-half_filter, half_filter + 1)
    cutoff = min(BANDWIDTH * f0_max / sampling_rate, 0.5)  # cycles a sample
    lowpass = np.sinc(2.0 * cutoff * taps) * np.blackman(len(taps) + 2)[1:-1]
    # Column j of the matrix makes sample j * decimation of the filtered waveform.
    filters = np.zeros((decimation * (FILTER_OUTPUTS - 1) + len(taps), FILTER_OUTPUTS), dtype=np.float32)
    for output in range(FILTER_OUTPUTS):
        filters[decimation * output : decimation * output + len(taps), output] = lowpass / lowpass.sum()

    # A length of the transform that is fast, and long enough that no lag wraps around.
    sizes = (factor * 2**power for factor in (1, 3, 5, 9, 15) for power in range(1, 24))
    n_fft = min(size for size in sizes if size >= width + lags)
    window = np.sin(np.pi * (np.arange(width) + 0.5) / width) ** WINDOW_EXPONENT
    # The correlation of the window with itself, over the energies of its parts that overlap: 1 at lag 0, then falling.
    overlap = np.array([window[: width - lag] @ window[lag:] for lag in range(lags + 1)])
    energy = np.concatenate([[0.0], np.cumsum(window**2)])
    bias = overlap / np.sqrt(energy[width - np.arange(lags + 1)] * (energy[-1] - energy[: lags + 1]))
    bias = np.interp(np.arange(LAG_STEPS * lags + 1) / LAG_STEPS, np.arange(lags + 1), bias)

    # Inverse transform of a real, even spectrum, at lags between the samples too: one row a bin.
    bins, steps = np.arange(n_fft // 2 + 1), np.arange(LAG_STEPS * lags + 1)
    cosines = np.cos(2.0 * np.pi / (n_fft * LAG_STEPS) * np.outer(bins, steps)) * (2.0 / n_fft)
    cosines[[0, -1]] /= 2.0

    shortest = max(2, int(SHORTEST_LAG_PERIODS / f0_max * rate * LAG_STEPS))
    # Lags under the range gain little over the shortest in it, or a strong harmonic would win.
    candidates = np.arange(shortest, lags * LAG_STEPS)
    octaves = np.log2(np.maximum(candidates, rate * LAG_STEPS / f0_max))
    octaves -= OUTSIDE_OCTAVES * (candidates < 0.95 * rate * LAG_STEPS / f0_max)
    return {
        "decimation": decimation,
        "rate": rate,
        "half_filter": half_filter,
        "width": width,
        "lags": lags,
        "n_fft": n_fft,
        "shortest": shortest,
        "filters": filters,
        "window": window.astype(np.float32),
        "cosines": cosines.astype(np.float32),
        "bias": bias.astype(np.float32),
        "costs": (OCTAVE_COST * octaves).astype(np.float32),
    }


def track_autocorrelation_batch(
    waveforms: Sequence[np.ndarray],
    sampling_rate: int,
    frame_period: float,
    f0_min: float,
    f0_max: float,
    device: str = "cpu",
) -> list[np.ndarray]:
    """F0 of several utterances at once, as the lag at which the waveform best resembles itself.

    The correlation of a frame with itself, `r(lag) = sum x(n) x(n + lag)` by the power spectrum, is divided by the
    geometric mean of the energies of the two parts that overlap, as in McLeod and Wyvill's method
    (https://hdl.handle.net/2027/spo.bbp2372.2005.107), and by what is left of the window's own correlation, as in
    Boersma's (https://www.fon.hum.uva.nl/paul/papers/Proceedings_1993.pdf): a periodic sound has 1 at its period,
    wherever it begins. The mean over a frame and its neighbours is searched for the highest peak, less a cost that
    grows with the octave; a parabola through the frame's own correlation refines it. Lags outside the range compete
    too, and a frame they win is unvoiced: so are mains hum and tones. Only F0's harmonics up to 1600 Hz are heard, so
    the fundamental itself need not be there.

    All utterances lie behind one another in one waveform, with silence between them, and every frame hears its own
    window and its neighbours': there is no padding to mask, and no utterance has to do with another.

    Args:
        waveforms: of shape `(samples,)` each, any scale and real type.
        sampling_rate: Hz.
        frame_period: time from one frame to the next, in ms.
        f0_min, f0_max: range of F0 in Hz.
        device: where torch computes.

    Returns:
        float64 arrays, of shape `(frames,)` each, `frames = floor(duration / frame_period) + 1`: F0 in Hz, 0 =
        unvoiced.

    Raises:
        `ImportError`: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"The F0 method 'autocorrelation' needs torch ({error}): `pip install torch`.") from error

    if os.getpid() != IMPORTING_PROCESS:
        # OpenMP waits forever for threads that were not forked. Worker processes share the cores already.
        torch.set_num_threads(1)
    tables = _autocorrelation_tables(sampling_rate, f0_min, f0_max)
    decimation, half_filter, width = tables["decimation"], tables["half_filter"], tables["width"]
    hop = frame_period * sampling_rate / 1000.0 / decimation  # samples of the lower rate
    gap = width // 2 + math.ceil(half_filter / decimation) + 2  # samples of the lower rate, silent

    # Lay the utterances and their frames behind one another. Two empty frames (centre -1) stand on either side of
    # each: as far as a frame looks for louder neighbours.
    lengths = [-(-len(waveform) // decimation) for waveform in waveforms]
    begins = np.cumsum([gap] + [length + gap for length in lengths])
    row = decimation * FILTER_OUTPUTS
    rows = -(-int(begins[-1]) // FILTER_OUTPUTS)
    packed = np.zeros(rows * row + 2 * half_filter, dtype=np.float32)
    centres, thresholds, counts = [[-1, -1]], [[1.0, 1.0]], []
    for waveform, begin in zip(waveforms, begins):
        waveform = np.asarray(waveform)
        waveform = waveform if waveform.dtype in (np.float32, np.float64) else waveform.astype(np.float64)
        # A power of two scales without rounding. Squares of what is very loud or very faint then fit float32.
        mantissa, exponent = np.frexp(max(waveform.max(), -waveform.min()))
        first = half_filter + int(begin) * decimation
        packed[first : first + len(waveform)] = np.ldexp(waveform, -exponent)
        counts.append(int(len(waveform) / decimation / hop + 1e-6) + 1)
        centres += [begin + np.floor(np.arange(counts[-1]) * hop + 0.5), [-1, -1]]
        quietest = max(float(mantissa) ** 2 * 10.0 ** (-PEAK_RANGE / 10.0), 1e-12)
        thresholds += [np.full(counts[-1], quietest), [1.0, 1.0]]
    centres = np.concatenate(centres).astype(np.int64)

    with torch.inference_mode():

        def tensor(array, dtype=torch.float32):
            return torch.from_numpy(np.asarray(array)).to(device=device, dtype=dtype)

        pieces = tensor(packed).unfold(0, row - decimation + 2 * half_filter + 1, row)
        filtered = (pieces @ tensor(tables["filters"])).flatten()  # (samples of the lower rate,)
        # A window of silence stands before the first utterance for the empty frames: its gap begins there.
        filtered = torch.nn.functional.pad(filtered, (width // 2, width // 2))
        exists = tensor(centres >= 0)
        windows = filtered.unfold(0, width, 1)  # window i is centred at sample i
        lag, strength, energy = _strongest_lags(
            torch, windows, tensor(np.maximum(centres, 0), torch.int64), exists, tables
        )
        f0 = tables["rate"] * LAG_STEPS / lag
        nearby = torch.nn.functional.max_pool1d(energy[None], 5, 1, 2)[0]
        voiced = (strength > VOICED_CORRELATION) & (f0 >= f0_min) & (f0 <= f0_max)
        voiced &= (energy > 10.0 ** (-ONSET_RANGE / 10.0) * nearby) & (energy > tensor(np.concatenate(thresholds)))
        # A voiced frame alone is none: 10 ms are one or two periods.
        beside = torch.nn.functional.pad(voiced, (1, 1))
        f0 = torch.where(voiced & (beside[:-2] | beside[2:]), f0, 0.0).cpu().double().numpy()
    ends = np.cumsum(np.array(counts) + 2)
    return [f0[end - count : end] for end, count in zip(ends, counts)]


def _strongest_lags(torch, windows, centres, exists, tables):
    """Lag (in steps), correlation there, and energy (mean square of the middle 10 ms) of frames; each `(frames,)`."""
    device = windows.device
    width, lags, n_fft, shortest = (tables[name] for name in ("width", "lags", "n_fft", "shortest"))
    taper, cosines, bias, costs = (
        torch.from_numpy(tables[name]).to(device) for name in ("window", "cosines", "bias", "costs")
    )
    middle = slice(width // 2 - round(0.005 * tables["rate"]), width // 2 + round(0.005 * tables["rate"]))
    around = torch.arange(-2, 3, device=device)
    lag, strength, energy = [], [], []
    block = CORRELATION_FRAMES if device.type == "cpu" else ACCELERATOR_FRAMES
    for start in range(0, len(centres), block):
        stop = min(start + block, len(centres))
        before, after = min(start, 1), min(len(centres) - stop, 1)  # neighbours to be heard as well
        part = slice(start - before, stop + after)
        frames = windows[centres[part]] * exists[part, None]  # (frames, width)
        frames -= frames.mean(dim=1, keepdim=True)
        energy.append(frames[before : len(frames) - after, middle].square().mean(dim=1))
        frames *= taper

        spectrum = torch.fft.rfft(frames, n=n_fft)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        correlation = power @ cosines  # the inverse transform, at the lags that are wanted
        # Energies of the parts that overlap at each lag: all but the last samples, and all but the first.
        squares = frames.square_()
        total = squares.sum(dim=1, keepdim=True)
        heads = total - squares[:, width - lags :].flip(1).cumsum(dim=1)
        tails = total - squares[:, :lags].cumsum(dim=1)
        scale = torch.empty(len(frames), LAG_STEPS * lags + 1, device=device, dtype=torch.float32)
        scale[:, :1] = total
        scale[:, LAG_STEPS::LAG_STEPS] = heads.mul_(tails).clamp_(min=0.0).sqrt_()
        for step in range(1, LAG_STEPS):
            scale[:, step::LAG_STEPS] = torch.lerp(
                scale[:, :-1:LAG_STEPS], scale[:, LAG_STEPS::LAG_STEPS], step / LAG_STEPS
            )
        # Where the two hardly overlap, or there is silence, rounding would be divided by nothing.
        scale = torch.maximum(scale, total.mul_(LEAST_OVERLAP)).clamp_(min=1e-15).mul_(bias)
        correlation = correlation / scale  # (frames, LAG_STEPS * lags + 1)
        smooth = correlation * (1.0 - 2.0 * NEIGHBOUR_WEIGHT)
        smooth[1:].add_(correlation[:-1], alpha=NEIGHBOUR_WEIGHT)
        smooth[:-1].add_(correlation[1:], alpha=NEIGHBOUR_WEIGHT)
        inner = slice(before, len(frames) - after)
        correlation, smooth = correlation[inner], smooth[inner]

        here, below, above = smooth[:, shortest:-1], smooth[:, shortest - 1 : -2], smooth[:, shortest + 1 :]
        # Height of the cosine through the three, which is exact for a tone, however few lags its period has:
        # a^2 = c^2 + (difference / 2)^2 / sin(step)^2, with the cosine of the step the others' mean over c.
        sine = ((below + above) / here).clamp_(-1.0, 1.999).square_().mul_(-0.25).add_(1.0)  # squared
        height = (above - below).square_().mul_(0.25).div_(sine).addcmul_(here, here).sqrt_()
        is_peak = (here > below) & (here >= above) & (here > 0.0)
        # A peak that its cost brings to 0 is too low to be voiced, so 0 stands for no peak.
        best, index = (height - costs).mul_(is_peak).max(dim=1, keepdim=True)
        strength.append(torch.where(best > 0.0, height.gather(1, index), 0.0)[:, 0])
        # The frame's own peak is at most a step from that of the mean.
        index = index + shortest
        values = correlation.gather(1, (index + around).clamp(0, LAG_STEPS * lags))
        shift = values[:, 1:4].argmax(dim=1, keepdim=True)
        below, here, above = values.gather(1, shift + around[2:]).unbind(dim=1)
        curvature = (2.0 * here - above - below).clamp(min=1e-6)
        offset = ((above - below) / (2.0 * curvature)).clamp(-0.5, 0.5)
        lag.append((index + shift)[:, 0] - 1 + offset)
    return torch.cat(lag), torch.cat(strength), torch.cat(energy)


# Those that take several utterances at once, and a device.
BATCH_TRACKERS = {"autocorrelation": track_autocorrelation_batch}
# Another tracker is a function with the arguments of `track_dio`, entered here under the name that `method` takes.
TRACKERS = {"dio": track_dio, "dio_fast": track_dio_fast, **BATCH_TRACKERS}


def check_sampling_rate(sampling_rate, name: str = "sampling_rate") -> int:
    """A sampling rate as an `int`, checked.

    Args:
        sampling_rate: Hz; a whole number of any numeric type, or a tensor or array of one.
        name: what an error calls it.

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
    """Raises a `ValueError` that says which of the settings of a tracker cannot work, and what can."""
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
        method: a name in `TRACKERS`: `"dio"`, `"dio_fast"` or `"autocorrelation"`.
        f0_min, f0_max: range of F0 in Hz.

    Returns:
        float64, shape `(samples // hop_length + 1,)`: F0 in Hz, 0 = unvoiced.

    Raises:
        `ValueError`: the waveform is not 1-D, is empty or not finite, or a setting is not possible.
        `ImportError`: pyworld or torch is needed and cannot be imported; the message says what to install.
    """
    return estimate_f0_batch([waveform], sampling_rate, hop_length, method, f0_min, f0_max)[0]


def estimate_f0_batch(
    waveforms: Sequence[np.ndarray],
    sampling_rate: int,
    hop_length: int,
    method: str = "dio",
    f0_min: float = F0_FLOOR,
    f0_max: float = F0_CEILING,
    device: str = "cpu",
) -> list[np.ndarray]:
    """F0 of several utterances, each as by [`estimate_f0`].

    pyworld's trackers run in as many threads as there are cores; in a process forked for work, in one.

    Args:
        waveforms: of shape `(samples,)` each, without padding.
        sampling_rate, hop_length, method, f0_min, f0_max: as in [`estimate_f0`].
        device: where a tracker in `BATCH_TRACKERS` computes; the others know the CPU only.

    Returns:
        float64 arrays, of shape `(samples // hop_length + 1,)` each.

    Raises:
        `ValueError`, `ImportError`: as by [`estimate_f0`].
    """
    sampling_rate = check_sampling_rate(sampling_rate)
    check_hop_length(hop_length, sampling_rate)
    check_tracker(method, f0_min, f0_max, sampling_rate)
    waveforms = [_check_waveform(waveform) for waveform in waveforms]
    frame_period = 1000.0 * hop_length / sampling_rate  # ms
    # A coarse grid is tracked on a finer one that contains it. The margin is for periods like 10.000000000000002 ms.
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

        workers = min(len(pieces), _num_threads())
        if workers > 1:  # pyworld lets go of Python's lock while it computes
            with ThreadPoolExecutor(workers) as pool:
                tracks = list(pool.map(track_one, pieces))
        else:
            tracks = map(track_one, pieces)
    for (index, start, stop), first, track in zip(places, firsts, tracks):
        track = track[::refinement]
        # Where the period in ms is not exact in binary, DIO may count one frame less: the last value stands in for it.
        f0[index][start:stop] = track[np.minimum(np.arange(start - first, stop - first), len(track) - 1)]
    return f0


def _num_threads() -> int:
    if os.getpid() != IMPORTING_PROCESS:
        return 1  # worker processes share the cores already
    affinity = getattr(os, "sched_getaffinity", None)  # what this process may use; not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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


def interpolate_f0(f0: np.ndarray) -> np.ndarray:
    """F0 carried across unvoiced frames: log-F0 runs straight between voiced neighbours and is held at the ends.

    Args:
        f0: shape `(frames,)`, Hz, 0 = unvoiced.

    Returns:
        float64, shape `(frames,)`: Hz, above 0; all 0 if no frame is voiced.
    """
    f0 = np.asarray(f0, dtype=np.float64)
    voiced = np.flatnonzero(f0)
    if len(voiced) == 0:
        return np.zeros(len(f0))
    carried = np.exp(np.interp(np.arange(len(f0)), voiced, np.log(f0[voiced])))
    carried[voiced] = f0[voiced]
    return carried


def voicing(waveform: np.ndarray, f0: np.ndarray, sampling_rate: int, hop_length: int) -> np.ndarray:
    """How periodic the waveform is at its F0, in place of a hard decision.

    The correlation coefficient of two windows of 25 ms, one period apart and centered at the frame, below about
    1 kHz; 0 where it is negative. It is 1 for a periodic sound, and about `s / (s + n)` for one of power s in noise of
    power n. The period is that of F0 carried across unvoiced frames, so that it has a value in every frame; without
    any voiced frame it is 0. It is a probability of voicing in the manner of Ghahremani et al., "A pitch extraction
    algorithm tuned for automatic speech recognition" (https://doi.org/10.1109/ICASSP.2014.6854049), who map the
    correlation further.

    Args:
        waveform: shape `(samples,)`, in [-1, 1].
        f0: shape `(frames,)`, Hz, 0 = unvoiced, on frames `hop_length` samples apart.
        sampling_rate: Hz.
        hop_length: samples from one frame to the next.

    Returns:
        float32, shape `(frames,)`, in [0, 1].

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
    # Four whole lags around each, `whole - 1` to `whole + 2`, through whose correlations a cubic is laid.
    whole = np.maximum(np.floor(lags).astype(np.int64), 1)
    starts = np.floor(np.arange(len(f0)) * (hop_length / factor) - (width + lags) / 2.0 + 0.5).astype(np.int64)
    # At the ends of the utterance windows lie within it, where it is long enough.
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
    """Lagrange's weights of four values at -1, 0, 1 and 2 for the cubic's value at `fraction`; `(frames, 4)`."""
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
    # What is louder than full scale is made as loud: its square would not fit.
    padded = np.pad(waveform / max(1.0, float(np.abs(waveform).max())), (half, half + factor)).astype(np.float32)
    lowered = np.zeros(count, dtype=np.float32)
    for first, tap in enumerate(taps):
        lowered += tap * padded[first : first + factor * count : factor]
    return lowered


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

    Raises:
        `ValueError`: the waveform or F0 is not 1-D, is empty or not finite, or a setting is not possible.
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
        `ValueError`: as by [`spectral_envelope_code`], or the sampling rate leaves no band.
    """
    if num_aperiodicity_bands(sampling_rate) < 1:
        raise ValueError(f"WORLD codes no aperiodicity under 12000 Hz, and the sampling rate is {sampling_rate} Hz.")
    pyworld = _import_pyworld()

    def code(waveform, f0, times):
        return pyworld.code_aperiodicity(pyworld.d4c(waveform, f0, times, sampling_rate), sampling_rate)

    return _by_frames(code, waveform, f0, sampling_rate, hop_length)


def _by_frames(code, waveform, f0, sampling_rate, hop_length):
    # WORLD makes a full spectrum for every frame, and only the code of it is kept: so a part of the frames at a time.
    sampling_rate = check_sampling_rate(sampling_rate)
    check_hop_length(hop_length, sampling_rate)
    waveform = np.ascontiguousarray(_check_waveform(waveform), dtype=np.float64)
    f0 = np.ascontiguousarray(_check_f0(f0, sampling_rate), dtype=np.float64)
    times = np.arange(len(f0)) * (hop_length / sampling_rate)  # seconds
    parts = [slice(start, start + ENVELOPE_FRAMES) for start in range(0, len(f0), ENVELOPE_FRAMES)]
    return np.concatenate([code(waveform, f0[part], times[part]) for part in parts])


def _check_waveform(waveform) -> np.ndarray:
    # WORLD reads memory as it lies and checks nothing.
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

"""F0 of a whole batch by normalized autocorrelation, in PyTorch and on any device.

F0 is the lag at which the waveform best resembles itself. Each frame goes through `normalized_correlation`,
`find_peaks` and `refine_lag`; `best_path` then chooses among its peaks. Dimensions: N frames, W samples of a window, K
lags, C candidates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

# Lengths that depend on F0 are for this range, and grow with a wider one.
LOWEST_F0, HIGHEST_F0 = 71.0, 500.0  # Hz
WINDOW_PERIODS = 3.2  # of the lowest F0 under the window (45 ms at 71 Hz)
WINDOW_EXPONENT = 0.6  # of the sine window, flatter than Hann
LONGEST_LAG_PERIODS = 1.57  # of the lowest F0: covers mains hum at 50 Hz, to refuse it
SHORTEST_LAG_PERIODS = 0.2  # of the highest F0: covers tones above the range, to refuse them
TRACKING_RATES = 8.0  # the lower sampling rate is at least this many times the highest F0 (4 kHz)
BANDWIDTH = 3.2  # times the highest F0 (1600 Hz): the harmonics that count
FILTER_SECONDS = 0.006  # length of the filter before the sampling rate is lowered
LAG_STEPS = 2  # lags to a sample of the lower rate
OCTAVE_COST = 0.05  # correlation that a lag twice as long must be better by, since two periods fit as well as one
OUTSIDE_OCTAVES = 0.2  # by which lags under the range are favored, since a tone fits its own and their multiples
NEIGHBOR_WEIGHT = 0.25  # of the frame before and of that after, where a lag is chosen
CANDIDATES = 5  # peaks of a frame among which the path chooses
JUMP_COST = 1.0  # of a jump by an octave or more from one frame to the next, as a share of how periodic both are
PATH_FRAMES = 16  # to either side that a frame looks for the best path
VOICED_CORRELATION = 0.45  # of a voiced frame, at least; white noise reaches 0.35
PEAK_RANGE = 50.0  # dB under the largest sample of the utterance; fainter frames are unvoiced
ONSET_RANGE = 15.0  # dB under the loudest frame up to two away; fainter frames are unvoiced
SHORTEST_RUN = 0.04  # seconds of a voiced run
LARGEST_STEP = 0.25  # octaves from one frame to the next within a run
ENERGY_SECONDS = 0.01  # in the middle of a frame, whose energy is measured
LEAST_OVERLAP = 0.01  # share of the frame's energy that its correlation is divided by, at least
CORRELATION_FRAMES = 512  # held at a time on the CPU, to stay in its cache
ACCELERATOR_FRAMES = 16384  # held at a time elsewhere, about 100 MB
FILTER_OUTPUTS = 32  # samples filtered by one row of a matrix product


@dataclass(frozen=True, eq=False)
class CorrelationTables:
    """What is computed once for a sampling rate and a range of F0."""

    decimation: int  # samples of the waveform to one of the lower rate
    rate: float  # the lower sampling rate, in Hz
    half_filter: int  # samples of the waveform on either side that its filter sees
    width: int  # W, samples of a window
    lags: int  # samples of the longest lag; K = LAG_STEPS * lags + 1
    n_fft: int
    shortest: int  # index of the shortest lag that may win
    filters: torch.Tensor  # (filter's inputs, FILTER_OUTPUTS); column j makes sample j of the lower rate
    window: torch.Tensor  # (W,)
    cosines: torch.Tensor  # (n_fft // 2 + 1, K), inverse transform of a power spectrum at the lags
    bias: torch.Tensor  # (K,), the window's own correlation at each lag
    costs: torch.Tensor  # (K - 1 - shortest,), of each lag that may win


@lru_cache(maxsize=8)
def correlation_tables(sampling_rate: int, f0_min: float, f0_max: float, device: torch.device) -> CorrelationTables:
    """[`CorrelationTables`] for a sampling rate (Hz) and a range of F0 (Hz), in float32."""
    f0_min, f0_max = min(f0_min, LOWEST_F0), max(f0_max, HIGHEST_F0)
    decimation = max(1, int(sampling_rate / (TRACKING_RATES * f0_max)))
    rate = sampling_rate / decimation  # Hz
    half_filter = round(FILTER_SECONDS / 2 * sampling_rate)
    width = 2 * round(WINDOW_PERIODS / f0_min * rate / 2)
    lags = min(math.ceil(LONGEST_LAG_PERIODS / f0_min * rate) + 1, width - 1)

    taps = np.arange(-half_filter, half_filter + 1)
    cutoff = min(BANDWIDTH * f0_max / sampling_rate, 0.5)  # cycles a sample
    lowpass = np.sinc(2.0 * cutoff * taps) * np.blackman(len(taps) + 2)[1:-1]
    filters = np.zeros((decimation * (FILTER_OUTPUTS - 1) + len(taps), FILTER_OUTPUTS), dtype=np.float32)
    for output in range(FILTER_OUTPUTS):
        filters[decimation * output : decimation * output + len(taps), output] = lowpass / lowpass.sum()

    # A fast length of the transform at which no lag wraps around.
    sizes = (factor * 2**power for factor in (1, 3, 5, 9, 15) for power in range(1, 24))
    n_fft = min(size for size in sizes if size >= width + lags)
    window = np.sin(np.pi * (np.arange(width) + 0.5) / width) ** WINDOW_EXPONENT
    # The window's correlation with itself, over the energies of its parts that overlap.
    overlap = np.array([window[: width - lag] @ window[lag:] for lag in range(lags + 1)])
    energy = np.concatenate([[0.0], np.cumsum(window**2)])
    bias = overlap / np.sqrt(energy[width - np.arange(lags + 1)] * (energy[-1] - energy[: lags + 1]))
    bias = np.interp(np.arange(LAG_STEPS * lags + 1) / LAG_STEPS, np.arange(lags + 1), bias)

    bins, steps = np.arange(n_fft // 2 + 1), np.arange(LAG_STEPS * lags + 1)
    cosines = np.cos(2.0 * np.pi / (n_fft * LAG_STEPS) * np.outer(bins, steps)) * (2.0 / n_fft)
    cosines[[0, -1]] /= 2.0

    shortest = max(2, int(SHORTEST_LAG_PERIODS / f0_max * rate * LAG_STEPS))
    # Octaves over the shortest lag in the range. Lags under it gain little, lest a strong harmonic win.
    candidates = np.arange(shortest, lags * LAG_STEPS) / (rate * LAG_STEPS / f0_max)
    octaves = np.log2(np.maximum(candidates, 1.0)) - OUTSIDE_OCTAVES * (candidates < 0.95)
    arrays = (filters, window, cosines, bias, OCTAVE_COST * octaves)
    tensors = [torch.from_numpy(array.astype(np.float32)).to(device) for array in arrays]
    return CorrelationTables(decimation, rate, half_filter, width, lags, n_fft, shortest, *tensors)


def track_autocorrelation(
    waveforms: Sequence[np.ndarray],
    sampling_rate: int,
    frame_period: float,
    f0_min: float,
    f0_max: float,
    device: str = "cpu",
) -> list[np.ndarray]:
    """F0 of several utterances at once, as the lag at which the waveform best resembles itself.

    The normalized correlations of a frame and its neighbors are averaged and searched for the highest peaks, less a
    cost that grows with the octave; a parabola refines them, and a path over the frames around chooses one. Lags
    outside the range compete too, and a frame they win is unvoiced, as in mains hum. Harmonics up to 1600 Hz count, so
    the fundamental need not be there. Utterances lie behind one another in one waveform, so there is no padding to
    mask.

    Args:
        waveforms: of shape `(samples,)` each, any scale and real type.
        others: as of [`pitch_echo.track_dio`]; device: where torch computes.

    Returns:
        float64 arrays, of shape `(frames,)` each, as of [`pitch_echo.track_dio`].
    """
    device = torch.device(device)
    tables = correlation_tables(sampling_rate, f0_min, f0_max, device)
    hop = frame_period * sampling_rate / 1000.0 / tables.decimation  # samples of the lower rate
    packed, centers, thresholds, counts = _lay_out(waveforms, hop, tables)
    with torch.inference_mode():
        row = tables.decimation * FILTER_OUTPUTS
        rows = torch.from_numpy(packed).to(device).unfold(0, len(tables.filters), row)
        filtered = (rows @ tables.filters).flatten()  # (samples of the lower rate,)
        # The gap before the first utterance is the silent window of the empty frames.
        filtered = nn.functional.pad(filtered, (tables.width // 2, tables.width // 2))
        windows = filtered.unfold(0, tables.width, 1)  # window i is centered at sample i
        lag, strength, energy = _strongest_lags(windows, torch.from_numpy(centers).to(device), tables)

        f0 = tables.rate * LAG_STEPS / lag
        nearby = nn.functional.max_pool1d(energy[None], 5, 1, 2)[0]
        voiced = (strength > VOICED_CORRELATION) & (f0 >= f0_min) & (f0 <= f0_max)
        voiced &= energy > 10.0 ** (-ONSET_RANGE / 10.0) * nearby
        voiced &= energy > torch.from_numpy(thresholds).to(device)
        f0 = torch.where(_in_long_runs(voiced, f0, round(SHORTEST_RUN * 1000.0 / frame_period)), f0, 0.0)
        f0 = f0.cpu().double().numpy()
    ends = np.cumsum(np.array(counts) + 2)
    return [f0[end - count : end] for end, count in zip(ends, counts)]


def _in_long_runs(voiced: torch.Tensor, f0: torch.Tensor, shortest: int) -> torch.Tensor:
    """Which frames `(N,)` belong to a run of at least `shortest` voiced frames whose F0 does not jump."""
    shortest = max(2, shortest)
    steps = (f0[1:] / f0[:-1]).log2_().abs_()
    joined = (voiced[1:] & voiced[:-1] & (steps < LARGEST_STEP)).float()  # each frame with the next
    joined = nn.functional.pad(joined[None], (shortest - 1, shortest - 1))
    begins = 1.0 - nn.functional.max_pool1d(1.0 - joined, shortest - 1, 1)  # (1, N + shortest - 1)
    return nn.functional.max_pool1d(begins, shortest, 1)[0] > 0.0


def _lay_out(
    waveforms: Sequence[np.ndarray], hop: float, tables: CorrelationTables
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Lays utterances behind one another, with two empty frames around each, as far as a frame looks for neighbors.

    Returns the samples of all, float32; the sample of the lower rate at which each frame is centered, -1 for empty
    frames; the energy above which a frame may be voiced; and the number of frames of each utterance."""
    decimation, half_filter = tables.decimation, tables.half_filter
    gap = tables.width // 2 + math.ceil(half_filter / decimation) + 2  # samples of the lower rate, silent
    lengths = [-(-len(waveform) // decimation) for waveform in waveforms]
    begins = np.cumsum([gap] + [length + gap for length in lengths])
    rows = -(-int(begins[-1]) // FILTER_OUTPUTS)
    packed = np.zeros(rows * decimation * FILTER_OUTPUTS + 2 * half_filter, dtype=np.float32)
    centers, thresholds, counts = [[-1, -1]], [[1.0, 1.0]], []
    for waveform, begin in zip(waveforms, begins):
        waveform = np.asarray(waveform)
        waveform = waveform if waveform.dtype in (np.float32, np.float64) else waveform.astype(np.float64)
        # A power of two scales without rounding, so that squares fit float32.
        mantissa, exponent = np.frexp(max(waveform.max(), -waveform.min()))
        first = half_filter + int(begin) * decimation
        packed[first : first + len(waveform)] = np.ldexp(waveform, -exponent)
        counts.append(int(len(waveform) / decimation / hop + 1e-6) + 1)
        centers += [begin + np.floor(np.arange(counts[-1]) * hop + 0.5), [-1, -1]]
        quietest = max(float(mantissa) ** 2 * 10.0 ** (-PEAK_RANGE / 10.0), 1e-12)
        thresholds += [np.full(counts[-1], quietest), [1.0, 1.0]]
    return packed, np.concatenate(centers).astype(np.int64), np.concatenate(thresholds).astype(np.float32), counts


def _strongest_lags(
    windows: torch.Tensor, centers: torch.Tensor, tables: CorrelationTables
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lag (in steps of 1 / LAG_STEPS samples), correlation there, and energy of frames; each `(N,)`."""
    half = round(ENERGY_SECONDS / 2 * tables.rate)
    middle = slice(tables.width // 2 - half, tables.width // 2 + half)
    lag, strength, scores, energy = [], [], [], []
    block = CORRELATION_FRAMES if windows.device.type == "cpu" else ACCELERATOR_FRAMES
    for start in range(0, len(centers), block):
        stop = min(start + block, len(centers))
        before, after = min(start, 1), min(len(centers) - stop, 1)  # neighbors
        part = centers[start - before : stop + after]
        inner = slice(before, len(part) - after)
        frames = windows[part.clamp(min=0)] * (part >= 0)[:, None]  # (N, W)
        frames -= frames.mean(dim=1, keepdim=True)
        energy.append(frames[inner, middle].square().mean(dim=1))

        correlation = normalized_correlation(frames, tables)
        smooth = correlation * (1.0 - 2.0 * NEIGHBOR_WEIGHT)
        smooth[1:].add_(correlation[:-1], alpha=NEIGHBOR_WEIGHT)
        smooth[:-1].add_(correlation[1:], alpha=NEIGHBOR_WEIGHT)
        index, height, score = find_peaks(smooth[inner], tables)
        strength.append(height)
        scores.append(score)
        lag.append(refine_lag(correlation[inner], index))
    lag, strength = torch.cat(lag), torch.cat(strength)
    best = best_path(lag, torch.cat(scores))
    return lag.gather(1, best)[:, 0], strength.gather(1, best)[:, 0], torch.cat(energy)


def normalized_correlation(frames: torch.Tensor, tables: CorrelationTables) -> torch.Tensor:
    """Correlation of frames `(N, W)`, which are overwritten, with themselves at lags of 0, 1, 2, ... steps of
    `1 / LAG_STEPS` samples: `(N, K)`, 1 at the period of a periodic sound.

    `r(lag) = sum x(n) x(n + lag)` is divided by the geometric mean of the energies of the two parts that overlap, as in
    McLeod and Wyvill's method (https://hdl.handle.net/2027/spo.bbp2372.2005.107), and by the window's own correlation,
    as in Boersma's (https://www.fon.hum.uva.nl/paul/papers/Proceedings_1993.pdf)."""
    width, lags = tables.width, tables.lags
    frames *= tables.window
    spectrum = torch.fft.rfft(frames, n=tables.n_fft)
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    correlation = power @ tables.cosines  # the inverse transform, at the lags that are wanted
    # Energies of the parts that overlap at each lag: all but the last samples, and all but the first.
    squares = frames.square_()
    total = squares.sum(dim=1, keepdim=True)
    heads = total - squares[:, width - lags :].flip(1).cumsum(dim=1)
    tails = total - squares[:, :lags].cumsum(dim=1)
    scale = torch.empty_like(correlation)
    scale[:, :1] = total
    scale[:, LAG_STEPS::LAG_STEPS] = heads.mul_(tails).clamp_(min=0.0).sqrt_()
    for step in range(1, LAG_STEPS):
        scale[:, step::LAG_STEPS] = torch.lerp(
            scale[:, :-1:LAG_STEPS], scale[:, LAG_STEPS::LAG_STEPS], step / LAG_STEPS
        )
    # Where the two hardly overlap, or there is silence, rounding would be divided by about 0.
    scale = torch.maximum(scale, total.mul_(LEAST_OVERLAP)).clamp_(min=1e-15).mul_(tables.bias)
    return correlation / scale


def find_peaks(smooth: torch.Tensor, tables: CorrelationTables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The C highest peaks of correlations `(N, K)`, less a cost that grows with the octave: index of the lag, height,
    and score (height less cost), each `(N, C)`. Height and score are 0 where there are fewer peaks."""
    shortest = tables.shortest
    here, below, above = smooth[:, shortest:-1], smooth[:, shortest - 1 : -2], smooth[:, shortest + 1 :]
    # Height of the cosine through the three, exact for a tone:
    # a^2 = c^2 + (difference / 2)^2 / sin(step)^2, with the cosine of the step the others' mean over c.
    sine = ((below + above) / here).clamp_(-1.0, 1.999).square_().mul_(-0.25).add_(1.0)  # squared
    height = (above - below).square_().mul_(0.25).div_(sine).addcmul_(here, here).sqrt_()
    is_peak = (here > below) & (here >= above) & (here > 0.0)
    # A score of 0 stands for no peak, since a peak that low is not voiced.
    score, index = (height - tables.costs).mul_(is_peak).topk(CANDIDATES, dim=1)
    height = torch.where(score > 0.0, height.gather(1, index), 0.0)
    return index + shortest, height, score.clamp_(min=0.0)


def best_path(lag: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """The candidate of each frame on the best path through it, `(N, 1)`, from lags and scores `(N, C)`: scores are
    summed, less a cost of jumps.

    Viterbi's recursion (https://doi.org/10.1109/PROC.1973.9030) from either side of each frame, over a fixed number of
    frames: all frames take a step at a time, and a recording's end does not depend on its start."""
    # Frames last, (C, N): what is contiguous is fast.
    octaves, score = lag.t().log2().contiguous(), score.t().contiguous()
    # Jumps cost as much as the less periodic of the two frames is worth.
    worth = torch.minimum(score[0, :-1], score[0, 1:])  # the highest scores come first
    jump = (octaves[:, None, :-1] - octaves[None, :, 1:]).abs_().clamp_(max=1.0)  # (C from, C to, N - 1)
    jump *= JUMP_COST * worth
    is_linked = (worth > 0.0).to(score.dtype)  # else sums of another utterance would change the rounding
    past, future = torch.zeros_like(score), torch.zeros_like(score)
    for _ in range(PATH_FRAMES):
        past[:, 1:] = ((past + score)[:, None, :-1] - jump).amax(dim=0).mul_(is_linked)
        future[:, :-1] = ((future + score)[None, :, 1:] - jump).amax(dim=1).mul_(is_linked)
    return (past + score + future).argmax(dim=0)[:, None]


def refine_lag(correlation: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Maximum of a parabola through each frame's own correlation `(N, K)`, at most a step from the candidates' lags
    `(N, C)`: lags in steps, with fractions, `(N, C)`."""
    around = torch.arange(-2, 3, device=index.device)
    near = (index[:, :, None] + around).clamp_(0, correlation.shape[1] - 1)
    values = correlation.gather(1, near.flatten(1)).view(near.shape)
    shift = values[..., 1:4].argmax(dim=2, keepdim=True)
    below, here, above = values.gather(2, shift + around[2:]).unbind(dim=2)
    curvature = (2.0 * here - above - below).clamp(min=1e-6)
    offset = ((above - below) / (2.0 * curvature)).clamp(-0.5, 0.5)
    return index + shift[..., 0] - 1 + offset

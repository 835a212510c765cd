"""Errors of each F0 tracker on synthetic voices with known F0, clean, in noise and band-limited, as a Markdown table.

python benchmarks/f0_trackers.py
"""

import math
from typing import Any

import numpy as np

from echo_hf.metrics import format_table
from echo_hf.pitch_echo import TRACKERS, estimate_f0

SAMPLING_RATE = 16000  # Hz
HOP_LENGTH = 160  # samples, 10 ms
GROSS_ERROR = 0.2  # share of the reference
PITCH_TOLERANCE = 50.0  # cents: half a semitone
HIGHEST_HARMONIC = 3800.0  # Hz, of synthetic voices


def f0_metrics(reference: np.ndarray, estimate: np.ndarray) -> dict[str, float]:
    """
    Errors of an estimated F0, frame by frame.

    | key | value |
    |---|---|
    | `gpe` | gross pitch error: share of the frames voiced in both whose F0 is off by more than 20% |
    | `vde` | voicing decision error: share of all frames voiced in one and unvoiced in the other |
    | `ffe` | F0 frame error: share of all frames with a gross pitch error or a voicing decision error |
    | `rpa` | raw pitch accuracy: share of the frames voiced in the reference whose estimate is within 50 cents |
    | `rca` | raw chroma accuracy: the same, an error of whole octaves forgiven |
    | `cents` | mean absolute error of the frames voiced in both without a gross error, `1200 abs(log2(f / f_ref))` |

    GPE as in Rabiner et al. (1976, https://doi.org/10.1109/TASSP.1976.1162846), VDE and FFE as in Chu and Alwan (2009,
    https://doi.org/10.1109/ICASSP.2009.4960497), RPA and RCA as in Poliner et al. (2007,
    https://doi.org/10.1109/TASL.2006.889797) with an unvoiced estimate counting as wrong.

    Args:
        reference (`np.ndarray`): true F0, shape `(frames,)`, Hz, 0 = unvoiced.
        estimate (`np.ndarray`): F0 of the tracker, shape `(frames,)`, Hz, 0 = unvoiced.

    Returns:
        `dict[str, float]`: the values of the table, shares from 0 to 1; NaN where there is no frame to count.

    Raises:
        `ValueError`: the two are not 1-D, differ in shape, or are empty.

    Example:

    ```python
    >>> import numpy as np

    >>> result = f0_metrics(np.array([0.0, 100.0, 100.0, 100.0]), np.array([90.0, 100.0, 200.0, 0.0]))
    >>> result["gpe"], result["vde"], result["ffe"]
    (0.5, 0.5, 0.75)

    ```
    """
    reference, estimate = np.asarray(reference, dtype=np.float64), np.asarray(estimate, dtype=np.float64)
    if reference.ndim != 1 or reference.shape != estimate.shape or not len(reference):
        raise ValueError(
            f"F0 of shapes {reference.shape} (reference) and {estimate.shape} (estimate) cannot be compared; both must"
            " be 1-D, of the same length and not empty."
        )
    voiced, heard = reference > 0, estimate > 0
    both = voiced & heard
    gross = both & (np.abs(estimate - reference) > GROSS_ERROR * reference)
    cents = np.zeros(len(reference))
    cents[both] = 1200.0 * np.log2(estimate[both] / reference[both])
    chroma = (cents + 600.0) % 1200.0 - 600.0  # to the nearest octave

    def share(frames, among):
        return float(np.count_nonzero(frames) / np.count_nonzero(among)) if among.any() else math.nan

    everything, fine = np.ones(len(reference), dtype=bool), both & ~gross
    return {
        "gpe": share(gross, both),
        "vde": share(voiced != heard, everything),
        "ffe": share(gross | (voiced != heard), everything),
        "rpa": share(both & (np.abs(cents) <= PITCH_TOLERANCE), voiced),
        "rca": share(both & (np.abs(chroma) <= PITCH_TOLERANCE), voiced),
        "cents": float(np.abs(cents[fine]).mean()) if fine.any() else math.nan,
    }


def synthetic_voice(f0: np.ndarray, seed: int = 0, first_harmonic: int = 1) -> np.ndarray:
    """
    A voice-like sound at 16 kHz with a known F0: harmonics up to 3.8 kHz under three moving formants.

    Args:
        f0 (`np.ndarray`): shape `(samples,)`, Hz at every sample, 0 = silence.
        seed (`int`, defaults to 0): of the formants.
        first_harmonic (`int`, defaults to 1): lowest harmonic that sounds; 2 leaves the fundamental out.

    Returns:
        `np.ndarray`: float64, shape `(samples,)`; a root mean square of 0.1 where it is voiced.
    """
    f0 = np.asarray(f0, dtype=np.float64)
    generator = np.random.default_rng(seed)
    times = np.arange(len(f0)) / SAMPLING_RATE
    # The centers of the formants move between these (Hz), once or twice a second.
    lowest, highest = np.array([300.0, 900.0, 2300.0]), np.array([800.0, 2100.0, 3000.0])
    bandwidths, gains = np.array([80.0, 120.0, 180.0]), np.array([1.0, 0.5, 0.25])
    rates, phases = generator.uniform(0.7, 1.7, 3), generator.uniform(0.0, 2.0 * np.pi, 3)
    positions = 0.5 + 0.5 * np.sin(2.0 * np.pi * rates * times[:, None] + phases)
    centers = lowest + (highest - lowest) * positions  # (samples, formants)
    # Runs of voice begin and end within 10 ms.
    fade = np.hanning(2 * (SAMPLING_RATE // 200) + 3)[1:-1]  # of odd length, so that it is centered
    loudness = np.convolve(f0 > 0, fade / fade.sum())[len(fade) // 2 :][: len(f0)] * (f0 > 0)
    cycles = np.cumsum(f0) / SAMPLING_RATE
    waveform = np.zeros(len(f0))
    lowest_f0 = f0[f0 > 0].min(initial=HIGHEST_HARMONIC)
    for harmonic in range(first_harmonic, int(HIGHEST_HARMONIC / lowest_f0) + 1):
        frequency = harmonic * f0
        resonance = 1.0 / (1.0 + ((frequency[:, None] - centers) / bandwidths) ** 2)
        amplitude = (0.1 + resonance @ gains) / harmonic**0.5 * (frequency < HIGHEST_HARMONIC)
        waveform += amplitude * np.sin(2.0 * np.pi * harmonic * cycles)
    waveform *= loudness
    power = np.mean(waveform[f0 > 0] ** 2) if (f0 > 0).any() else 1.0
    return 0.1 * waveform / np.sqrt(power)


def f0_test_signals() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """
    Four synthetic voices with known F0, clean, in noise and band-limited; the same at every call.

    The voices (85 to 130 Hz, 110 to 150, 170 to 290 and 240 to 420 Hz) glide or have a vibrato of 5.5 Hz, for 2.5
    seconds each, with pauses and bursts of hissing between runs of voice. Noise is white, at a ratio of the power of
    the voiced parts to that of the noise up to 8 kHz. "telephone" keeps 300 to 3400 Hz; "no fundamental" leaves out
    the first harmonic.

    Returns:
        `dict[str, tuple[np.ndarray, np.ndarray]]`: by name, a waveform at 16 kHz, shape `(samples,)`, and its F0,
        shape `(samples // 160 + 1,)`, Hz, 0 = unvoiced.
    """
    generator = np.random.default_rng(0)
    times = np.arange(int(2.5 * SAMPLING_RATE)) / SAMPLING_RATE  # seconds
    vibrato = np.sin(2.0 * np.pi * 5.5 * times)
    contours = [
        130.0 - 18.0 * times + 6.0 * np.sin(2.0 * np.pi * 0.9 * times),
        130.0 + 4.0 * vibrato + 12.0 * np.sin(2.0 * np.pi * 0.6 * times),
        230.0 + 55.0 * np.sin(2.0 * np.pi * 0.8 * times),
        330.0 + 12.0 * vibrato - 70.0 * np.cos(2.0 * np.pi * 0.4 * times),
    ]
    voiced = np.zeros(len(times), dtype=bool)
    for start, stop in [(0.15, 0.85), (1.0, 1.25), (1.45, 1.55), (1.7, 2.35)]:
        voiced |= (start <= times) & (times < stop)
    hiss = np.diff(generator.standard_normal(len(times) + 1)) * ((0.87 <= times) & (times < 0.97))
    f0 = np.concatenate([np.where(voiced, contour, 0.0) for contour in contours])
    silent = f0 == 0

    def speak(first_harmonic):
        runs = np.split(f0, len(contours))
        voices = [synthetic_voice(run, seed, first_harmonic) for seed, run in enumerate(runs)]
        return np.concatenate(voices) + 0.02 * np.tile(hiss, len(contours))

    def add_noise(waveform, decibels):
        noise = generator.standard_normal(len(waveform))
        return waveform + noise * np.sqrt(np.mean(waveform[~silent] ** 2)) * 10.0 ** (-decibels / 20.0)

    def telephone(waveform):
        # Edges are 100 Hz wide, since steeper ones ring in the pauses.
        frequencies = np.fft.rfftfreq(len(waveform), 1.0 / SAMPLING_RATE)
        gain = np.interp(frequencies, [200.0, 300.0, 3400.0, 3500.0], [0.0, 1.0, 1.0, 0.0])
        return np.fft.irfft(np.fft.rfft(waveform) * gain, len(waveform))

    clean = speak(first_harmonic=1)
    signals = {"clean": clean}
    signals |= {f"{decibels} dB": add_noise(clean, decibels) for decibels in (20, 10, 5, 0)}
    signals["no fundamental"] = speak(first_harmonic=2)
    signals["telephone"] = telephone(clean)
    signals["telephone, 10 dB"] = telephone(signals["10 dB"])
    frames = np.append(f0, 0.0)[::HOP_LENGTH][: len(f0) // HOP_LENGTH + 1]
    return {name: (waveform, frames) for name, waveform in signals.items()}


def benchmark_trackers() -> list[dict[str, Any]]:
    """A row for each signal and tracker, as [`f0_metrics`] defines the errors: shares in percent, and cents."""
    rows = []
    for signal, (waveform, reference) in f0_test_signals().items():
        for method in TRACKERS:
            estimate = estimate_f0(waveform, SAMPLING_RATE, HOP_LENGTH, method)[: len(reference)]
            errors = f0_metrics(reference, estimate)
            shares = {f"{name.upper()} %": 100 * errors[name] for name in ("gpe", "vde", "ffe", "rpa", "rca")}
            rows.append({"signal": signal, "tracker": method, **shares, "cents": errors["cents"]})
    return rows


if __name__ == "__main__":
    print(format_table(benchmark_trackers()))

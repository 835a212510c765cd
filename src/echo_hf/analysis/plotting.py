"""Pictures of what Echo is given and how pitch moves its attention. Needs matplotlib: `pip install ".[plot]"`.

Each function returns a `matplotlib.figure.Figure` with a `title` above, and raises an `ImportError` without matplotlib.
Figures are made without pyplot, so that no window opens. A label or a line's style tells what a color tells.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..feature_extraction_echo import EchoFeatureExtractor
from ..segmentation_echo import runs
from .attention import plot_alignment, plot_angles, plot_pitch_bias, plot_similarity, position_similarity
from .figures import (
    BLUE,
    LONGEST_PICTURE,
    ORANGE,
    SKY,
    VERMILLION,
    check_length,
    check_words,
    draw_f0,
    new_figure,
    write_words_above,
)

SPECTROGRAM_RANGE = 70.0  # dB below the loudest that a picture still shows
HIGHEST_FREQUENCY = 4000.0  # Hz, top of a narrow-band spectrogram


def plot_utterance(
    audio,
    feature_extractor: EchoFeatureExtractor | None = None,
    title: str | None = None,
    words: Sequence[Mapping[str, Any]] | None = None,
):
    """Waveform, log-mel spectrogram and F0 of one utterance on one time axis, voiced stretches shaded.

    Args:
        audio: one utterance, as [`EchoFeatureExtractor`] takes it, of any sampling rate.
        feature_extractor ([`EchoFeatureExtractor`], *optional*): with pitch; the default one if not given.
        words (`Sequence[Mapping]`, *optional*): the `"chunks"` of the pipeline: each with `"text"` and `"timestamp"`
            (start and end in seconds). They are written under the waveform.

    Returns:
        `matplotlib.figure.Figure`: with three axes, in the order above; time in seconds.

    Raises:
        `ValueError`: the extractor has no pitch, the audio cannot be used, or a word lacks its times.
    """
    figure = new_figure(9, 6.5, title)
    extractor, waveform, features, f0 = _extract(audio, feature_extractor)
    num_mels = extractor.feature_groups["spectrogram"]
    frame = extractor.hop_length / extractor.sampling_rate  # seconds
    duration = len(waveform) / extractor.sampling_rate

    axes = figure.subplots(3, 1, sharex=True, height_ratios=(1.2, 1.6, 1.2))
    axes[0].plot(np.arange(len(waveform)) / extractor.sampling_rate, waveform, color=BLUE, linewidth=0.5)
    axes[0].set_ylabel("amplitude")
    image = axes[1].imshow(
        features[:, :num_mels].T * 40.0,  # a unit is 4 decades of power
        origin="lower",
        aspect="auto",
        cmap="cividis",
        extent=(0.0, len(features) * frame, 0, num_mels),
    )
    axes[1].set_ylabel("mel channel")
    figure.colorbar(image, ax=axes[1], label="dB above floor", pad=0.01)
    draw_f0(axes[2], np.arange(len(f0)) * frame, f0)
    axes[2].set_xlim(0.0, duration)
    for i, (start, end) in enumerate(runs(f0 > 0)):
        for axis in (axes[0], axes[2]):
            label = "voiced" if i == 0 and axis is axes[2] else None
            axis.axvspan(start * frame, end * frame, color=SKY, alpha=0.25, linewidth=0, label=label)
    if f0.any():
        axes[2].set_ylim(0.9 * f0[f0 > 0].min(), 1.35 * f0.max())  # with room for the legend
        axes[2].legend(loc="upper right", ncols=2)
    if words:
        peak = float(np.abs(waveform).max()) or 1.0
        axes[0].set_ylim(-2.2 * peak, 1.1 * peak)
        axes[0].set_yticks((-peak, 0.0, peak), [f"{tick:.2g}" for tick in (-peak, 0.0, peak)])
        _write_words(axes[0], words, duration)
    return figure


def plot_pitch(
    audio,
    feature_extractor: EchoFeatureExtractor | None = None,
    title: str | None = None,
    words: Sequence[Mapping[str, Any]] | None = None,
    harmonics: int = 5,
):
    """F0 and its harmonics on a narrow-band spectrogram. Where the tracker is right, they lie on its ridges.

    The spectrogram has a window of 40 ms, longer than the model's own 25 ms, so that harmonics stand apart.

    Args:
        audio, feature_extractor, words: as in [`plot_utterance`]; words are written above.
        harmonics (`int`, defaults to 5): multiples of F0 that are drawn, F0 itself among them; at least 1.

    Returns:
        `matplotlib.figure.Figure`: with one axes, time in seconds by frequency in Hz.

    Raises:
        `ValueError`: the extractor has no pitch, or the audio cannot be used.
    """
    from transformers.audio_utils import spectrogram, window_function

    if harmonics < 1:
        raise ValueError(f"harmonics must be at least 1, got {harmonics}.")
    figure = new_figure(9, 5, title)
    extractor, waveform, _, f0 = _extract(audio, feature_extractor)
    rate, hop = extractor.sampling_rate, extractor.hop_length
    window = round(0.04 * rate)
    decibels = spectrogram(
        np.pad(waveform, (0, max(0, window + 1 - len(waveform)))),  # mirroring the ends takes that many samples
        window_function(window, "hann"),
        frame_length=window,
        hop_length=hop,
        fft_length=4 * 2 ** int(np.ceil(np.log2(window))),
        power=2.0,
        log_mel="dB",
        db_range=SPECTROGRAM_RANGE,
    )[:, : len(f0)]
    decibels = decibels - max(decibels.max(), SPECTROGRAM_RANGE - 100.0)  # silence, at -100 dB, stays white
    frame = hop / rate
    axis = figure.subplots()
    image = axis.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        cmap="Greys",
        vmin=-SPECTROGRAM_RANGE,
        vmax=0.0,
        extent=(-frame / 2, (decibels.shape[1] - 0.5) * frame, 0.0, rate / 2),
    )
    figure.colorbar(image, ax=axis, label="level (dB, 0 = the loudest)", pad=0.01)
    times, voiced = np.arange(len(f0)) * frame, np.where(f0 > 0, f0, np.nan)
    for number in range(2, harmonics + 1):
        label = f"harmonics 2 to {harmonics}" if number == 2 else None
        axis.plot(times, number * voiced, "--", color=BLUE, linewidth=1.0, label=label)
    axis.plot(times, voiced, color=VERMILLION, linewidth=2.5, label="F0")
    axis.set_ylim(0.0, min(HIGHEST_FREQUENCY, rate / 2))
    axis.set_xlim(0.0, len(waveform) / rate)
    axis.set_xlabel("time (s)")
    axis.set_ylabel("frequency (Hz)")
    axis.legend(loc="upper right", framealpha=0.95)
    if words:
        write_words_above(axis, words, len(waveform) / rate, "0.4")
    if not f0.any():
        axis.text(0.5, 0.9, "no voiced frame", ha="center", transform=axis.transAxes)
    return figure


def plot_learning_curves(log_history: str | PathLike | Iterable[Mapping[str, Any]], title: str | None = None):
    """Losses of a training run by step, and the word error rate on an axis at the right.

    Args:
        log_history: `trainer.state.log_history`, or path of a `trainer_state.json`, or of the folder with it.

    Returns:
        `matplotlib.figure.Figure`: with one axes for losses, and a second for the word error rate in percent if the log
        has one.

    Raises:
        `ValueError`: there is no log, or it holds no loss and no word error rate.
    """
    figure = new_figure(9, 5, title)
    if isinstance(log_history, str | PathLike):
        log_history = _read_log_history(Path(log_history))
    log_history = list(log_history)
    losses = figure.subplots()
    handles = _draw_log(losses, log_history, "loss", color=BLUE, label="training loss")
    handles += _draw_log(losses, log_history, "eval_loss", color=ORANGE, marker="o", label="evaluation loss")
    losses.set_xlabel("step")
    losses.set_ylabel("loss (nats a token)")
    losses.grid(color="0.9")
    if any(isinstance(entry.get("eval_wer"), int | float) for entry in log_history):
        rates, style = losses.twinx(), {"color": VERMILLION, "linestyle": "-.", "marker": "s"}
        handles += _draw_log(rates, log_history, "eval_wer", 100.0, label="word error rate (right)", **style)
        rates.set_ylabel("word error rate (%)", color=VERMILLION)
        rates.tick_params(axis="y", colors=VERMILLION)
    if not handles:
        raise ValueError("log_history holds neither a loss nor a word error rate: was anything trained?")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    return figure


def _read_log_history(path: Path) -> list[dict[str, Any]]:
    file = path / "trainer_state.json" if path.is_dir() else path
    try:
        return json.loads(file.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no log of a training run ({error}); name a trainer_state.json or the folder of a run."
        ) from error


def _draw_log(axis, log_history: list[Mapping[str, Any]], key: str, scale: float = 1.0, **style) -> list:
    points = [(entry["step"], entry[key] * scale) for entry in log_history if isinstance(entry.get(key), int | float)]
    lines = axis.plot(*zip(*points), markersize=4, **style) if points else []
    # From 0, with room above for whole markers.
    highest = max((max(line.get_ydata()) for line in axis.lines), default=0.0)
    axis.set_ylim(0.0, 1.05 * highest if highest > 0 else 1.0)
    return lines


def _extract(audio, extractor: EchoFeatureExtractor | None):
    """The extractor, the waveform `(samples,)` at its rate, the features `(T, channels)` and F0 `(T,)` in Hz."""
    extractor = extractor if extractor is not None else EchoFeatureExtractor()
    if "pitch" not in extractor.feature_groups:
        raise ValueError("feature_extractor: its feature_groups have no 'pitch' to draw.")
    waveform = extractor._read(audio, "audio", extractor.sampling_rate, resample=True)
    check_length(len(waveform) / extractor.sampling_rate)
    features = extractor(waveform, sampling_rate=extractor.sampling_rate)["input_features"][0]
    return extractor, waveform, features, features[:, -1]


def _write_words(axis, words: Sequence[Mapping[str, Any]], duration: float) -> None:
    """Words at their times near an axis' lower edge, in rows if they would overlap."""
    place = axis.get_xaxis_transform()
    letter = duration / 95  # width of a letter of this size, seconds
    ends = [0.0, 0.0, 0.0]  # where the text of each row ends
    for word in check_words(words):
        (start, end), text = word["timestamp"], word["text"].strip()
        middle, half = (start + end) / 2, 0.5 * len(text) * letter
        row = next((row for row, taken in enumerate(ends) if taken <= middle - half), int(np.argmin(ends)))
        ends[row] = middle + half + letter
        y = 0.27 - 0.12 * row
        axis.plot((start, end), (y - 0.02, y - 0.02), "|-", color=VERMILLION, linewidth=1.5, transform=place)
        axis.text(middle, y, text, ha="center", va="bottom", fontsize=8, transform=place, clip_on=True)


__all__ = [
    "LONGEST_PICTURE",
    "plot_alignment",
    "plot_angles",
    "plot_learning_curves",
    "plot_pitch",
    "plot_pitch_bias",
    "plot_similarity",
    "plot_utterance",
    "position_similarity",
]

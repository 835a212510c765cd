"""What all pictures share: an empty figure, colors, words above an axis, F0 below one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The color-blind safe palette of Okabe and Ito (https://jfly.uni-koeln.de/color/).
BLACK, ORANGE, SKY = "#000000", "#E69F00", "#56B4E9"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
LONGEST_PICTURE = 120  # s; details of longer audio cannot be seen, and its spectrogram fills the memory


def new_figure(width: float, height: float, title: str | None = None):
    """An empty figure of that size in inches, with a title above all axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'Pictures need matplotlib ({error}): `pip install ".[plot]"` in the clone.') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    if title is not None:
        figure.suptitle(title)
    return figure


def check_length(seconds: float) -> None:
    """Raises `ValueError` for audio that lasts longer than `LONGEST_PICTURE`."""
    if seconds > LONGEST_PICTURE:
        raise ValueError(
            f"A picture shows at most {LONGEST_PICTURE} s, and the audio lasts {seconds:.0f} s; cut out a part of it."
        )


def check_words(words: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Returns the words; raises `ValueError` for one without a text, a start or an end."""
    for word in words:
        times = word.get("timestamp") or ()
        if "text" not in word or len(times) != 2 or any(time is None for time in times):
            raise ValueError(f"words: {dict(word)} must have a text and a timestamp of start and end in seconds.")
    return words


def write_words_above(axis, words: Sequence[Mapping[str, Any]], duration: float, color: str) -> None:
    """Words at their middles above an axis, with dotted lines of that color where each starts and ends."""
    middles = [min(sum(word["timestamp"]) / 2, duration) for word in check_words(words)]
    top = axis.secondary_xaxis("top")
    top.set_xticks(middles, [word["text"].strip() for word in words], fontsize=8, rotation=30, ha="left")
    for word in words:
        for time in word["timestamp"]:
            axis.axvline(time, color=color, linewidth=0.8, linestyle=":")
    axis.set_xlim(0.0, duration)


def draw_f0(axis, times: np.ndarray, f0: np.ndarray) -> None:
    """Voiced frames of F0 (Hz) over time (s), or a note that there is none."""
    axis.plot(times, np.where(f0 > 0, f0, np.nan), ".", color=VERMILLION, markersize=4, label="F0")
    axis.set_ylabel("F0 (Hz)")
    axis.set_xlabel("time (s)")
    if not f0.any():
        axis.set_yticks([])
        axis.text(0.5, 0.5, "no voiced frame", ha="center", transform=axis.transAxes)


def draw_matrix(axis, matrix: np.ndarray, duration: float, limits: tuple[float, float], colors: str = "cividis"):
    """The image of a matrix `(S, S)` of frames by frames, over seconds both ways."""
    low, high = limits
    extent = (0.0, duration, 0.0, duration)
    return axis.imshow(
        matrix, origin="lower", cmap=colors, vmin=low, vmax=high, extent=extent, interpolation="nearest", aspect="auto"
    )

"""Pictures of F0, and of how pitch moves a model's attention. Needs matplotlib: `pip install ".[plot]"`.

Each function returns a `matplotlib.figure.Figure` with a `title` above, and raises an `ImportError` without matplotlib.
Figures are made without pyplot, so that no window opens. A label or a line's style tells what a color tells. Attention
is computed by the model's own rotary embedding and encoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.audio_utils import spectrogram, window_function

from ..conditioning_echo import EchoPitch, laplacian_bias, standardize_f0
from ..feature_extraction_echo import EchoFeatureExtractor
from .diagnostics import find_module

# The color-blind safe palette of Okabe and Ito (https://jfly.uni-koeln.de/color/).
BLACK, ORANGE = "#000000", "#E69F00"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
PAIR_COLORS = (BLACK, ORANGE, BLUE, PURPLE)  # of the channel pairs whose angles are drawn

LONGEST_PICTURE = 120  # s; details of longer audio cannot be seen, and its spectrogram fills the memory
SPECTROGRAM_RANGE = 70.0  # dB below the loudest that a picture still shows
HIGHEST_FREQUENCY = 4000.0  # Hz, top of a narrow-band spectrogram
HARMONICS = 5  # multiples of F0 that are drawn, F0 itself among them
ROUNDING = 1e-9  # rad; smaller differences of float64 angles are rounding errors

THETA_MODES = ("none", "mean", "frame", "phase")


def plot_pitch(
    audio,
    feature_extractor: EchoFeatureExtractor | None = None,
    title: str | None = None,
    words: Sequence[Mapping[str, Any]] | None = None,
):
    """F0 and its harmonics on a narrow-band spectrogram. Where the tracker is right, they lie on its ridges.

    The spectrogram has a window of 40 ms, longer than the model's own 25 ms, so that harmonics stand apart.

    Args:
        audio: one utterance, as [`EchoFeatureExtractor`] takes it, of any sampling rate.
        feature_extractor ([`EchoFeatureExtractor`], *optional*): with pitch; the default one if not given.
        words (`Sequence[Mapping]`, *optional*): the `"chunks"` of the pipeline: each with `"text"` and `"timestamp"`
            (start and end in seconds). They are written above.

    Returns:
        `matplotlib.figure.Figure`: with one axes, time in seconds by frequency in Hz.

    Raises:
        `ValueError`: the extractor has no pitch, the audio cannot be used, or a word lacks its times.
    """
    figure = new_figure(9, 5, title)
    extractor = feature_extractor if feature_extractor is not None else EchoFeatureExtractor()
    if "pitch" not in extractor.feature_groups:
        raise ValueError("feature_extractor: its feature_groups have no 'pitch' to draw.")
    rate, hop = extractor.sampling_rate, extractor.hop_length
    waveform = extractor._read(audio, "audio", rate, resample=True)
    check_length(len(waveform) / rate)
    f0 = extractor(waveform, sampling_rate=rate)["input_features"][0][:, -1]
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
    for number in range(2, HARMONICS + 1):
        label = f"harmonics 2 to {HARMONICS}" if number == 2 else None
        axis.plot(times, number * voiced, "--", color=BLUE, linewidth=1.0, label=label)
    axis.plot(times, voiced, color=VERMILLION, linewidth=2.5, label="F0")
    axis.set_ylim(0.0, min(HIGHEST_FREQUENCY, rate / 2))
    axis.set_xlim(0.0, len(waveform) / rate)
    axis.set_xlabel("time (s)")
    axis.set_ylabel("frequency (Hz)")
    axis.legend(loc="upper right", framealpha=0.95)
    if words:
        write_words_above(axis, words, len(waveform) / rate)
    if not f0.any():
        axis.text(0.5, 0.9, "no voiced frame", ha="center", transform=axis.transAxes)
    return figure


def plot_angles(model, input_features, theta_mode: str | None = None, title: str | None = None):
    """Rotary angles of the first four channel pairs of the encoder: standard (thick; even pairs solid, odd ones dashed)
    against F0-adapted (thin), their difference, and F0.

    Angles are unwound where no pair turns by more than half a circle a frame. Otherwise they are drawn modulo 2 pi,
    with the difference in [-pi, pi), since the number of turns is not known. The difference starts at 0, since
    attention does not depend on what is added to all angles alike.

    Args:
        model: an Echo model with an encoder.
        input_features (`torch.Tensor` of shape `(T, channels)` or `(1, T, channels)`): of [`EchoFeatureExtractor`],
            with pitch, one utterance without padding.
        theta_mode (`str`, *optional*): `"mean"`, `"frame"`, `"phase"` or `"none"` (no difference); the model's own if
            not given.

    Returns:
        `matplotlib.figure.Figure`: with three axes: angles (rad), differences (rad) and F0 (Hz) over time (s).

    Raises:
        `ValueError`: the features are not one utterance with pitch, or the mode is not known.
    """
    from matplotlib.lines import Line2D

    figure = new_figure(9, 7.5, title)
    encoder, pitch, seconds = _encode_pitch(model, input_features)
    f0 = pitch.f0[0].double().numpy()
    theta_mode = _check_mode(encoder, theta_mode or encoder.config.theta_mode)
    is_unwound = _fastest_turn(encoder, f0) < np.pi
    standard = _angles(encoder, pitch, "none", is_unwound)[:, : len(PAIR_COLORS)]
    difference = _angles(encoder, pitch, theta_mode, is_unwound)[:, : len(PAIR_COLORS)] - standard
    difference -= difference[:1]
    if not is_unwound:
        difference = (difference + np.pi) % (2 * np.pi) - np.pi
    difference[np.abs(difference) < ROUNDING] = 0.0
    adapted = standard + difference if is_unwound else (standard + difference) % (2 * np.pi)
    times = np.arange(len(f0)) * seconds
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(2.2, 1.6, 1))
    handles = []
    for pair in range(standard.shape[1]):
        line = {"color": PAIR_COLORS[pair], "linestyle": ("-", "--")[pair % 2]}
        axes[0].plot(times, standard[:, pair], linewidth=4.5, alpha=0.45, **line)
        axes[0].plot(times, adapted[:, pair], linewidth=1.2, color=PAIR_COLORS[pair])
        axes[1].plot(times, difference[:, pair], linewidth=1.6, **line)
        handles.append(Line2D([], [], linewidth=2.5, label=f"pair {pair}", **line))
    handles.append(Line2D([], [], color="0.3", linewidth=4.5, alpha=0.45, label="standard"))
    handles.append(Line2D([], [], color="0.3", linewidth=1.2, label=f"F0-adapted ({theta_mode})"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    axes[0].set_ylabel("angle (rad)" if is_unwound else "angle modulo 2π (rad)")
    axes[1].set_ylabel("adapted − standard (rad)")
    axes[1].axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
    if not difference.any():
        axes[1].set_ylim(-1.0, 1.0)
        axes[1].text(0.5, 0.6, "F0 moves no angle", ha="center", transform=axes[1].transAxes)
    draw_f0(axes[2], times, f0)
    axes[2].set_xlim(0.0, max(times[-1], seconds))
    figure.align_ylabels(axes)
    return figure


def plot_similarity(model, input_features, title: str | None = None):
    """How alike the rotary embedding makes two positions: the mean over channel pairs of `cos(angle_i - angle_j)`,
    standard and F0-adapted (by its mean, by frame, by phase, and by the contour if the model's `theta_mode` is that; a
    column each), and below it what F0 changes. A narrow bright band is local attention.

    Args:
        model: an Echo model with an encoder.
        input_features (`torch.Tensor` of shape `(T, channels)` or `(1, T, channels)`): as in [`plot_angles`].

    Returns:
        `matplotlib.figure.Figure`: similarities in the upper row, at most 1, and in the lower row those less the
        standard ones; time in seconds both ways.

    Raises:
        `ValueError`: the features are not one utterance with pitch.
    """
    encoder, pitch, seconds = _encode_pitch(model, input_features)
    modes = _modes(encoder)
    figure = new_figure(3.3 * len(modes), 6.4, title)
    similarities = [position_similarity(_angles(encoder, pitch, mode)) for mode in modes]
    standard = similarities[modes.index("none")]
    differences = [similarity - standard for similarity in similarities]
    largest = max(max(np.abs(difference).max() for difference in differences), 1e-3)
    lowest = min(similarity.min() for similarity in similarities)
    axes = figure.subplots(2, len(modes), sharex=True, sharey=True)
    for column, mode in enumerate(modes):
        upper = draw_matrix(axes[0, column], similarities[column], len(standard) * seconds, (lowest, 1))
        lower = draw_matrix(axes[1, column], differences[column], len(standard) * seconds, (-largest, largest), "PuOr")
        axes[0, column].set_title("standard (none)" if mode == "none" else mode)
        if np.abs(differences[column]).max() < ROUNDING:
            axes[1, column].text(0.5, 0.5, "no difference", ha="center", transform=axes[1, column].transAxes)
        axes[1, column].set_xlabel("time j (s)")
    for row in axes:
        row[0].set_ylabel("time i (s)")
    figure.colorbar(upper, ax=axes[0], label="similarity", pad=0.01)
    figure.colorbar(lower, ax=axes[1], label="less the standard's", pad=0.01)
    return figure


def position_similarity(angles: np.ndarray) -> np.ndarray:
    """Mean over channel pairs of `cos(angle_i - angle_j)`, `(S, C)` to `(S, S)`; 1 on the diagonal."""
    turned = np.exp(1j * np.asarray(angles, dtype=np.float64))
    return (turned @ turned.conj().T).real / turned.shape[1]


def plot_pitch_bias(model, input_features, strength: float | None = None, title: str | None = None):
    """What the pitch bias adds to the score of frame i attending to frame j, both forms side by side, above F0:
    laplacian `exp(-|f_i - f_j|)` and gaussian `-s * (f_i - f_j) ** 2`, f the standardized F0 (the laplacian's by n - 1,
    as published).

    Args:
        model: an Echo model with an encoder, with any pitch bias.
        input_features (`torch.Tensor` of shape `(T, channels)` or `(1, T, channels)`): as in [`plot_angles`].
        strength (`float`, *optional*): s of the gaussian; the largest that a head has learned if not given, or 1 if
            the model has no gaussian bias. A negative one keeps frames of similar pitch apart.

    Returns:
        `matplotlib.figure.Figure`: laplacian, gaussian, and F0 (Hz) below each; time in seconds.

    Raises:
        `ValueError`: the features are not one utterance with pitch.
    """
    figure = new_figure(10, 6.6, title)
    encoder, pitch, seconds = _encode_pitch(model, input_features)
    strength, described = _choose_strength(encoder, strength)
    everywhere = torch.ones_like(pitch.f0)
    f0, f = pitch.f0[0].double().numpy(), standardize_f0(pitch.f0, everywhere)[0].double().numpy()
    gaussian = -strength * np.square(f[:, None] - f[None, :])
    axes = figure.subplots(2, 2, sharex=True, height_ratios=(4, 1))
    # A bias of 0 changes nothing; a gaussian is below it, or above it if s is negative.
    largest = float(np.abs(gaussian).max()) or 1.0
    limits = (-largest, 0.0) if strength >= 0 else (0.0, largest)
    laplacian = laplacian_bias(pitch.f0, everywhere)[0, 0].numpy()
    for axis, matrix, name, (low, high) in (
        (axes[0, 0], laplacian, "laplacian", (0.0, 1.0)),
        (axes[0, 1], gaussian, f"gaussian ({described})", limits),
    ):
        image = draw_matrix(axis, matrix, len(f0) * seconds, (low, high))
        axis.set_title(name, fontsize="medium")
        figure.colorbar(image, ax=axis, label="added to the score", pad=0.02)
    axes[0, 0].set_ylabel("time i, query (s)")
    for axis in axes[1]:
        draw_f0(axis, (np.arange(len(f0)) + 0.5) * seconds, f0)
        axis.set_xlabel("time j, key (s)")
    axes[1, 0].set_xlim(0.0, len(f0) * seconds)
    return figure


def _choose_strength(encoder, strength: float | None) -> tuple[float, str]:
    """The strength of the gaussian, and where it comes from."""
    if strength is not None:
        return strength, f"s = {strength:.3g}, given"
    if encoder.config.pitch_bias != "gaussian":
        return 1.0, "s = 1; this model has none"
    learned = torch.stack([layer.self_attn.bias_strength.detach().float().cpu() for layer in encoder.layers]).numpy()
    layer, head = np.unravel_index(np.abs(learned).argmax(), learned.shape)
    strength = float(learned[layer, head])
    return strength, f"s = {strength:.3g}, learned by layer {layer}, head {head}"


def _one_utterance(model, input_features) -> torch.Tensor:
    """Features of one utterance, `(1, T, channels)`, in float32 on the model's device."""
    features = torch.as_tensor(input_features)
    features = features[None] if features.dim() == 2 else features
    if features.dim() != 3 or features.shape[0] != 1:
        raise ValueError(
            "input_features must be one utterance of shape (frames, channels) or (1, frames, channels), got"
            f" {tuple(features.shape)}."
        )
    check_length(features.shape[1] * model.config.frame_seconds)
    return features.to(model.device, torch.float32)


def _encode_pitch(model, input_features):
    """The encoder, its [`EchoPitch`] of one utterance on the CPU, and the seconds of one of its frames."""
    encoder = find_module(model, "EchoEncoder")
    if encoder is None:
        raise ValueError(f"{type(model).__name__} is no Echo model with an encoder.")
    config = encoder.config
    if "pitch" not in config.feature_groups:
        raise ValueError("The model's feature_groups have no 'pitch', and so nothing to adapt to.")
    features = _one_utterance(model, input_features).cpu()
    groups = dict(zip(config.feature_groups, features.split(list(config.feature_groups.values()), dim=-1)))
    frames = encoder._get_feat_extract_output_lengths(features.shape[1])
    masks = (torch.ones(1, number, dtype=torch.long) for number in (features.shape[1], frames))
    return encoder, encoder._read_pitch(groups, *masks), config.inputs_to_logits_ratio / config.sampling_rate


def _modes(encoder) -> list[str]:
    """Modes that the encoder's angles can be drawn in; only a model that has gains of the contour can in that."""
    return list(dict.fromkeys((*THETA_MODES, encoder.config.theta_mode)))


def _check_mode(encoder, theta_mode: str) -> str:
    modes = _modes(encoder)
    if theta_mode not in modes:
        raise ValueError(f"theta_mode must be one of {', '.join(modes)}, got {theta_mode!r}.")
    return theta_mode


def _rotary(encoder, theta_mode: str):
    """A copy of the encoder's rotary embedding, on the CPU, in that mode."""
    own = encoder.rotary_emb
    rotary = type(own)(own.config, own.head_dim, theta_mode)
    with torch.no_grad():
        for name, parameter in rotary.named_parameters():
            parameter.copy_(own.get_parameter(name))
    return rotary.requires_grad_(False)


def _angles(encoder, pitch: EchoPitch, theta_mode: str, unwound: bool = False) -> np.ndarray:
    """Angles, `(S, C)`, float64: in [0, 2 pi), or unwound, which is right where no pair turns by pi or more a frame."""
    rotary, positions = _rotary(encoder, theta_mode), torch.arange(pitch.f0.shape[1])[None]
    if unwound and theta_mode not in ("phase", "contour"):
        # The position times the angle at position 1. It may jump by any number of turns with F0.
        turns = rotary.angles(torch.ones_like(positions), pitch.f0, pitch.mean_f0)
        return (positions[..., None] * turns)[0].numpy()
    angles = rotary.angles(positions, pitch.f0, pitch.mean_f0, pitch.normalized)[0].numpy()
    return np.unwrap(angles, axis=0) if unwound else angles


def _fastest_turn(encoder, f0: np.ndarray) -> float:
    """The largest turn of a drawn pair in a frame, in rad."""
    rotary = _rotary(encoder, "none")
    theta = rotary.theta(torch.device("cpu"), None, None)
    return float(rotary.frequencies(theta + float(f0.max()))[..., : len(PAIR_COLORS)].max())


# What pictures share -------------------------------------------------------------------------------------------------


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


def write_words_above(axis, words: Sequence[Mapping[str, Any]], duration: float) -> None:
    """Words at their middles above an axis, with dotted lines where each starts and ends."""
    for word in words:
        times = word.get("timestamp") or ()
        if "text" not in word or len(times) != 2 or any(time is None for time in times):
            raise ValueError(f"words: {dict(word)} must have a text and a timestamp of start and end in seconds.")
    middles = [min(sum(word["timestamp"]) / 2, duration) for word in words]
    top = axis.secondary_xaxis("top")
    top.set_xticks(middles, [word["text"].strip() for word in words], fontsize=8, rotation=30, ha="left")
    for word in words:
        for time in word["timestamp"]:
            axis.axvline(time, color="0.4", linewidth=0.8, linestyle=":")
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


__all__ = [
    "LONGEST_PICTURE",
    "plot_angles",
    "plot_pitch",
    "plot_pitch_bias",
    "plot_similarity",
    "position_similarity",
]

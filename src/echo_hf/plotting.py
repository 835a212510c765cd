"""Pictures of what Echo hears and how pitch moves its attention. Needs matplotlib: `pip install ".[plot]"`.

Each function returns a `matplotlib.figure.Figure`, made without pyplot, so that a notebook, a file and TensorBoard all
take it and no window opens. What a model does is asked of the model: angles come from its own rotary embedding, and F0
is put on the encoder's frames as the encoder does it. Colours are those of Okabe and Ito, and what a colour says, a
line's style or a label says too.
"""

import json
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .feature_extraction_echo import EchoFeatureExtractor
from .segmentation_echo import runs

# The colour-blind safe palette of Okabe and Ito (https://jfly.uni-koeln.de/color/).
BLACK, ORANGE, SKY = "#000000", "#E69F00", "#56B4E9"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

THETA_MODES = ("none", "mean", "frame", "phase")
LONGEST_PICTURE = 120  # s; beyond it nothing can be told apart, and spectrograms fill the memory
SPECTROGRAM_RANGE = 70.0  # dB below the loudest that a picture still shows
ROTARY_PAIRS = 4  # channel pairs whose angles are drawn
ROUNDING = 1e-9  # rad; below it angles made in float64 are the same


def plot_utterance(
    audio,
    feature_extractor: EchoFeatureExtractor | None = None,
    title: str | None = None,
    words: Sequence[Mapping[str, Any]] | None = None,
):
    """Waveform, log-mel spectrogram and F0 of one utterance on one time axis, voiced stretches shaded.

    Args:
        audio: what [`EchoFeatureExtractor`] takes as one utterance; another sampling rate than its own is resampled.
        feature_extractor ([`EchoFeatureExtractor`], *optional*): the default one if not given. Its features must hold
            the pitch.
        title (`str`, *optional*): put above the picture.
        words (`Sequence[Mapping]`, *optional*): what was said when, as the pipeline's `"chunks"`: each with `"text"`
            and `"timestamp"` (start and end in seconds). They are written under the waveform.

    Returns:
        `matplotlib.figure.Figure`: with three axes, in the order above; time in seconds.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: the extractor has no pitch, the audio cannot be used, or a word lacks its times.
    """
    figure = _new_figure(9, 6.5)
    extractor, waveform, features, f0 = _hear(audio, feature_extractor)
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
    axes[2].plot(np.arange(len(f0)) * frame, np.where(f0 > 0, f0, np.nan), ".", color=VERMILLION, ms=4, label="F0")
    axes[2].set_ylabel("F0 (Hz)")
    axes[2].set_xlabel("time (s)")
    axes[2].set_xlim(0.0, duration)
    for i, (start, end) in enumerate(runs(f0 > 0)):
        for axis in (axes[0], axes[2]):
            label = "voiced" if i == 0 and axis is axes[2] else None
            axis.axvspan(start * frame, end * frame, color=SKY, alpha=0.25, linewidth=0, label=label)
    if f0.any():
        # Room for the legend above the contour.
        axes[2].set_ylim(0.9 * f0[f0 > 0].min(), 1.35 * f0.max())
        axes[2].legend(loc="upper right", ncols=2)
    else:
        axes[2].text(duration / 2, 0.5, "no voiced frame", ha="center", transform=axes[2].get_xaxis_transform())
    if words:
        peak = float(np.abs(waveform).max()) or 1.0
        axes[0].set_ylim(-2.2 * peak, 1.1 * peak)
        axes[0].set_yticks((-peak, 0.0, peak), [f"{tick:.2g}" for tick in (-peak, 0.0, peak)])
        _write_words(axes[0], words, duration)
    _set_title(figure, title)
    return figure


def plot_pitch(
    audio,
    feature_extractor: EchoFeatureExtractor | None = None,
    title: str | None = None,
    words: Sequence[Mapping[str, Any]] | None = None,
    harmonics: int = 5,
    max_frequency: float = 4000.0,
):
    """F0 and its harmonics on a narrow-band spectrogram: whether the tracker follows the voice can be seen at a glance,
    since F0 and its multiples must lie on the spectrogram's ridges.

    The spectrogram has a window of 40 ms, longer than the model's own 25 ms, so that harmonics stand apart; it is not
    what the model is given.

    Args:
        audio, feature_extractor, title, words: as in [`plot_utterance`]; words are written above.
        harmonics (`int`, defaults to 5): multiples of F0 that are drawn, F0 itself among them; at least 1.
        max_frequency (`float`, defaults to 4000.0): Hz, top of the picture.

    Returns:
        `matplotlib.figure.Figure`: with one axes, time in seconds by frequency in Hz.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: the extractor has no pitch, or the audio cannot be used.
    """
    from transformers.audio_utils import spectrogram
    from transformers.audio_utils import window_function

    if harmonics < 1:
        raise ValueError(f"harmonics must be at least 1, got {harmonics}.")
    figure = _new_figure(9, 5)
    extractor, waveform, _, f0 = _hear(audio, feature_extractor)
    rate, hop = extractor.sampling_rate, extractor.hop_length
    window = round(0.04 * rate)
    padded = np.pad(waveform, (0, max(0, window + 1 - len(waveform))))  # mirrored at its ends, which takes that many
    decibels = spectrogram(
        padded,
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
    axis.set_ylim(0.0, min(max_frequency, rate / 2))
    axis.set_xlim(0.0, len(waveform) / rate)
    axis.set_xlabel("time (s)")
    axis.set_ylabel("frequency (Hz)")
    axis.legend(loc="upper right", framealpha=0.95)
    if words:
        _write_words_above(axis, words, len(waveform) / rate, "0.4")
    if not f0.any():
        axis.text(0.5, 0.9, "no voiced frame", ha="center", transform=axis.transAxes)
    _set_title(figure, title)
    return figure


def plot_angles(model, input_features, theta_mode: str | None = None, title: str | None = None):
    """Rotary angles of the first four channel pairs of the encoder: standard (thick; even pairs solid, odd ones dashed)
    against F0-adapted (thin), what lies between the two, and the F0 that did it.

    Angles are drawn unwound where no pair turns by more than half a circle a frame. Otherwise they are drawn modulo
    2 pi, with the shortest way between standard and adapted, since how often they went round can then not be told. At
    the first frame the two are made the same: what is added to all angles alike means nothing to attention.

    Args:
        model: an Echo model with an encoder.
        input_features (`torch.Tensor` of shape `(T, channels)` or `(1, T, channels)`): of [`EchoFeatureExtractor`],
            with pitch, one utterance without padding.
        theta_mode (`str`, *optional*): one of `"mean"`, `"frame"`, `"phase"` (or `"none"`: no difference); the model's
            own if not given.
        title (`str`, *optional*): put above the picture.

    Returns:
        `matplotlib.figure.Figure`: with three axes: angles (rad), differences (rad) and F0 (Hz) over time (s).

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: the features are not one utterance with pitch, or the mode is not known.
    """
    from matplotlib.lines import Line2D

    figure = _new_figure(9, 7.5)
    encoder, f0, mean_f0, seconds = _encode_f0(model, input_features)
    theta_mode = _check_mode(theta_mode or encoder.config.theta_mode)
    unwound = _fastest_turn(encoder, f0) < np.pi
    standard = _angles(encoder, f0, mean_f0, "none", unwound)[:, :ROTARY_PAIRS]
    adapted = _angles(encoder, f0, mean_f0, theta_mode, unwound)[:, :ROTARY_PAIRS]
    difference = adapted - standard
    difference -= difference[:1]
    if not unwound:
        difference = (difference + np.pi) % (2 * np.pi) - np.pi
    difference[np.abs(difference) < ROUNDING] = 0.0
    adapted = standard + difference if unwound else (standard + difference) % (2 * np.pi)
    times = np.arange(len(f0)) * seconds
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(2.2, 1.6, 1))
    colors = (BLACK, ORANGE, BLUE, PURPLE)
    for pair in range(standard.shape[1]):
        style, color = ("-", "--")[pair % 2], colors[pair % len(colors)]
        axes[0].plot(times, standard[:, pair], style, color=color, linewidth=4.5, alpha=0.45)
        axes[0].plot(times, adapted[:, pair], "-", color=color, linewidth=1.2)
        axes[1].plot(times, difference[:, pair], style, color=color, linewidth=1.6)
    handles = [
        Line2D([], [], linestyle=("-", "--")[pair % 2], color=colors[pair], linewidth=2.5, label=f"pair {pair}")
        for pair in range(standard.shape[1])
    ]
    handles += [
        Line2D([], [], color="0.3", linewidth=4.5, alpha=0.45, label="standard"),
        Line2D([], [], color="0.3", linewidth=1.2, label=f"F0-adapted ({theta_mode})"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    axes[0].set_ylabel("angle (rad)" if unwound else "angle modulo 2π (rad)")
    axes[1].set_ylabel("adapted − standard (rad)")
    axes[1].axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
    if np.abs(difference).max() < ROUNDING:
        axes[1].set_ylim(-1.0, 1.0)
        axes[1].text(0.5, 0.6, "F0 moves no angle", ha="center", transform=axes[1].transAxes)
    _draw_f0(axes[2], times, f0)
    axes[2].set_xlim(0.0, max(times[-1], seconds))
    _set_title(figure, title)
    figure.align_ylabels(axes)
    return figure


def plot_similarity(model, input_features, theta_modes: Sequence[str] = THETA_MODES, title: str | None = None):
    """How alike the rotary embedding makes two positions: the mean over channel pairs of `cos(angle_i - angle_j)`, the
    standard embedding beside the F0-adapted ones, and what F0 changes of it below.

    A bright diagonal: a position matches itself. Wide bands: far sight. Narrow bands: local.

    Args:
        model: an Echo model with an encoder; its own `theta_mode` does not matter.
        input_features (`torch.Tensor` of shape `(T, channels)` or `(1, T, channels)`): as in [`plot_angles`].
        theta_modes (`Sequence[str]`): of `"none"` (standard), `"mean"`, `"frame"` and `"phase"`: one column each.
        title (`str`, *optional*): put above the picture.

    Returns:
        `matplotlib.figure.Figure`: similarities in the upper row, at most 1, and in the lower row those less the
        standard ones; time in seconds both ways.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: the features are not one utterance with pitch, or a mode is not known.
    """
    if not theta_modes:
        raise ValueError(f"theta_modes: name at least one of {', '.join(THETA_MODES)}.")
    figure = _new_figure(3.0 * len(theta_modes) + 1.2, 6.4)
    encoder, f0, mean_f0, seconds = _encode_f0(model, input_features)
    similarities = [position_similarity(_angles(encoder, f0, mean_f0, _check_mode(mode))) for mode in theta_modes]
    standard = position_similarity(_angles(encoder, f0, mean_f0, "none"))
    differences = [similarity - standard for similarity in similarities]
    largest = max(max(np.abs(difference).max() for difference in differences), 1e-3)
    lowest = min(similarity.min() for similarity in similarities)
    axes = figure.subplots(2, len(theta_modes), sharex=True, sharey=True, squeeze=False)
    extent = (0.0, len(f0) * seconds, 0.0, len(f0) * seconds)
    for column, mode in enumerate(theta_modes):
        upper = axes[0, column].imshow(
            similarities[column],
            origin="lower",
            cmap="cividis",
            vmin=lowest,
            vmax=1,
            extent=extent,
            interpolation="nearest",
        )
        lower = axes[1, column].imshow(
            differences[column],
            origin="lower",
            cmap="PuOr",
            vmin=-largest,
            vmax=largest,
            extent=extent,
            interpolation="nearest",
        )
        axes[0, column].set_title("standard (none)" if mode == "none" else mode)
        if np.abs(differences[column]).max() < ROUNDING:
            axes[1, column].text(0.5, 0.5, "no difference", ha="center", transform=axes[1, column].transAxes)
        axes[1, column].set_xlabel("time j (s)")
    for row in axes:
        row[0].set_ylabel("time i (s)")
    figure.colorbar(upper, ax=axes[0], label="similarity", pad=0.01)
    figure.colorbar(lower, ax=axes[1], label="less the standard's", pad=0.01)
    _set_title(figure, title)
    return figure


def position_similarity(angles: np.ndarray) -> np.ndarray:
    """Mean over channel pairs of `cos(angle_i - angle_j)`, `(S, C)` to `(S, S)`; 1 on the diagonal."""
    turned = np.exp(1j * np.asarray(angles, dtype=np.float64))
    return (turned @ turned.conj().T).real / turned.shape[1]


def plot_pitch_bias(
    model,
    input_features,
    strength: float | None = None,
    layer: int | None = None,
    head: int | None = None,
    title: str | None = None,
):
    """What the pitch bias adds to the score of frame i looking at frame j, both forms side by side, over the F0 they
    compare: laplacian `exp(-|f_i - f_j|)` and gaussian `-s * (f_i - f_j) ** 2`, f the standardized F0
    (the laplacian's by n - 1, as published).

    Args:
        model: an Echo model with an encoder, with whatever pitch bias.
        input_features (`torch.Tensor` of shape `(T, channels)` or `(1, T, channels)`): as in [`plot_angles`].
        strength (`float`, *optional*): s of the gaussian. If not given: the one that `layer` and `head` have learned,
            or 1 if the model has no gaussian bias. A negative one was learned to keep frames of similar pitch apart.
        layer, head (`int`, *optional*): whose strength, counted from 0; the strongest if neither is given.
        title (`str`, *optional*): put above the picture.

    Returns:
        `matplotlib.figure.Figure`: laplacian, gaussian, and F0 (Hz) below each; time in seconds.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: the features are not one utterance with pitch; or there is no such layer or head, or no strength
            was learned.
    """
    import torch

    from .modeling_echo import laplacian_bias
    from .modeling_echo import standardize_f0

    figure = _new_figure(10, 6.6)
    encoder, f0, _, seconds = _encode_f0(model, input_features)
    described = f"s = {strength:.3g}, given" if strength is not None else ""
    if strength is None:
        learned = _learned_strengths(encoder)
        if learned is None:
            if layer is not None or head is not None:
                raise ValueError(f"The model's pitch_bias is {encoder.config.pitch_bias!r}: no layer has a strength.")
            strength, described = 1.0, "s = 1"
        else:
            layers, heads = learned.shape
            if not -layers <= (layer or 0) < layers or not -heads <= (head or 0) < heads:
                raise ValueError(
                    f"layer {layer}, head {head}: the encoder has {layers} layers with {heads} heads each."
                )
            chosen = np.full(learned.shape, np.nan)
            within = (slice(None) if layer is None else layer, slice(None) if head is None else head)
            chosen[within] = np.abs(learned[within])
            layer, head = np.unravel_index(np.nanargmax(chosen), chosen.shape)
            strength = float(learned[layer, head])
            described = f"s = {strength:.3g}, learned by layer {layer}, head {head}"
    f0_tensor = torch.from_numpy(f0)[None]
    f = standardize_f0(f0_tensor, torch.ones_like(f0_tensor))[0].numpy()
    distance = np.abs(f[:, None] - f[None, :])
    laplacian = laplacian_bias(f0_tensor, torch.ones_like(f0_tensor))[0, 0].numpy()
    times = (np.arange(len(f0)) + 0.5) * seconds
    duration = len(f0) * seconds
    axes = figure.subplots(2, 2, sharex=True, height_ratios=(4, 1))
    # What has the value 0 changes nothing; a gaussian is below it, or above it if s is negative.
    largest = float(abs(strength) * np.square(distance).max()) or 1.0
    low, high = (-largest, 0.0) if strength >= 0 else (0.0, largest)
    for axis, matrix, name, limits in (
        (axes[0, 0], laplacian, "laplacian", (0.0, 1.0)),
        (axes[0, 1], -strength * np.square(distance), f"gaussian ({described})", (low, high)),
    ):
        image = axis.imshow(
            matrix,
            origin="lower",
            cmap="cividis",
            vmin=limits[0],
            vmax=limits[1],
            extent=(0.0, duration, 0.0, duration),
            interpolation="nearest",
            aspect="auto",
        )
        axis.set_title(name, fontsize="medium")
        figure.colorbar(image, ax=axis, label="added to the score", pad=0.02)
    axes[0, 0].set_ylabel("time i, who looks (s)")
    for axis in axes[1]:
        _draw_f0(axis, times, f0)
        axis.set_xlabel("time j, looked at (s)")
    axes[1, 0].set_xlim(0.0, duration)
    _set_title(figure, title)
    return figure


def plot_alignment(
    model,
    input_features,
    tokenizer,
    text: str | None = None,
    words: Sequence[Mapping[str, Any]] | None = None,
    title: str | None = None,
):
    """Where the decoder looks as it writes: cross-attention of each token over the encoder's frames, the mean of all
    heads and layers, the brightest frame of each token marked.

    Args:
        model ([`EchoForConditionalGeneration`]): the model.
        input_features (`torch.Tensor` of shape `(T, channels)` or `(1, T, channels)`): one utterance without padding.
        tokenizer ([`EchoTokenizer`]): the model's.
        text (`str`, *optional*): what the decoder is made to write; what it writes by itself if not given.
        words (`Sequence[Mapping]`, *optional*): as in [`plot_utterance`]; written above.
        title (`str`, *optional*): put above the picture.

    Returns:
        `matplotlib.figure.Figure`: tokens from top to bottom by time in seconds.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: the features are not one utterance, the model has no decoder, or no token was written.
    """
    import torch

    from .modeling_echo import mean_cross_attention

    _new_figure(1, 1)  # so that a missing matplotlib is told before the model runs
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} has no decoder, and so no cross-attention to draw.")
    features = _one_utterance(model, input_features)
    config = model.config
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if text is None:
                ids = model.generate(input_features=features)[0].tolist()
                ids = ids[1:] if ids[0] == config.decoder_start_token_id else ids
            else:
                ids = [token for token in tokenizer(text)["input_ids"] if token != config.bos_token_id]
            if not [token for token in ids if token not in tokenizer.all_special_ids]:
                raise ValueError("The model wrote nothing for this utterance; give a text to align.")
            inputs = torch.tensor([[config.decoder_start_token_id, *ids[:-1]]], device=features.device)
            weights = mean_cross_attention(model, inputs, input_features=features)[0].cpu().numpy()  # (L, S)
    finally:
        model.train(was_training)
    seconds = config.inputs_to_logits_ratio / config.sampling_rate
    duration = weights.shape[1] * seconds
    labels = [_show_token(tokenizer, token) for token in ids]
    figure = _new_figure(9, min(max(3.0, 1.3 + 0.17 * len(ids) + (0.5 if words else 0.0)), 40.0))
    axis = figure.subplots()
    # Each row by its own brightest: a token that looks far around would otherwise be dark all over.
    image = axis.imshow(
        weights / weights.max(axis=1, keepdims=True),
        aspect="auto",
        cmap="cividis",
        vmin=0.0,
        vmax=1.0,
        extent=(0.0, duration, len(ids) - 0.5, -0.5),
        interpolation="nearest",
    )
    figure.colorbar(image, ax=axis, label="share of the token's largest", pad=0.01)
    axis.plot(
        (weights.argmax(axis=1) + 0.5) * seconds,
        np.arange(len(ids)),
        "o",
        color=VERMILLION,
        markeredgecolor="white",
        markersize=4,
        markeredgewidth=0.5,
        label="where a token looks most",
    )
    axis.set_yticks(np.arange(len(ids)), labels, fontsize=8)
    axis.set_ylabel("token")
    axis.set_xlabel("time (s)")
    figure.legend(loc="outside lower center", fontsize="small")
    if words:
        _write_words_above(axis, words, duration, "white")
    _set_title(figure, title)
    return figure


def plot_learning_curves(log_history: str | PathLike | Iterable[Mapping[str, Any]], title: str | None = None):
    """Losses of a training run over its steps, and the word error rate on an axis of its own at the right.

    Args:
        log_history: `trainer.state.log_history`, or path of a `trainer_state.json`, or of the folder it lies in.
        title (`str`, *optional*): put above the picture.

    Returns:
        `matplotlib.figure.Figure`: with one axes for losses, and a second for the word error rate in percent if the log
        has one.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: there is no log, or it holds no loss and no word error rate.
    """
    figure = _new_figure(9, 5)
    if isinstance(log_history, str | PathLike):
        log_history = read_log_history(log_history)
    log_history = list(log_history)
    axis = figure.subplots()
    handles = []
    # key in the log, label, colour, line, marker
    for key, label, color, style, marker in (
        ("loss", "training loss", BLUE, "-", ""),
        ("eval_loss", "evaluation loss", ORANGE, "-", "o"),
    ):
        handles += _draw_log(axis, log_history, key, 1.0, color=color, linestyle=style, marker=marker, label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats a token)")
    _start_at_zero(axis)
    axis.grid(color="0.9")
    if any(isinstance(entry.get("eval_wer"), int | float) for entry in log_history):
        right = axis.twinx()
        handles += _draw_log(
            right,
            log_history,
            "eval_wer",
            100.0,
            color=VERMILLION,
            linestyle="-.",
            marker="s",
            label="word error rate (right)",
        )
        right.set_ylabel("word error rate (%)", color=VERMILLION)
        right.tick_params(axis="y", colors=VERMILLION)
        _start_at_zero(right)
    if not handles:
        raise ValueError("log_history holds neither a loss nor a word error rate: was anything trained?")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), fontsize="small")
    _set_title(figure, title)
    return figure


def read_log_history(path: str | PathLike) -> list[dict[str, Any]]:
    """The `log_history` of a `trainer_state.json`, which is named or lies in the folder that is named.

    Raises:
        `ValueError`: there is none.
    """
    path = Path(path)
    file = path / "trainer_state.json" if path.is_dir() else path
    try:
        return json.loads(file.read_text(encoding="utf-8"))["log_history"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no log of a training run ({error}); name a trainer_state.json or the folder of a run."
        ) from error


def _new_figure(width: float, height: float):
    """An empty figure of that size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'Pictures need matplotlib ({error}): `pip install ".[plot]"` in the clone.') from error
    return Figure(figsize=(width, height), layout="constrained")


def _hear(audio, extractor: EchoFeatureExtractor | None):
    """The extractor, the waveform `(samples,)` at its rate, the features `(T, channels)` and F0 `(T,)` in Hz."""
    extractor = extractor if extractor is not None else EchoFeatureExtractor()
    if "pitch" not in extractor.feature_groups:
        raise ValueError("feature_extractor: its feature_groups have no 'pitch' to draw.")
    waveform = extractor._read(audio, "audio", extractor.sampling_rate, resample=True)
    check_length(len(waveform) / extractor.sampling_rate)
    features = extractor(waveform, sampling_rate=extractor.sampling_rate)["input_features"][0]
    return extractor, waveform, features, features[:, -1]


def check_length(seconds: float) -> None:
    """Raises `ValueError` for audio that lasts longer than `LONGEST_PICTURE`."""
    if seconds > LONGEST_PICTURE:
        raise ValueError(
            f"A picture shows at most {LONGEST_PICTURE} s, and the audio lasts {seconds:.0f} s; cut out a part of it."
        )


def _set_title(figure, title: str | None) -> None:
    if title is not None:
        figure.suptitle(title)


def _check_words(words: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    for word in words:
        times = word.get("timestamp") or ()
        if "text" not in word or len(times) != 2 or any(time is None for time in times):
            raise ValueError(f"words: {dict(word)} must have a text and a timestamp of start and end in seconds.")
    return words


def _write_words(axis, words: Sequence[Mapping[str, Any]], duration: float) -> None:
    """Words at their times near an axis' lower edge, in rows if they would run into each other."""
    place = axis.get_xaxis_transform()
    letter = duration / 95  # width of a letter of this size, seconds
    ends = [0.0, 0.0, 0.0]  # where the writing of each row ends
    for word in _check_words(words):
        (start, end), text = word["timestamp"], word["text"].strip()
        middle, half = (start + end) / 2, 0.5 * len(text) * letter
        row = next((row for row, taken in enumerate(ends) if taken <= middle - half), int(np.argmin(ends)))
        ends[row] = middle + half + letter
        y = 0.27 - 0.12 * row
        axis.plot((start, end), (y - 0.02, y - 0.02), "|-", color=VERMILLION, linewidth=1.5, transform=place)
        axis.text(middle, y, text, ha="center", va="bottom", fontsize=8, transform=place, clip_on=True)


def _write_words_above(axis, words: Sequence[Mapping[str, Any]], duration: float, color: str) -> None:
    """Words at their middles above an axis, with dotted lines of that colour where each starts and ends."""
    middles = [min(sum(word["timestamp"]) / 2, duration) for word in _check_words(words)]
    top = axis.secondary_xaxis("top")
    top.set_xticks(middles, [word["text"].strip() for word in words], fontsize=8, rotation=30, ha="left")
    for word in words:
        for time in word["timestamp"]:
            axis.axvline(time, color=color, linewidth=0.8, linestyle=":")
    axis.set_xlim(0.0, duration)


def _draw_f0(axis, times: np.ndarray, f0: np.ndarray) -> None:
    axis.plot(times, np.where(f0 > 0, f0, np.nan), ".", color=VERMILLION, markersize=4)
    axis.set_ylabel("F0 (Hz)")
    axis.set_xlabel("time (s)")
    if not f0.any():
        axis.set_yticks([])
        axis.text(0.5, 0.5, "no voiced frame", ha="center", transform=axis.transAxes)


def _draw_log(axis, log_history: list[Mapping[str, Any]], key: str, scale: float, **style) -> list:
    points = [(entry["step"], entry[key] * scale) for entry in log_history if isinstance(entry.get(key), int | float)]
    return axis.plot(*zip(*points), markersize=4, **style) if points else []


def _start_at_zero(axis) -> None:
    """The vertical axis from 0, with room above for whole markers, which may be large values close to each other."""
    highest = max((max(line.get_ydata()) for line in axis.lines), default=0.0)
    axis.set_ylim(0.0, 1.05 * highest if highest > 0 else 1.0)


def _show_token(tokenizer, token: int) -> str:
    """A token as a label: a space is seen, and bytes that are no whole character stand as such."""
    if token in tokenizer.all_special_ids:
        return tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token])
    if "\N{REPLACEMENT CHARACTER}" in text:
        return f"<{token}>"
    # Mathtext would read a dollar sign.
    return text.replace(" ", "␣").replace("\n", "⏎").replace("$", r"\$")


def _one_utterance(model, input_features):
    """Features of one utterance, `(1, T, channels)`, where the model is and as it is."""
    import torch

    features = torch.as_tensor(input_features)
    features = features[None] if features.dim() == 2 else features
    if features.dim() != 3 or features.shape[0] != 1:
        raise ValueError(
            "input_features must be one utterance of shape (frames, channels) or (1, frames, channels), got"
            f" {tuple(features.shape)}."
        )
    check_length(features.shape[1] * model.config.frame_seconds)
    return features.to(model.device, torch.float32)


def _encode_f0(model, input_features):
    """The encoder, F0 in Hz at its frames `(S,)`, the mean F0 of the input frames, and the seconds from one frame of
    the encoder to the next."""
    import torch

    from .diagnostics import find_module
    from .modeling_echo import align_f0

    encoder = find_module(model, "EchoEncoder")
    if encoder is None:
        raise ValueError(f"{type(model).__name__} is no Echo model with an encoder.")
    if "pitch" not in encoder.config.feature_groups:
        raise ValueError("The model's feature_groups have no 'pitch', and so nothing to adapt to.")
    frame_f0 = _one_utterance(model, input_features)[..., -1].cpu()
    length = torch.tensor([frame_f0.shape[1]])
    encoder_length = encoder._get_feat_extract_output_lengths(length)
    f0 = align_f0(frame_f0, length, encoder_length, int(encoder_length))
    config = encoder.config
    mean_f0 = float(frame_f0.double().mean())
    return encoder, f0[0].double().numpy(), mean_f0, config.inputs_to_logits_ratio / config.sampling_rate


def _check_mode(theta_mode: str) -> str:
    if theta_mode not in THETA_MODES:
        raise ValueError(f"theta_mode must be one of {', '.join(THETA_MODES)}, got {theta_mode!r}.")
    return theta_mode


def _rotary(encoder, theta_mode: str):
    """The encoder's rotary embedding, on the CPU, as it would be in that mode; a new one, so that nothing changes."""
    import torch

    own = encoder.rotary_emb
    rotary = type(own)(own.config, own.head_dim, theta_mode)
    with torch.no_grad():
        for name, parameter in rotary.named_parameters():
            parameter.copy_(own.get_parameter(name))
    return rotary.requires_grad_(False)


def _angles(encoder, f0: np.ndarray, mean_f0: float, theta_mode: str, unwound: bool = False) -> np.ndarray:
    """Angles, `(S, C)`, float64: in [0, 2 pi), or unwound, which is right where no pair turns by pi or more a frame."""
    import torch

    rotary, f0_tensor = _rotary(encoder, theta_mode), torch.from_numpy(f0)[None]
    mean = torch.tensor([[mean_f0]], dtype=torch.float64)
    positions = torch.arange(len(f0))[None]
    if unwound and theta_mode != "phase":
        # Theirs is the position times the angle at position 1; it may jump by any number of turns with F0.
        turns = rotary.angles(torch.ones_like(positions), f0_tensor, mean)
        return (positions[..., None] * turns)[0].numpy()
    angles = rotary.angles(positions, f0_tensor, mean)[0].numpy()
    return np.unwrap(angles, axis=0) if unwound else angles


def _fastest_turn(encoder, f0: np.ndarray) -> float:
    """How far the fastest of the drawn pairs turns in a frame at most, in rad."""
    import torch

    rotary = _rotary(encoder, "none")
    theta = rotary.theta(torch.device("cpu"), None, None)
    return float(rotary.frequencies(theta + float(f0.max()))[..., :ROTARY_PAIRS].max())


def _learned_strengths(encoder) -> np.ndarray | None:
    """Strength of the gaussian bias, `(layers, heads)`, or None if the model has none."""
    import torch

    if encoder.config.pitch_bias != "gaussian":
        return None
    strengths = [layer.self_attn.bias_strength.detach().float().cpu() for layer in encoder.layers]
    return torch.stack(strengths).numpy()


__all__ = [
    "plot_alignment",
    "plot_angles",
    "plot_learning_curves",
    "plot_pitch",
    "plot_pitch_bias",
    "plot_similarity",
    "plot_utterance",
    "position_similarity",
    "read_log_history",
]

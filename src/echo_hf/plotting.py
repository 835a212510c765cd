"""Pictures of what Echo hears. Needs matplotlib: `pip install "echo-hf[plot]"`."""

import numpy as np

from .feature_extraction_echo import EchoFeatureExtractor

# Of the colour-blind safe palette of Okabe and Ito (https://jfly.uni-koeln.de/color/).
BLUE, ORANGE, SKY = "#0072B2", "#E69F00", "#56B4E9"


def plot_utterance(audio, feature_extractor: EchoFeatureExtractor | None = None, title: str | None = None):
    """Waveform, log-mel spectrogram and F0 of one utterance on one time axis, voiced stretches shaded.

    Args:
        audio: what [`EchoFeatureExtractor`] takes as one utterance; another sampling rate than its own is resampled.
        feature_extractor ([`EchoFeatureExtractor`], *optional*): the default one if not given. Its features must hold
            the pitch.
        title (`str`, *optional*): put above the picture.

    Returns:
        `matplotlib.figure.Figure`: with three axes, in the order above; time in seconds.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: the extractor has no pitch, or the audio cannot be used.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'Pictures need matplotlib ({error}): `pip install "echo-hf[plot]"`.') from error
    extractor = feature_extractor if feature_extractor is not None else EchoFeatureExtractor()
    if "pitch" not in extractor.feature_groups:
        raise ValueError("feature_extractor: its feature_groups have no 'pitch' to draw.")
    waveform = extractor._read(audio, "audio", extractor.sampling_rate, resample=True)
    features = extractor(waveform, sampling_rate=extractor.sampling_rate)["input_features"][0]
    num_mels = extractor.feature_groups["spectrogram"]
    f0 = features[:, -1]
    frame = extractor.hop_length / extractor.sampling_rate  # seconds
    times = np.arange(len(features)) * frame
    duration = len(waveform) / extractor.sampling_rate

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.6, 1.2))
    axes[0].plot(np.arange(len(waveform)) / extractor.sampling_rate, waveform, color=BLUE, linewidth=0.5)
    axes[0].set_ylabel("amplitude")
    image = axes[1].imshow(
        features[:, :num_mels].T * 40.0,  # a unit is 4 decades of power
        origin="lower",
        aspect="auto",
        cmap="cividis",
        extent=(0.0, duration, 0, num_mels),
    )
    axes[1].set_ylabel("mel channel")
    figure.colorbar(image, ax=axes[1], label="dB above floor", pad=0.01)
    axes[2].plot(times, np.where(f0 > 0, f0, np.nan), ".", color=ORANGE, markersize=4, label="F0")
    axes[2].set_ylabel("F0 (Hz)")
    axes[2].set_xlabel("time (s)")
    axes[2].set_xlim(0.0, duration)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], (f0 > 0).astype(int), [0]))))
    for i, (start, end) in enumerate(edges.reshape(-1, 2)):
        for axis in (axes[0], axes[2]):
            label = "voiced" if i == 0 and axis is axes[2] else None
            axis.axvspan(start * frame, end * frame, color=SKY, alpha=0.25, linewidth=0, label=label)
    if f0.any():
        axes[2].legend(loc="upper right")
    else:
        axes[2].text(duration / 2, 0.5, "no voiced frame", ha="center", transform=axes[2].get_xaxis_transform())
    if title is not None:
        figure.suptitle(title)
    return figure

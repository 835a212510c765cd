"""Pictures: what is drawn is what was heard."""

import numpy as np
import pytest

from echo_hf import EchoFeatureExtractor
from echo_hf.plotting import plot_utterance


def test_utterance_shows_waveform_spectrogram_and_f0(tmp_path):
    time = np.arange(16000) / 16000
    tone = sum(np.sin(2 * np.pi * 220 * k * time) / k for k in range(1, 6)) * 0.1
    tone[:4800] = 0.0
    figure = plot_utterance(tone, title="a tone")
    waveform, spectrogram, pitch = figure.axes[:3]
    assert waveform.get_ylabel() and spectrogram.get_ylabel() and "Hz" in pitch.get_ylabel()
    assert "s" in pitch.get_xlabel()
    drawn = pitch.lines[0].get_ydata()
    assert np.nanmedian(drawn) == pytest.approx(220, rel=0.01)
    assert np.isnan(drawn[:25]).all()
    assert spectrogram.images[0].get_array().shape == (80, 100)
    assert len(waveform.patches) == 1  # one voiced stretch
    for kind in ("png", "svg", "pdf"):
        figure.savefig(tmp_path / f"tone.{kind}")
        assert (tmp_path / f"tone.{kind}").stat().st_size > 1000


def test_silence_says_so():
    pitch = plot_utterance(np.zeros(8000)).axes[2]
    assert pitch.texts[0].get_text() == "no voiced frame"


def test_an_extractor_without_pitch_is_refused():
    with pytest.raises(ValueError, match="pitch"):
        plot_utterance(np.zeros(8000), EchoFeatureExtractor(feature_groups={"spectrogram": 80}))

"""Pictures: what is drawn is what was heard, and what the model itself computes."""

import inspect

import numpy as np
import pytest
import soundfile
import torch

from conftest import voice
from echo_hf import EchoConfig, EchoFeatureExtractor, EchoForConditionalGeneration, EchoModel
from echo_hf.analysis import plotting
from echo_hf.analysis.plotting import (
    plot_angles,
    plot_pitch,
    plot_pitch_bias,
    plot_similarity,
    position_similarity,
)
from echo_hf.cli import main

WORDS = [{"text": "so", "timestamp": (0.1, 0.4)}, {"text": "long", "timestamp": (0.4, 0.9)}]


def tiny_model(model_class=EchoForConditionalGeneration, **overrides):
    torch.manual_seed(0)
    settings = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1, "max_target_positions": 16}
    return model_class(EchoConfig.from_preset("all", size="2m", **{**settings, **overrides})).eval()


@pytest.fixture(scope="module")
def features():
    """(1, 120, 81): 1.2 s, of which the last 0.2 s are silent."""
    waveform = np.concatenate((voice(1.0, f0=180.0), np.zeros(3200, dtype=np.float32)))
    return EchoFeatureExtractor()(waveform, sampling_rate=16000, return_tensors="pt")["input_features"]


def test_words_stand_at_their_times():
    axis = plot_pitch(voice(1.0), words=[*WORDS, {"text": " late ", "timestamp": (0.9, 1.2)}]).axes[0]
    top = axis.child_axes[0]
    assert [label.get_text() for label in top.get_xticklabels()] == ["so", "long", "late"]
    assert top.get_xticks() == pytest.approx([0.25, 0.65, 1.0])  # no further than the audio
    with pytest.raises(ValueError, match="timestamp"):
        plot_pitch(voice(1.0), words=[{"text": "when", "timestamp": (0.1, None)}])


def test_audio_too_long_for_a_picture_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(EchoFeatureExtractor, "__call__", lambda *_, **__: pytest.fail("features were computed"))
    with pytest.raises(ValueError, match="at most 120 s, and the audio lasts 3600 s"):
        plot_pitch(np.zeros(3600 * 16000, np.float32))
    with pytest.raises(ValueError, match="at most 120 s"):
        plot_similarity(EchoModel(EchoConfig.from_preset("all", size="2m")), torch.zeros(1, 12100, 81))


def test_silence_says_so():
    assert plot_pitch(np.zeros(8000)).axes[0].texts[0].get_text() == "no voiced frame"


def test_an_extractor_without_pitch_is_refused():
    with pytest.raises(ValueError, match="pitch"):
        plot_pitch(np.zeros(8000), EchoFeatureExtractor(feature_groups={"spectrogram": 80}))


def test_f0_lies_on_the_ridges_of_the_spectrogram():
    axis = plot_pitch(voice(1.0, f0=200.0)).axes[0]
    image = axis.images[0]
    *harmonics, first = (line.get_ydata() for line in axis.lines)
    assert len(harmonics) == 4 and np.nanmedian(first) == pytest.approx(200, rel=0.01)
    for number, harmonic in enumerate(harmonics, 2):
        assert np.allclose(harmonic, number * first, equal_nan=True)
    left, right, bottom, top = image.get_extent()
    decibels = np.asarray(image.get_array())
    frequencies = np.linspace(bottom, top, len(decibels))
    times = axis.lines[-1].get_xdata()
    columns = np.linspace(left, right, decibels.shape[1], endpoint=False) + (right - left) / decibels.shape[1] / 2
    for t in (30, 50, 70):
        assert columns[t] == pytest.approx(times[t], abs=1e-6)
        ridge = frequencies[decibels[:, t].argmax()]
        assert ridge == pytest.approx(first[t], abs=15)


def test_angles_are_the_models_own(features):
    model = tiny_model(theta_mode="phase", rotary_theta=100.0)
    with torch.no_grad():
        outputs = model.model.encoder(features)
        own = model.model.encoder.rotary_emb.angles(
            torch.arange(outputs.f0.shape[1])[None], outputs.f0, outputs.attention_mask
        )[0].numpy()
    angles, differences, f0 = plot_angles(model, features).axes[:3]
    for pair in range(4):
        thick, thin = angles.lines[2 * pair], angles.lines[2 * pair + 1]
        assert thick.get_linewidth() > thin.get_linewidth()
        assert thick.get_linestyle() == ("-" if pair % 2 == 0 else "--")
        # Drawn from 0 on, which is what matters to attention.
        expected = np.exp(1j * (own[:, pair] - own[0, pair]))
        assert np.abs(np.exp(1j * thin.get_ydata()) - expected).max() < 1e-5
        steps = np.diff(thick.get_ydata())
        assert np.allclose(steps, 100.0 ** (-2 * pair / 36))  # a head of 36 channels
    assert np.allclose(np.nan_to_num(f0.lines[0].get_ydata()), outputs.f0[0])
    assert np.abs(differences.lines[2].get_ydata()).max() > 0.1


def test_an_unknown_mode_is_refused(features):
    with pytest.raises(ValueError, match="theta_mode must be one of none, mean, .*'sideways'"):
        plot_angles(tiny_model(), features, "sideways")


def test_mean_angles_are_by_the_mean_of_the_input_frames(features):
    model = tiny_model(theta_mode="mean", rotary_theta=100.0)
    angles = plot_angles(model, features).axes[0]
    theta = 100.0 + features[..., -1].double().mean().item()
    for pair in range(4):
        assert np.allclose(np.diff(angles.lines[2 * pair + 1].get_ydata()), theta ** (-2 * pair / 36))


def test_unwound_angles_of_frame_mode_are_position_times_frequency(features):
    """Where F0 ends, an angle may jump by more than half a circle, and is then the standard one again."""
    figure = plot_angles(tiny_model(rotary_theta=20.0), features.repeat(1, 4, 1), theta_mode="frame")
    difference, f0 = figure.axes[1].lines[3].get_ydata(), np.nan_to_num(figure.axes[2].lines[0].get_ydata())
    expected = np.arange(120) * ((20.0 + f0) ** (-6 / 36) - 20.0 ** (-6 / 36))
    assert np.abs(np.diff(expected)).max() > np.pi
    assert np.allclose(difference, expected, atol=1e-9)


def test_angles_that_no_eye_can_follow_are_drawn_modulo_two_pi(features):
    model = tiny_model(rotary_frequencies="mel", rotary_theta=50000.0, theta_mode="frame")
    axis = plot_angles(model, features).axes[0]
    assert "modulo" in axis.get_ylabel()
    drawn = np.concatenate([line.get_ydata() for line in axis.lines])
    assert drawn.min() >= 0 and drawn.max() <= 2 * np.pi


def test_silence_moves_no_angle():
    extractor = EchoFeatureExtractor()
    silence = extractor(np.zeros(16000), sampling_rate=16000)["input_features"][0]
    axes = plot_angles(tiny_model(), silence).axes
    assert [text.get_text() for text in axes[1].texts] == ["F0 moves no angle"]


def test_position_similarity_of_known_angles():
    similarity = position_similarity(np.array([[0.0, 0.0], [np.pi, np.pi / 2], [2 * np.pi, np.pi]]))
    assert np.allclose(similarity, [[1, -0.5, 0], [-0.5, 1, -0.5], [0, -0.5, 1]])


def test_similarities_of_each_mode_stand_beside_the_standard(features):
    figure = plot_similarity(tiny_model(rotary_theta=100.0), features)
    above, below = np.split(np.stack([axis.images[0].get_array() for axis in figure.axes[:10]]), 2)
    none, mean, frame, phase, contour = above
    for matrix in above:
        assert matrix.shape == (30, 30) and np.allclose(np.diag(matrix), 1) and np.allclose(matrix, matrix.T)
    # Standard and phase are relative where F0 is level: in the silence at the end it is. Frame mode is not.
    assert np.allclose(none[1:, 1:], none[:-1, :-1])
    assert np.allclose(phase[26:, 26:], none[26:, 26:])
    assert not np.allclose(frame[1:24, 1:24], frame[:23, :23], atol=1e-3)
    assert np.array_equal(contour, none)  # its gains start at 0
    assert np.allclose(below, above - none)


def test_similarities_show_the_contour_of_a_model_that_has_its_gains(features):
    model = tiny_model(theta_mode="contour")
    for gain, moves in ((0.0, False), (2.0, True)):
        with torch.no_grad():
            model.model.encoder.rotary_emb.contour_gain.fill_(gain)
        figure = plot_similarity(model, features)
        none, contour, difference = (np.asarray(figure.axes[place].images[0].get_array()) for place in (0, 4, 9))
        assert figure.axes[4].get_title() == "contour"
        assert np.allclose(difference, contour - none)
        assert (np.abs(difference).max() > 0.01) == moves


@pytest.mark.parametrize("form", ["gaussian", "laplacian"])
def test_pitch_bias_is_what_the_models_attention_adds(features, form):
    """With nothing else in the scores, attention is the softmax of the bias."""
    model = tiny_model(pitch_bias=form, silence_scaling=False, attn_implementation="eager")
    encoder = model.model.encoder
    with torch.no_grad():
        for layer in encoder.layers:
            layer.self_attn_norm.weight.zero_()
        if form == "gaussian":
            encoder.layers[0].self_attn.bias_strength.fill_(0.2)
            encoder.layers[1].self_attn.bias_strength.copy_(torch.tensor([0.1, 0.3, -0.7, 0.5]))
        attention = encoder(features, output_attentions=True).attentions[1][0, 2].numpy()
    laplacian, gaussian = plot_pitch_bias(model, features).axes[:2]
    if form == "gaussian":
        assert "layer 1, head 2" in gaussian.get_title() and "-0.7" in gaussian.get_title()
    drawn = np.asarray((gaussian if form == "gaussian" else laplacian).images[0].get_array())
    expected = np.exp(drawn) / np.exp(drawn).sum(-1, keepdims=True)
    assert np.allclose(attention, expected, atol=1e-5)


def test_pitch_bias_of_a_strength(features):
    model = tiny_model(pitch_bias="none")
    one, two = (
        np.asarray(plot_pitch_bias(model, features, strength=s).axes[1].images[0].get_array()) for s in (1.0, 2.0)
    )
    assert np.allclose(two, 2 * one) and one.max() <= 0


def test_a_picture_is_of_one_utterance(features):
    with pytest.raises(ValueError, match="one utterance"):
        plot_angles(tiny_model(), features.repeat(2, 1, 1))
    assert len(plot_angles(tiny_model(), features[0]).axes) == 3


# The command line


@pytest.mark.parametrize("kind", ["pitch", "angles", "similarity", "bias"])
def test_command_draws_the_bundled_recording(kind, tmp_path, capsys):
    output = tmp_path / "deep" / f"{kind}.svg"
    assert main(["plot", kind, "--output", str(output)]) == 0
    assert "<svg" in output.read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"{output}\n"


@pytest.mark.parametrize(
    ("kind", "options", "function", "expected"),
    [
        ("pitch", ["--title", "So"], "plot_pitch", {"title": "So", "words": None}),
        ("angles", ["--theta_mode", "mean"], "plot_angles", {"theta_mode": "mean", "title": None}),
        ("similarity", ["--title", "So"], "plot_similarity", {"title": "So"}),
        ("bias", ["--strength", "0.5"], "plot_pitch_bias", {"strength": 0.5, "title": None}),
    ],
)
def test_command_gives_its_options_to_what_draws(kind, options, function, expected, tmp_path, monkeypatch):
    given, draw = {}, getattr(plotting, function)

    def drawn(*args, **kwargs):
        given.update(inspect.signature(draw).bind(*args, **kwargs).arguments)
        return plotting.new_figure(1, 1)

    monkeypatch.setattr(plotting, function, drawn)
    assert main(["plot", kind, "--output", str(tmp_path / "picture.png"), *options]) == 0
    assert {name: given.get(name) for name in expected} == expected


def test_command_draws_words(tmp_path, ctc_checkpoint):
    arguments = ["plot", "pitch", "--words", "--checkpoint", str(ctc_checkpoint), "--title", "So long"]
    assert main([*arguments, "--output", str(tmp_path / "words.svg")]) == 0
    assert "<svg" in (tmp_path / "words.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pitch", "--output", "x.doc"], ".png, .svg, .pdf"),
        (["pitch", "nowhere.wav", "--output", "x.png"], "nowhere.wav"),
        (["pitch", "--theta_mode", "frame", "--output", "x.png"], "theta_mode"),
        (["pitch", "--strength", "0", "--output", "x.png"], "--strength does not apply"),
    ],
)
def test_command_says_what_it_cannot_draw(arguments, message, capsys):
    assert main(["plot", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_picture_is_of_no_more_than_two_minutes(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(plotting, "LONGEST_PICTURE", 1)
    path = tmp_path / "long.wav"
    soundfile.write(path, np.tile(voice(1.0), 2), 16000)
    arguments = ["plot", "angles", str(path), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.png")]
    assert main(arguments) == 1
    assert f"{path} is longer than 1 s" in capsys.readouterr().err and not (tmp_path / "x.png").exists()

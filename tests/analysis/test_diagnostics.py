"""Diagnostics: known answers, padding left out, and a model that is as it was."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from conftest import voice
from echo_hf import EchoConfig, EchoFeatureExtractor, EchoForConditionalGeneration, EchoForCTC
from echo_hf.analysis import diagnostics
from echo_hf.analysis.diagnostics import EchoDiagnostics, RunningStatistics
from echo_hf.cli import main
from echo_hf.modeling_echo import EchoEncoder

THETA = 1000.0


def tiny_model(model_class=EchoForConditionalGeneration, **overrides):
    torch.manual_seed(0)
    settings = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1, "rotary_theta": THETA}
    return model_class(EchoConfig.from_preset("all", size="2m", **{**settings, **overrides})).eval()


def made_up_features() -> torch.Tensor:
    """(1, 120, 81), 30 encoder frames: the first 10 voiced with 200 Hz, 10 unvoiced, 10 silent."""
    features = torch.rand(1, 120, 81, generator=torch.Generator().manual_seed(0)) + 0.6
    features[:, 80:] = 0.0
    features[..., -1] = 0.0
    features[:, :40, -1] = 200.0
    return features


def diagnose(model, **inputs) -> EchoDiagnostics:
    with EchoDiagnostics(model) as diagnostics, torch.no_grad():
        model(**inputs)
    return diagnostics


def diagnose_with_bounds(monkeypatch, diagnose_once) -> list[dict]:
    """Figures, and those with a threshold of sparsity that is a little lower and higher: a count at a threshold is
    within them however its values are rounded."""
    found = [diagnose_once()]
    for factor in (0.999, 1.001):
        with monkeypatch.context() as changed:
            changed.setattr(diagnostics, "SPARSITY_THRESHOLD", diagnostics.SPARSITY_THRESHOLD * factor)
            found.append(diagnose_once())
    return found


def assert_alike(one: dict, low: dict, high: dict, two: dict):
    """Equal but for rounding, counts exactly; sparsity between that of the lower threshold and that of the higher."""
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_alike(value, low[key], high[key], two[key])
        elif isinstance(value, list):
            for parts in zip(value, low[key], high[key], two[key], strict=True):
                assert_alike(*parts)
        elif key.endswith("sparsity"):
            assert low[key] <= two[key] <= high[key] and high[key] - low[key] < 5e-3
        elif key == "min":
            assert two[key] == pytest.approx(value, abs=1e-4)
        else:
            assert two[key] == pytest.approx(value, rel=1e-4), key


def test_running_statistics():
    statistics = RunningStatistics()
    assert statistics.to_dict() == {"mean": None, "min": None, "max": None, "count": 0}
    statistics.update(torch.tensor([[1.0, 5.0]]), torch.tensor([[True, False]]))
    statistics.update(torch.empty(0, 2))
    statistics.update(torch.tensor([3.0, 7.0], dtype=torch.bfloat16), torch.tensor([False, False]))
    assert statistics.to_dict() == {"mean": 4.0, "min": 1.0, "max": 7.0, "count": 4}
    assert statistics.sparsity == 0.25


def test_gate_that_opens_to_voice_alone():
    """Gates see only whether a frame is voiced: silu(2) there and 0 elsewhere, and the feed-forwards give nothing."""
    model = tiny_model(EchoForCTC)
    with torch.no_grad():
        for layer in model.model.encoder.layers:
            layer.mlp.gate_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.pitch_proj.weight.zero_()
            layer.mlp.pitch_proj.weight[:, 0] = 2.0
    figures = diagnose(model, input_features=made_up_features()).to_dict()
    opened = 2 / (1 + math.exp(-2))
    assert len(figures["layers"]) == 2
    for layer in figures["layers"]:
        assert layer["gate"] == pytest.approx(opened / 3) and layer["gate_sparsity"] == pytest.approx(2 / 3)
        assert layer["mlp"] == 0 and layer["mlp_sparsity"] == 1


def test_pitch_and_silence_of_known_features():
    model = tiny_model(EchoForCTC, theta_mode="phase", radius_mode="sigmoid")
    figures = diagnose(model, input_features=made_up_features()).to_dict()
    assert figures["theta"] == {"mean": pytest.approx(THETA + 200 / 3), "min": THETA, "max": THETA + 200, "count": 30}
    assert figures["radius"] == {"mean": pytest.approx((10 + 20 * 0.5) / 30), "min": 0.5, "max": 1.0, "count": 30}
    assert figures["f0"] == {"mean": 200.0, "min": 200.0, "max": 200.0, "count": 10}
    assert figures["frames"] == 30
    assert figures["voiced_share"] == figures["silent_share"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("mode", "least", "greatest"),
    [("none", 0, 0), ("mean", 200 / 3, 200 / 3), ("frame", 0, 200), ("phase", 0, 200)],
)
def test_theta_of_each_mode(mode, least, greatest):
    theta = diagnose(tiny_model(EchoForCTC, theta_mode=mode), input_features=made_up_features()).to_dict()["theta"]
    assert (theta["min"], theta["max"]) == (pytest.approx(THETA + least), pytest.approx(THETA + greatest))


def test_warp_of_a_contour_with_two_steps():
    model, features = tiny_model(EchoForCTC, theta_mode="contour"), made_up_features()
    voiced = (features[0, :, -1] > 0).nonzero().flatten()
    features[0, voiced[: len(voiced) // 2], -1] = 100.0  # and 200 Hz after it
    assert diagnose(model, input_features=features).to_dict()["warp"]["max"] == 0.0, "gains start at 0"
    with torch.no_grad():
        model.model.encoder.rotary_emb.contour_gain.fill_(1e3)
    warp = diagnose(model, input_features=features).to_dict()["warp"]
    assert (warp["min"], warp["max"]) == (-0.5, 0.5)
    assert warp["mean"] == pytest.approx(0.0, abs=1e-6), "as many frames above the mean as below"


def test_a_plain_model_has_no_silence_and_a_radius_of_one():
    torch.manual_seed(0)
    model = EchoForCTC(EchoConfig.from_preset("baseline", size="2m", encoder_num_hidden_layers=1)).eval()
    figures = diagnose(model, input_features=made_up_features()).to_dict()
    assert figures["silent_share"] is None
    assert figures["radius"]["min"] == figures["radius"]["max"] == 1.0


def test_gates_and_feed_forwards_are_what_passes_through_them():
    model, seen = tiny_model(EchoForCTC), {}
    mlp = model.model.encoder.layers[1].mlp
    mlp.activation.register_forward_hook(lambda module, inputs, output: seen.update(gate=output))
    mlp.register_forward_hook(lambda module, inputs, output: seen.update(mlp=output))
    layer = diagnose(model, input_features=made_up_features()).to_dict()["layers"][1]
    for name, states in seen.items():
        magnitudes = states[0].abs()
        assert layer[name] == pytest.approx(magnitudes.mean().item(), rel=1e-5)
        sparse = [row <= 0.1 * row.square().mean().sqrt() for row in magnitudes]
        assert layer[f"{name}_sparsity"] == pytest.approx(torch.stack(sparse).float().mean().item(), abs=1e-4)


def test_padding_does_not_enter(monkeypatch):
    extractor, model = EchoFeatureExtractor(), tiny_model()
    with torch.no_grad():
        model.model.encoder.rotary_emb.gain.fill_(1.0)
    voices = [voice(1.0, f0=180.0), voice(0.63, f0=110.0)]
    alone = [extractor(item, sampling_rate=16000, return_tensors="pt") for item in voices]
    labels = [torch.tensor([[40, 41, 42, 43, 2]]), torch.tensor([[50, 2]])]
    together = extractor(voices, sampling_rate=16000, return_tensors="pt", padding="max_length", max_length=130)
    for number in range(2):
        inputs = {**alone[number], "labels": labels[number]}
        single = diagnose_with_bounds(monkeypatch, lambda inputs=inputs: diagnose(model, **inputs).to_dict())
        row = {name: tensor[number : number + 1] for name, tensor in together.items()}
        padded_labels = torch.cat((labels[number], torch.full((1, 3), -100)), dim=1)
        assert_alike(*single, diagnose(model, **row, labels=padded_labels).to_dict())
    # A batch of both is the two one after the other.
    padded_labels = torch.cat((labels[1], torch.full((1, 3), -100)), dim=1)
    batch = diagnose(model, **together, labels=torch.cat((labels[0], padded_labels))).to_dict()

    def diagnose_one_by_one():
        one_by_one = EchoDiagnostics(model)
        for number in range(2):
            with one_by_one, torch.no_grad():
                model(**alone[number], labels=labels[number])
        return one_by_one.to_dict()

    assert_alike(*diagnose_with_bounds(monkeypatch, diagnose_one_by_one), batch)


def test_frames_of_padding_would_be_seen():
    """The test above can fail: padded frames do differ."""
    features = made_up_features()
    padded = nn.functional.pad(features, (0, 0, 0, 40))
    model = tiny_model(EchoForCTC)
    without_mask = diagnose(model, input_features=padded).to_dict()
    assert without_mask["frames"] == 40
    masked = diagnose(model, input_features=features).to_dict()
    assert without_mask["layers"][0]["mlp"] != pytest.approx(masked["layers"][0]["mlp"], rel=1e-3)


def test_model_computes_the_same_and_keeps_no_hook():
    model, inputs = tiny_model(), {"input_features": made_up_features(), "labels": torch.tensor([[40, 2]])}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    def hooks():
        return [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_with_kwargs)
            for module in model.modules()
        ]

    before, hooks_before = model(**inputs), hooks()
    diagnostics = EchoDiagnostics(model)
    assert hooks() == hooks_before  # none before the block
    with diagnostics:
        assert sum(hooks()) > sum(hooks_before)
        during = model(**inputs)
    assert hooks() == hooks_before
    for one, two in ((before, during), (before, model(**inputs))):
        assert torch.equal(one.logits, two.logits) and torch.equal(one.loss, two.loss)
    # Gradients too.
    gradients = []
    for outputs in (before, during):
        model.zero_grad()
        outputs.loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, two) for one, two in zip(*gradients))
    with pytest.raises(ZeroDivisionError), diagnostics:
        model(**inputs)
        raise ZeroDivisionError
    assert hooks() == hooks_before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_misuse_is_told():
    with pytest.raises(ValueError, match="no Echo encoder"):
        EchoDiagnostics(nn.Linear(1, 1))
    with (
        EchoDiagnostics(tiny_model(EchoForCTC)) as diagnostics,
        pytest.raises(RuntimeError, match="already"),
        diagnostics,
    ):
        pass


def test_table_has_all_figures():
    model = tiny_model(theta_mode="phase")
    diagnostics = diagnose(model, input_features=made_up_features(), labels=torch.tensor([[40, 2]]))
    table = diagnostics.table()
    for label in ("0", "1", "theta", "warp", "radius", "F0 (Hz)", "silent share"):
        assert any(line.startswith(label) for line in table.splitlines()), label
    assert "1067" in table  # mean theta
    assert "-" in EchoDiagnostics(tiny_model(EchoForCTC)).table()  # nothing seen yet


def test_command(checkpoint, ctc_checkpoint, capsys):
    for folder in (checkpoint, ctc_checkpoint):
        assert main(["diagnose", "--checkpoint", str(folder), "--json", "--batch_size", "3", "--device", "cpu"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert 250 < figures["frames"] < 350  # 12 s of bundled recordings
        assert 0.3 < figures["voiced_share"] < 0.9
        assert len(figures["layers"]) == EchoConfig.from_pretrained(folder).encoder_num_hidden_layers
    assert main(["diagnose", "--checkpoint", str(ctc_checkpoint), "--device", "cpu"]) == 0
    assert "|gate|" in capsys.readouterr().out


def test_command_cuts_long_recordings_and_names_broken_ones(ctc_checkpoint, tmp_path, capsys, monkeypatch):
    lengths, forward = [], EchoEncoder.forward

    def counting(self, input_features, *args, **kwargs):
        lengths.append(input_features.shape[1])
        return forward(self, input_features, *args, **kwargs)

    monkeypatch.setattr(EchoEncoder, "forward", counting)
    soundfile.write(tmp_path / "long.flac", np.tile(voice(1.0), 30), 16000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    options = ["--checkpoint", str(ctc_checkpoint), "--device", "cpu", "--json"]
    assert main(["diagnose", str(tmp_path), *options]) == 1
    assert "broken.wav" in capsys.readouterr().err
    lengths.clear()
    assert main(["diagnose", str(tmp_path), *options, "--skip_broken"]) == 0
    assert "broken.wav" in capsys.readouterr().err
    assert len(lengths) >= 1 and max(lengths) <= 2000  # of 3000 frames

"""The model: formulas against independent float64 references, invariances, generation, losses, round trips."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from echo_hf import modeling_echo
from echo_hf.configuration_echo import PRESETS, EchoConfig
from echo_hf.modeling_echo import (
    CACHE_NAME,
    EchoEncoder,
    EchoEncoderModel,
    EchoEncoderOutput,
    EchoForConditionalGeneration,
    EchoForCTC,
    EchoModel,
    EchoRotaryEmbedding,
    align_f0,
    mean_cross_attention,
    normalize_f0,
    pitch_per_token,
    standardize_f0,
)
from echo_hf.normalization_echo import carry_log_f0

TINY = {
    "vocab_size": 67,
    "feature_groups": {"spectrogram": 16, "pitch": 1},
    "encoder_hidden_size": 32,
    "decoder_hidden_size": 24,
    "stem_num_layers": 1,
    "encoder_num_hidden_layers": 3,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 2,
    "encoder_num_key_value_heads": 2,
    "encoder_intermediate_size": 40,
    "max_target_positions": 40,
    "mask_feature_length": 4,
}
SETTINGS = {
    **{name: {"preset": name} for name in PRESETS},
    "laplacian": {"preset": "all", "pitch_bias": "laplacian"},
    "convolution": {"preset": "all", "encoder_kernel_size": 5},
    "self_conditioning": {"preset": "all", "self_conditioning_layers": [1, 2]},
}


def tiny_config(preset="all", **overrides):
    return EchoConfig.from_preset(preset, **{**TINY, **overrides})


def randomize(model):
    """Moves every parameter off its start, so that no mechanism is neutral."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.01 if "log_theta" in name else 0.2))
    return model


def tiny_model(preset="all", cls=EchoForConditionalGeneration, **overrides):
    torch.manual_seed(0)
    model = randomize(cls(tiny_config(preset, **overrides))).eval()
    if model.can_generate():
        model.generation_config.ctc_weight = 0.0  # the decoder alone; test_generation_echo.py has both together
    return model


def make_inputs(lengths=(61, 37, 50), bins=16, seed=0):
    """Random spectrogram with some silence, a wandering F0 with unvoiced stretches; padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    batch, frames = len(lengths), max(lengths)
    features = torch.rand(batch, frames, bins + 1, generator=generator) * 2
    walk = torch.randn(batch, frames, generator=generator).cumsum(1) * 3
    features[..., -1] = (150 + walk).clamp(75, 480) * (torch.rand(batch, frames, generator=generator) > 0.3)
    features[:, 8:20] = 0.0  # silence
    mask = torch.zeros(batch, frames, dtype=torch.long)
    for i, length in enumerate(lengths):
        mask[i, :length] = 1
        features[i, length:] = 0.0
    return {"input_features": features, "attention_mask": mask}


def alone(inputs, i):
    length = int(inputs["attention_mask"][i].sum())
    return {name: value[i : i + 1, :length] for name, value in inputs.items()}


LABELS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 2, -100, -100], [11, 12, 12, 2, -100]])


# Formulas


def reference_angles(mode, kind, f0, length, head_dim, theta, corner, top, contour=None, gains=None):
    """Section by section from the formulas, float64, frame by frame."""
    pairs = head_dim // 2

    def omega(value):
        if kind == "standard":
            return np.array([value ** (-2.0 * c / head_dim) for c in range(pairs)])
        x = np.linspace(0.0, 2595.0 * np.log10(1.0 + top / corner), pairs)
        return value / 220.0 * (corner * (10.0 ** (x / 2595.0) - 1.0) / 1000.0)

    angles, total = np.zeros((length, pairs)), np.zeros(pairs)
    for t in range(length):
        if mode == "none":
            angles[t] = t * omega(theta)
        elif mode == "mean":
            angles[t] = t * omega(theta + f0[:length].mean())
        elif mode == "frame":
            angles[t] = t * omega(theta + f0[t])
        elif mode == "contour":
            total = total + omega(theta) * 0.5 * np.tanh(gains * contour[t])
            angles[t] = t * omega(theta) + total
        else:
            total = total + omega(theta + f0[t])
            angles[t] = total
    return angles


@pytest.mark.parametrize("kind, corner, top", [("standard", 80, 2000), ("mel", 700, 8000), ("mel", 80, 2000)])
@pytest.mark.parametrize("mode", ["none", "mean", "frame", "phase"])
def test_rotary_angles_equal_the_formulas_at_frame_1500(mode, kind, corner, top):
    length, frames, head_dim = 1600, 1700, 64
    f0 = make_inputs((length,))["input_features"][:, :, -1]
    f0 = nn.functional.pad(f0, (0, frames - length))
    mask = (torch.arange(frames) < length).long()[None]
    config = tiny_config(
        "theta",
        rotary_frequencies=kind,
        theta_mode=mode,
        mel_corner_frequency=float(corner),
        mel_max_frequency=float(top),
        learn_theta=True,
    )
    rotary = EchoRotaryEmbedding(config, head_dim, mode)
    mean_f0 = f0[:, :length].double().mean(-1, keepdim=True)
    cos, sin = rotary(torch.arange(frames)[None], torch.float32, f0, normalize_f0(f0, mask), mean_f0)
    expected = reference_angles(mode, kind, f0[0].double().numpy(), length, head_dim, 10000.0, corner, top)
    np.testing.assert_allclose(cos[0, 0, :length].detach().numpy(), np.cos(expected), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0, :length].detach().numpy(), np.sin(expected), atol=1e-6)


def similarity(mode, contour, start, kind="mel"):
    """Similarity pattern of one utterance's positions, the contour beginning at frame `start`."""
    rotary = EchoRotaryEmbedding(tiny_config("theta", theta_mode=mode, rotary_frequencies=kind), 32, mode)
    f0 = torch.cat((torch.full((start,), 120.0), contour))[None]
    mask = torch.ones_like(f0).long()
    cos, sin = rotary(torch.arange(f0.shape[1])[None], torch.float32, f0, normalize_f0(f0, mask))
    points = torch.complex(cos[0, 0, start:], sin[0, 0, start:])
    return (points[:, None] * points[None].conj()).real.mean(-1)


def contour_rotary(gains, kind="standard"):
    """A rotary embedding of 32 channels whose angles follow the contour with these gains, 16 or one for all."""
    rotary = EchoRotaryEmbedding(tiny_config("theta", theta_mode="contour", rotary_frequencies=kind), 32, "contour")
    with torch.no_grad():
        rotary.contour_gain.copy_(torch.as_tensor(gains))
    return rotary


@pytest.mark.parametrize("kind", ["standard", "mel"])
def test_contour_with_gains_of_zero_is_plain_rotary_to_the_bit(kind):
    f0 = make_inputs((500,))["input_features"][:, :, -1]
    pitch, positions = normalize_f0(f0, torch.ones_like(f0)), torch.arange(500)[None]
    plain = EchoRotaryEmbedding(tiny_config("theta", theta_mode="none", rotary_frequencies=kind), 32, "none")
    for warped, expected in zip(
        contour_rotary(0.0, kind)(positions, torch.float32, f0, pitch), plain(positions, torch.float32, f0, pitch)
    ):
        assert torch.equal(warped, expected)


def test_contour_equals_its_formula():
    f0 = make_inputs((300,))["input_features"][:, :, -1]
    pitch = normalize_f0(f0, torch.ones_like(f0))
    gains = torch.linspace(-2.0, 2.0, 16)
    angles = contour_rotary(gains).angles(torch.arange(300)[None], f0, None, pitch)[0].detach().numpy()
    omega = 10000.0 ** (-np.arange(16) / 16)
    warp = 1.0 + 0.5 * np.tanh(gains.double().numpy() * pitch[0, :, 1:2].double().numpy())
    # The plain angle of frame 0 is 0, so the sum is of omega over the frames before, and of what F0 adds up to itself.
    expected = np.arange(300)[:, None] * omega + np.cumsum(omega * (warp - 1.0), axis=0)
    np.testing.assert_allclose(np.exp(1j * angles), np.exp(1j * expected), atol=1e-6)


def test_contour_is_relative():
    contour = make_inputs((80,))["input_features"][0, :, -1]

    def pattern(start):
        f0 = torch.cat((torch.full((start,), 120.0), contour))[None]
        pitch = normalize_f0(contour[None], torch.ones(1, 80))
        pitch = torch.cat((torch.ones(1, start, 3), pitch), dim=1)
        angles = contour_rotary(1.5).angles(torch.arange(f0.shape[1])[None], f0, None, pitch)[0, start:]
        return torch.cos(angles[:, None] - angles[None]).mean(-1)

    assert (pattern(0) - pattern(1000)).abs().max() < 1e-5


def test_log_f0_is_carried_across_unvoiced_frames():
    f0 = torch.tensor([[0.0, 0.0, 100.0, 0.0, 0.0, 0.0, 200.0, 150.0, 0.0], [0.0] * 9])
    voiced = (f0 > 0).float()
    carried = carry_log_f0(torch.where(f0 > 0, f0, 1.0).log(), voiced).exp()
    middle = 100.0 * 2.0 ** torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(carried[0], torch.tensor([100.0, 100.0, 100.0, *middle, 200.0, 150.0, 150.0]))
    assert torch.equal(carried[1], torch.ones(9))


def test_continuous_pitch_has_a_value_in_every_real_frame_and_padding_changes_none():
    f0 = torch.tensor([[0.0, 120.0, 0.0, 0.0, 180.0, 0.0]])
    voicing = torch.tensor([[0.1, 0.9, 0.4, 0.3, 0.8, 0.2]])
    pitch = normalize_f0(f0, torch.ones(1, 6), voicing)
    assert torch.equal(pitch[..., 0], voicing)
    assert (pitch[..., 1].diff() >= 0).all() and (pitch[..., 2].diff() >= 0).all()
    voiced = normalize_f0(f0, torch.ones(1, 6))
    torch.testing.assert_close(pitch[0, [1, 4], 1:], voiced[0, [1, 4], 1:])
    mask = torch.tensor([[1] * 6 + [0] * 3])
    padded = normalize_f0(nn.functional.pad(f0, (0, 3)), mask, nn.functional.pad(voicing, (0, 3), value=0.7))
    torch.testing.assert_close(padded[:, :6], pitch)
    assert not padded[:, 6:].any()
    assert not normalize_f0(torch.zeros(1, 6), torch.ones(1, 6), voicing).any()


def test_voicing_is_a_part_of_pitch_and_batches_do_not_change_it():
    groups = {"spectrogram": 16, "voicing": 1, "pitch": 1}
    config = tiny_config("all", feature_groups=groups, theta_mode="contour")
    torch.manual_seed(0)
    encoder = EchoEncoder(config).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "gain" in name or "pitch_proj" in name:
                parameter.normal_()
    assert list(encoder.stems) == ["spectrogram", "pitch"]
    inputs = make_inputs((60, 41))
    spectrogram, f0 = inputs["input_features"].split((16, 1), dim=-1)
    features = torch.cat((spectrogram, torch.rand(2, 60, 1), f0), -1) * inputs["attention_mask"][..., None]
    together = encoder(features, attention_mask=inputs["attention_mask"]).last_hidden_state
    alone = encoder(features[1:, :41]).last_hidden_state
    torch.testing.assert_close(together[1:, : alone.shape[1]], alone, atol=1e-5, rtol=1e-5)
    other = features.clone()
    other[..., 16] = 1.0 - other[..., 16]
    changed = encoder(other, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert (changed - together).abs().max() > 1e-3


def test_phase_is_relative_and_frame_is_not():
    contour = make_inputs((80,))["input_features"][0, :, -1]
    shift = {
        mode: (similarity(mode, contour, 0) - similarity(mode, contour, 1000)).abs().max()
        for mode in ("phase", "frame")
    }
    assert shift["phase"] < 1e-5
    assert shift["frame"] > 0.1


def test_mean_theta_is_of_all_real_input_frames_before_alignment():
    model, seen = tiny_model("published_mean_sigmoid", cls=EchoModel), []
    model.encoder.rotary_emb.register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = make_inputs((61, 37))
    with torch.no_grad():
        encoded = model.encoder(**inputs)
    cos, _ = seen[0]
    for row, length in enumerate((61, 37)):
        mean = inputs["input_features"][row, :length, -1].double().mean()
        aligned = encoded.f0[row, : math.ceil(length / 4)].double().mean()
        assert abs(mean - aligned) > 0.5  # as many encoder frames see every fourth value only
        theta = model.encoder.rotary_emb.log_theta.double().exp() * 10000.0 + mean
        angles = torch.arange(16)[:, None] * model.encoder.rotary_emb.frequencies(theta)
        radius = encoded.f0[row].sigmoid()[:, None]
        torch.testing.assert_close(cos[row, 0], angles.cos().float() * radius, atol=1e-5, rtol=1e-5)


def test_theta_is_learned_as_a_factor():
    rotary = EchoRotaryEmbedding(tiny_config("published_mean_sigmoid", rotary_frequencies="standard"), 8)
    with torch.no_grad():
        rotary.log_theta.fill_(math.log(2.0))
    angles = rotary.angles(torch.arange(4)[None], None, None)[0]
    np.testing.assert_allclose(angles[1].detach().numpy(), 20000.0 ** (-2.0 * np.arange(4) / 8), rtol=1e-6)


def test_radius_forms():
    f0 = torch.tensor([[0.0, 100.0, 200.0, 0.0, 150.0]])
    pitch = normalize_f0(f0, torch.ones(1, 5))
    logs = np.log([100.0, 200.0, 150.0])
    z = (logs - logs.mean()) / logs.std()
    np.testing.assert_allclose(pitch[0, [1, 2, 4], 1].numpy(), z, rtol=1e-5)
    np.testing.assert_allclose(pitch[0, [1, 2, 4], 2].numpy(), (logs - np.log(150.0)) / 0.5, atol=1e-6)
    assert pitch[0, [0, 3]].abs().max() == 0
    radius = {}
    for mode in ("unit", "sigmoid", "raw", "bounded"):
        module = EchoRotaryEmbedding(tiny_config("radius", radius_mode=mode), 8, "none", mode)
        if mode == "bounded":
            assert torch.equal(module.radius(f0, pitch), torch.ones(1, 5, 1))  # neutral at the start
            module.gain.data.fill_(0.5)
        radius[mode] = module.radius(f0, pitch)
    assert radius["unit"] is None
    np.testing.assert_allclose(radius["sigmoid"][0, :, 0].numpy(), [0.5, 1, 1, 0.5, 1])
    np.testing.assert_allclose(radius["raw"][0, :, 0].numpy(), f0[0].numpy())
    np.testing.assert_allclose(
        radius["bounded"][0, [1, 2, 4], 0].detach().numpy(), 1 + 0.5 * np.tanh(0.5 * z), rtol=1e-5
    )
    assert radius["bounded"][0, [0, 3], 0].tolist() == [1.0, 1.0]


def test_align_f0_is_nearest_index_of_each_utterance():
    f0 = torch.arange(1.0, 23.0).repeat(2, 1)
    aligned = align_f0(f0, torch.tensor([22, 9]), torch.tensor([6, 3]), 6)
    assert aligned[0].tolist() == [f0[0, min(math.floor(i * 22 / 6), 21)].item() for i in range(6)]
    assert aligned[1].tolist() == [f0[1, min(math.floor(i * 9 / 3), 8)].item() for i in range(3)] + [0, 0, 0]


@pytest.mark.parametrize("rate", [3.0, 10.0, 12.5, 25.0, 100.0, 250.0])
def test_pitch_per_token_equals_the_formula(rate):
    inputs = make_inputs((61, 37))
    f0, lengths = inputs["input_features"][..., -1], inputs["attention_mask"].sum(-1)
    result = pitch_per_token(f0, lengths, 1.0 / (rate * 0.01))
    for row in range(2):
        frames = f0[row, : lengths[row]].numpy().astype(np.float64)
        times = np.round(np.arange(len(frames)) * 0.01, 9)
        for i in range(result.shape[1]):
            expected = 0.0
            if round(i / rate, 9) < round(len(frames) * 0.01, 9):
                start = min(np.searchsorted(times, round(i / rate, 9), "left"), len(frames) - 1)
                end = max(np.searchsorted(times, round((i + 1) / rate, 9), "right"), start + 1)
                value = frames[start:end].mean()
                expected = (value - 71.0) / (500.0 - 71.0) if value >= 100.0 else 0.0
            assert result[row, i].item() == pytest.approx(expected, abs=1e-5), (row, i)


def reference_attention(attention, hidden_states, mask, f0, mean_f0, silence, kind):
    """One encoder attention from the formulas, in float64, with matrices of frames by frames and complex numbers."""
    config, weights = attention.config, {k: v.double() for k, v in attention.state_dict().items()}
    rotary = kind["rotary"]
    heads, groups, width = attention.num_heads, attention.num_key_value_groups, attention.content_dim
    frames = int(mask.sum())
    x, f0 = hidden_states[0, :frames].double(), f0[0, :frames].double()

    def split(name, channels):
        return (x @ weights[f"{name}.weight"].T).view(frames, -1, channels).transpose(0, 1)

    query, key = split("q_proj", width), split("k_proj", width)
    value = split("v_proj", attention.head_dim).repeat_interleave(groups, 0)
    voiced = f0 > 0
    logs = f0.clamp(min=1e-9).log()
    contour = torch.zeros_like(f0)
    contour[voiced] = (logs[voiced] - logs[voiced].mean()) / logs[voiced].std(correction=0).clamp(min=0.1)
    angles = torch.from_numpy(
        reference_angles(
            config.theta_mode,
            config.rotary_frequencies,
            f0.numpy() if config.theta_mode != "mean" else np.full(frames, mean_f0),
            frames,
            attention.head_dim,
            config.rotary_theta * math.exp(rotary.log_theta.item() if config.learn_theta else 0.0),
            config.mel_corner_frequency,
            config.mel_max_frequency,
            contour.numpy(),
            rotary.contour_gain.double().detach().numpy() if config.theta_mode == "contour" else None,
        )
    )[:, : width // 2]
    radius = {
        "unit": torch.ones_like(f0),
        "sigmoid": f0.sigmoid(),
        "raw": f0,
        "bounded": 1 + 0.5 * torch.tanh(getattr(rotary, "gain", torch.zeros(1)).double() * contour),
    }[config.radius_mode]
    turn = radius[:, None] * torch.exp(1j * angles)
    query = torch.view_as_real(torch.view_as_complex(query.reshape(heads, frames, -1, 2).contiguous()) * turn).flatten(
        -2
    )
    key = torch.view_as_real(
        torch.view_as_complex(key.reshape(-1, *query.shape[1:2], width // 2, 2).contiguous()) * turn
    )
    key = key.flatten(-2).repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) / math.sqrt(attention.head_dim)
    if config.silence_scaling:
        low, high = config.silence_scale_range
        factor = nn.functional.softplus(weights["silence_logit"]).clamp(low, high)
        scores = scores * torch.where(silence[0, :frames], factor, 1.0)[None, None]
    f = (f0 - f0.mean()) / f0.std(correction=config.pitch_bias == "laplacian").clamp(min=1e-3)
    distance = f[:, None] - f[None]
    if config.pitch_bias == "gaussian":
        scores = scores - weights["bias_strength"][:, None, None] * distance**2
    elif config.pitch_bias == "laplacian":
        scores = scores + torch.exp(-distance.abs())
    output = (scores.softmax(-1) @ value).transpose(0, 1).reshape(frames, -1)
    return output @ weights["o_proj.weight"].T


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_equals_the_float64_reference(name, implementation):
    settings = dict(SETTINGS[name])
    model = tiny_model(cls=EchoModel, **settings)
    model.set_attn_implementation(implementation)
    inputs = make_inputs((301, 203))
    seen = {}
    layer = model.encoder.layers[0].self_attn
    layer.register_forward_hook(lambda module, args, output: seen.update(args=args, output=output[0]))
    with torch.no_grad():
        outputs = model.encoder(**inputs)
    for row in range(2):
        frames = int(outputs.attention_mask[row].sum())
        expected = reference_attention(
            layer,
            seen["args"][0][row : row + 1],
            outputs.attention_mask[row],
            outputs.f0[row : row + 1],
            inputs["input_features"][row, : (301, 203)[row], -1].double().mean().item(),
            outputs.silence[row : row + 1] if outputs.silence is not None else None,
            {"rotary": model.encoder.rotary_emb},
        )
        # Raw radii make scores of 1e4 and more: float32 keeps fewer digits behind the point.
        tolerance = 2e-3 if "raw" in name else 2e-5
        torch.testing.assert_close(seen["output"][row, :frames].double(), expected, atol=tolerance, rtol=tolerance)


def test_silent_frames_are_found_and_their_scores_are_near_zero():
    model = tiny_model("silence", cls=EchoModel)
    inputs = make_inputs((61,))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.self_attn.q_proj.weight.mul_(4)
        outputs = model.encoder(**inputs, output_attentions=True)
    # Frames 8 to 19 are at the floor: encoder frames 2, 3 and 4.
    assert outputs.silence[0].nonzero().flatten().tolist() == [2, 3, 4]
    weights = outputs.attentions[0][0]  # (H, S, S)
    silent = (weights[..., 2].log() - weights[..., 3].log()).abs()  # difference of two near-zero scores
    voiced = (weights[..., 8].log() - weights[..., 9].log()).abs()
    known = silent.isfinite() & voiced.isfinite()
    assert silent[known].median() < 0.2 * voiced[known].median()


def test_baseline_is_a_plain_rotary_transformer_to_the_bit():
    """The encoder with every mechanism off, beside plain code that has no word for pitch."""
    model = tiny_model("baseline", cls=EchoModel, encoder_num_key_value_heads=4)
    inputs = make_inputs((61,))
    config, encoder = model.config, model.encoder
    functional = nn.functional
    x = inputs["input_features"][..., :16].transpose(1, 2)
    for convolution in encoder.stems["spectrogram"].convolutions:
        x = functional.gelu(functional.conv1d(x, convolution.weight, convolution.bias, stride=2, padding=1))
    x = functional.rms_norm(x.transpose(1, 2), (32,), encoder.stems["spectrogram"].norm.weight, config.rms_norm_eps)
    for layer in encoder.stem_layers:
        h = functional.rms_norm(x, (32,), layer.norm.weight, config.rms_norm_eps).transpose(1, 2)
        h = functional.conv1d(h, layer.convolution.weight, layer.convolution.bias, padding=4, groups=32).transpose(1, 2)
        h = functional.gelu(functional.linear(h, layer.up_proj.weight, layer.up_proj.bias))
        x = x + functional.linear(h, layer.down_proj.weight, layer.down_proj.bias)
    width = config.encoder_hidden_size // 4
    omega = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = (torch.arange(x.shape[1], dtype=torch.float64)[:, None] * omega % (2 * math.pi)).float()
    cos, sin = angles.cos(), angles.sin()

    def turn(states):
        even, odd = states[..., 0::2], states[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    for layer in encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = functional.rms_norm(x, (32,), layer.self_attn_norm.weight, config.rms_norm_eps)
        q, k, v = (
            functional.linear(h, p.weight).view(1, -1, 4, width).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        h = functional.scaled_dot_product_attention(turn(q), turn(k), v, scale=width**-0.5)
        x = x + functional.linear(h.transpose(1, 2).reshape(1, -1, 32), attention.o_proj.weight)
        h = functional.rms_norm(x, (32,), layer.mlp_norm.weight, config.rms_norm_eps)
        gated = functional.silu(functional.linear(h, mlp.gate_proj.weight)) * functional.linear(h, mlp.up_proj.weight)
        x = x + functional.linear(gated, mlp.down_proj.weight)
    x = functional.rms_norm(x, (32,), encoder.norm.weight, config.rms_norm_eps)
    assert torch.equal(encoder(**inputs).last_hidden_state, x)


def test_baseline_does_not_hear_f0():
    model, inputs = tiny_model("baseline"), make_inputs()
    other = {**inputs, "input_features": inputs["input_features"].clone()}
    other["input_features"][..., -1] = 333.0
    assert torch.equal(model(**inputs, labels=LABELS).logits, model(**other, labels=LABELS).logits)


@pytest.mark.parametrize("name", ["theta", "radius", "bias", "gate", "pitch_input", "token_pitch", "laplacian"])
def test_every_pitch_mechanism_hears_f0(name):
    settings = dict(SETTINGS[name])
    model, inputs = tiny_model(**settings), make_inputs()
    other = {**inputs, "input_features": inputs["input_features"].clone()}
    other["input_features"][..., -1] *= torch.linspace(0.6, 1.4, 61)
    assert not torch.allclose(model(**inputs, labels=LABELS).logits, model(**other, labels=LABELS).logits, atol=1e-5)


def test_a_token_has_the_pitch_of_the_span_before_it():
    decoder = EchoModel(tiny_config("token_pitch")).eval().decoder
    with torch.no_grad():
        decoder.pitch_proj.weight.fill_(1.0)
        token_pitch = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
        embeds = decoder._pitch_embeds(token_pitch, torch.tensor([[0, 1, 2, 3, 100]]))
    expected = torch.tensor([[0.1, 0.1, 0.2, 0.0, 0.0], [0.3, 0.3, 0.4, 0.0, 0.0]])
    assert torch.equal(embeds, expected[..., None].expand_as(embeds))


@pytest.mark.parametrize("preset", ["radius", "gate", "token_pitch"])
def test_mechanisms_start_neutral(preset):
    """A fresh model with the mechanism is the baseline with the same weights, to the bit."""
    torch.manual_seed(0)
    model = EchoForConditionalGeneration(tiny_config(preset)).eval()
    baseline = EchoForConditionalGeneration(tiny_config("baseline")).eval()
    baseline.load_state_dict(model.state_dict(), strict=False)
    inputs = make_inputs()
    assert torch.equal(model(**inputs, labels=LABELS).logits, baseline(**inputs, labels=LABELS).logits)


def test_gaussian_bias_starts_neutral():
    model = EchoModel(tiny_config("bias")).eval()
    attention = model.encoder.layers[0].self_attn
    f = standardize_f0(torch.tensor([[0.0, 120.0, 240.0]]), torch.ones(1, 3))
    query, key = torch.randn(1, 4, 3, 6), torch.randn(1, 2, 3, 6)
    longer_query, longer_key = attention.append_pitch(query, key, f)
    assert longer_query.shape[-1] == attention.head_dim == longer_key.shape[-1]
    assert longer_query[..., -2:].abs().max() == 0


def test_standardized_f0_of_a_constant_is_constant_and_near_zero():
    for value in (0.0, 150.3, 399.99):
        for frames in (1, 2, 100):
            f = standardize_f0(torch.full((1, frames), value), torch.ones(1, frames))
            assert f.abs().max() < 0.1 and f.max() == f.min()


def test_published_bias_standardizes_by_one_frame_less():
    f0 = torch.tensor([[0.0, 120.0, 240.0, 180.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    for correction in (0, 1):
        f = standardize_f0(f0, mask, correction)
        assert f[0, :4].std(correction=correction).item() == pytest.approx(1.0) and f[0, 4] == 0
    assert standardize_f0(f0, mask * 0 + torch.tensor([[1, 0, 0, 0, 0]]), 1).abs().max() == 0  # a single frame


def test_constant_and_missing_f0_are_harmless():
    for value in (0.0, 150.3):
        for name, settings in SETTINGS.items():
            inputs = make_inputs()
            inputs["input_features"][..., -1] = value * inputs["attention_mask"]
            assert tiny_model(**settings)(**inputs, labels=LABELS).logits.isfinite().all(), name


# Invariances


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SETTINGS)
def test_batch_and_padding_do_not_change_an_utterance(name, implementation):
    settings = dict(SETTINGS[name])
    model, inputs = tiny_model(**settings), make_inputs()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        batched = model(**inputs, labels=LABELS)
        for i in range(3):
            single = model(**alone(inputs, i), labels=LABELS[i : i + 1])
            tolerance = 2e-3 if "raw" in name else 2e-5
            torch.testing.assert_close(batched.logits[i : i + 1], single.logits, atol=tolerance, rtol=1e-3)
            frames = single.ctc_logits.shape[1]
            torch.testing.assert_close(
                batched.ctc_logits[i : i + 1, :frames], single.ctc_logits, atol=tolerance, rtol=1e-3
            )


def test_values_in_padding_are_never_read():
    model, inputs = tiny_model(), make_inputs()
    noisy = inputs["input_features"].clone()
    noisy[inputs["attention_mask"] == 0] = 1e3
    with torch.no_grad():
        clean = model(**inputs, labels=LABELS).logits
        torch.testing.assert_close(
            model(input_features=noisy, attention_mask=inputs["attention_mask"], labels=LABELS).logits, clean
        )


@pytest.mark.parametrize("strides", [[2, 2], [1], [2, 2, 2], [3, 2], [1, 1]])
def test_any_strides_give_the_length_they_promise(strides):
    model = tiny_model("all", stem_strides=strides, cls=EchoModel)
    for frames in (1, 2, 5, 23):
        outputs = model.encoder(torch.rand(1, frames, 17))
        assert outputs.last_hidden_state.shape[1] == model._get_feat_extract_output_lengths(frames)
        assert outputs.attention_mask.shape == outputs.f0.shape == outputs.last_hidden_state.shape[:2]


@pytest.mark.parametrize("name", SETTINGS)
def test_eager_equals_sdpa(name):
    settings = dict(SETTINGS[name])
    model, inputs = tiny_model(**settings), make_inputs()
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(**inputs, labels=LABELS))
    tolerance = 2e-3 if "raw" in name else 2e-5
    torch.testing.assert_close(results[0].logits, results[1].logits, atol=tolerance, rtol=1e-3)
    torch.testing.assert_close(results[0].ctc_logits, results[1].ctc_logits, atol=tolerance, rtol=1e-3)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation gives."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def test_all_mechanisms_make_no_matrix_of_frames_by_frames():
    model, sizes = tiny_model("all"), []
    for length in (4000, 8000):
        inputs = make_inputs((length,))
        with LargestTensor() as seen, torch.no_grad():
            model.model.encoder(**inputs)
        sizes.append(seen.size)
    assert sizes[1] < 2.1 * sizes[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_fused_attention_kernel_is_used_with_all_mechanisms_on(padded, training):
    model, inputs = tiny_model("all").train(training), make_inputs((61, 37) if padded else (61, 61))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.model.encoder(**inputs).last_hidden_state.sum()
    names = {event.key for event in profile.key_averages()}
    assert any("scaled_dot_product_flash_attention" in name for name in names)
    assert not any("scaled_dot_product_attention_math" in name for name in names)


def test_flash_attention_is_refused():
    with pytest.raises(ValueError, match="does not support Flash"):
        tiny_model().set_attn_implementation("flash_attention_2")


# Losses


def test_loss_is_the_cross_entropy_of_labels_shifted_once():
    model, inputs = tiny_model("all", ctc_loss_weight=0.0), make_inputs()
    assert model.ctc_head is None
    labels = LABELS.clone()
    decoder_inputs = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 10, 2, 0], [1, 11, 12, 12, 2]])
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
        logits = model(**inputs, decoder_input_ids=decoder_inputs).logits
    torch.testing.assert_close(outputs.logits, logits)
    nll = [-logits[b, t].log_softmax(-1)[labels[b, t]] for b in range(3) for t in range(5) if labels[b, t] != -100]
    torch.testing.assert_close(outputs.loss, torch.stack(nll).mean())
    torch.testing.assert_close(outputs.loss, outputs.ce_loss)
    summed = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(50))
    torch.testing.assert_close(summed.loss, torch.stack(nll).sum() / 50)


def test_pad_in_labels_is_ignored_like_minus_100():
    model, inputs = tiny_model(), make_inputs()
    padded = LABELS.masked_fill(LABELS == -100, 0)
    torch.testing.assert_close(model(**inputs, labels=padded).loss, model(**inputs, labels=LABELS).loss)


def test_hybrid_loss_and_its_parts():
    model, inputs = tiny_model("all", ctc_loss_weight=0.25), make_inputs()
    outputs = model(**inputs, labels=LABELS)
    torch.testing.assert_close(outputs.loss, 0.75 * outputs.ce_loss + 0.25 * outputs.ctc_loss)
    expected = 0.0
    for i, targets in enumerate(([5, 6, 7, 8], [9, 10], [11, 12, 12])):
        frames = math.ceil(int(inputs["attention_mask"][i].sum()) / 4)
        log_probs = outputs.ctc_logits[i, :frames].log_softmax(-1)[:, None]
        expected += nn.functional.ctc_loss(
            log_probs, torch.tensor([targets]), torch.tensor([frames]), torch.tensor([len(targets)]), reduction="sum"
        )
    # Divided as cross-entropy is, by all tokens that count, ends among them, as the Trainer does.
    num_items = (LABELS != -100).sum()
    torch.testing.assert_close(outputs.ctc_loss, expected / num_items)
    given = model(**inputs, labels=LABELS, num_items_in_batch=num_items)
    torch.testing.assert_close(outputs.loss, given.loss)
    several = tiny_model("all", ctc_loss_weight=0.25, eos_token_id=[2, 3])
    torch.testing.assert_close(several(**inputs, labels=LABELS).loss, outputs.loss)


def test_ctc_loss_of_an_impossible_utterance_is_zero_not_infinite():
    model = tiny_model(cls=EchoForCTC)
    outputs = model(torch.rand(1, 4, 17), labels=torch.tensor([[5, 6, 7, 8, 9, 2]]))
    assert outputs.loss == 0


@pytest.mark.parametrize("cls", [EchoForConditionalGeneration, EchoForCTC])
def test_ctc_loss_holds_intermediate_predictions_in_training_only(cls):
    model, inputs = tiny_model(cls=cls, self_conditioning_layers=[1, 2]), make_inputs()

    def loss_and_logits(outputs):
        return (outputs.ctc_loss, outputs.ctc_logits) if model.can_generate() else (outputs.loss, outputs.logits)

    encoder = model.get_encoder() if model.can_generate() else model.model.encoder
    plain, last = loss_and_logits(model(**inputs, labels=LABELS))
    assert encoder(**inputs).intermediate_logits is None
    trained, same = loss_and_logits(model.train()(**inputs, labels=LABELS))
    torch.testing.assert_close(same, last)
    heard = encoder(**inputs)
    assert heard.intermediate_logits.shape == (3, 2, 16, 67)
    first, second = (
        modeling_echo.ctc_loss(logits, LABELS, heard.attention_mask, model.config)
        for logits in heard.intermediate_logits.unbind(1)
    )
    torch.testing.assert_close(trained, 0.7 * plain + 0.3 * (first + second) / 2)


def test_what_the_encoder_says_within_is_added_to_what_it_goes_on_with():
    model, inputs = tiny_model(cls=EchoModel, self_conditioning_layers=[1]), make_inputs((61,))
    with torch.no_grad():
        model.encoder.intermediate_head.bias[9] += 50.0  # every frame is taken for token 9
    seen = []
    model.encoder.layers[1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    before = model.encoder(**inputs, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(seen[0], before + model.encoder.self_conditioning.weight[:, 9])


def test_label_smoothing_acts_in_training_only():
    model = tiny_model("baseline", ctc_loss_weight=0.0, label_smoothing=0.2)
    plain = tiny_model("baseline", ctc_loss_weight=0.0)
    inputs = make_inputs()
    torch.testing.assert_close(model(**inputs, labels=LABELS).loss, plain(**inputs, labels=LABELS).loss)
    smoothed = model.train()(**inputs, labels=LABELS)
    mask = LABELS != -100
    log_probs = smoothed.logits.log_softmax(-1)[mask]
    expected = -(0.8 * log_probs.gather(1, LABELS[mask][:, None]).mean() + 0.2 * log_probs.mean())
    torch.testing.assert_close(smoothed.loss, expected)


def test_spec_augment_masks_the_spectrogram_in_training_only():
    model = tiny_model("all", apply_spec_augment=True, mask_time_length=3, mask_feature_prob=0.3, cls=EchoModel)
    spectrogram, mask = torch.ones(4, 40, 16), torch.ones(4, 40, dtype=torch.long)
    np.random.seed(0)
    masked = model.encoder._spec_augment(spectrogram, mask)
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    assert (masked == 0).all(-1).any() and (masked == 0).all(1).any()
    inputs = make_inputs()
    with torch.no_grad():
        assert torch.equal(model.encoder(**inputs)[0], model.encoder(**inputs)[0])
        model.train()
        np.random.seed(0)
        first = model.encoder(**inputs)
        second = model.encoder(**inputs)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first.silence, second.silence) and torch.equal(first.f0, second.f0)
    model.encoder(torch.rand(1, 1, 17))  # shorter than any mask


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["baseline", "all"])
def test_overfits_a_batch_and_generates_it(preset):
    torch.manual_seed(0)
    model = EchoForConditionalGeneration(tiny_config(preset)).train()
    inputs = make_inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(220):
        outputs = model(**inputs, labels=LABELS)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert outputs.ce_loss < 0.05 and outputs.ctc_loss < 1.0
    tokens = model.eval().generate(**inputs)
    for row, labels in zip(tokens.tolist(), LABELS.tolist()):
        assert [t for t in row if t not in (0, 1, 2)] == [t for t in labels if t not in (-100, 2)]


# Generation


def greedy_without_cache(model, inputs, steps):
    tokens = torch.ones(len(inputs["input_features"]), 1, dtype=torch.long)
    for _ in range(steps):
        logits = model(**inputs, decoder_input_ids=tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    return tokens


GENERATE = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("name", SETTINGS)
def test_cached_equals_uncached_decoding(name):
    settings = dict(SETTINGS[name])
    model, inputs = tiny_model(**settings), make_inputs()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = greedy_without_cache(model, inputs, 12)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=False), expected)


def test_generating_one_alone_equals_generating_in_a_batch():
    model, inputs = tiny_model(), make_inputs()
    batch = model.generate(**inputs, **GENERATE)
    for i in range(3):
        assert torch.equal(batch[i : i + 1], model.generate(**alone(inputs, i), **GENERATE))


def test_beam_search_expands_all_the_encoder_gives():
    model, inputs = tiny_model(), make_inputs()
    batch = model.generate(**inputs, num_beams=3, **GENERATE)
    for i in range(3):
        assert torch.equal(batch[i : i + 1], model.generate(**alone(inputs, i), num_beams=3, **GENERATE))
    returned = model.generate(**inputs, num_beams=3, num_return_sequences=2, **GENERATE)
    assert returned.shape[0] == 6


def test_the_loss_asks_no_parameter_for_its_device(monkeypatch):
    """Replicas of `torch.nn.DataParallel`, which the Trainer makes of a model where it sees two GPUs, have none."""
    model, inputs = tiny_model(), make_inputs((61,))
    labels = torch.tensor([[5, 6, 2]])
    expected = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    monkeypatch.setattr(type(model), "device", property(lambda self: next(iter(()))))
    assert torch.equal(model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss, expected)


def test_generate_warns_of_audio_too_long_for_one_text(monkeypatch):
    told, model = [], tiny_model("baseline")
    monkeypatch.setattr(modeling_echo.logger, "warning_once", told.append)
    for frames in (2990, 4000):
        model.generate(torch.zeros(1, frames, model.config.num_feature_channels), max_new_tokens=1)
    assert len(told) == 1 and "hears all 40 s of audio at once" in told[0] and "pipeline" in told[0]


def test_what_whisper_takes_and_echo_does_not_is_named():
    model, inputs = tiny_model(), make_inputs((61,))
    with pytest.raises(ValueError, match="takes no language, task: it writes the language that it hears"):
        model.generate(**inputs, language="en", task="transcribe")
    model.generation_config.language = "en"  # as scripts for Whisper do
    for call in (lambda: model.generate(**inputs), model.train, lambda: model.generate(**inputs, language="fr")):
        with pytest.raises(ValueError, match="takes no language: .* in model.generation_config too"):
            call()
    model.eval().generation_config.language = None
    with pytest.raises(ValueError, match="Times come from the pipeline"):
        model.generate(**inputs, return_timestamps=True)
    switched_off = {"return_timestamps": False, "condition_on_prev_tokens": False, "prompt_ids": None}
    assert torch.equal(model.generate(**inputs, **switched_off), model.generate(**inputs))


def test_lines_of_scripts_for_whisper(tmp_path):
    """They work all the way through training, saving, loading and generation."""
    model, inputs = tiny_model(), make_inputs((61,))
    expected = model.generate(**inputs)
    model.config.forced_decoder_ids = None
    model.config.suppress_tokens = []
    model.config.use_cache = False
    model.generation_config.forced_decoder_ids = None
    model.generation_config.language = model.generation_config.task = None
    model.generation_config.suppress_tokens = []
    model.generation_config.begin_suppress_tokens = []
    model.config.dropout = model.config.attention_dropout = 0.0
    model.config.apply_spec_augment = True
    model.train()(**inputs, labels=LABELS[:1]).loss.backward()
    model.eval().save_pretrained(tmp_path)
    loaded = EchoForConditionalGeneration.from_pretrained(tmp_path)
    assert not loaded.config.use_cache
    for each in (model, loaded):
        assert torch.equal(each.generate(**inputs), expected)
        assert each(**inputs, labels=LABELS[:1]).loss.isfinite()


@pytest.mark.parametrize(
    "name, values",
    [
        ("num_beams", [0, -1, 10**6]),
        ("num_return_sequences", [0, 10**6]),
        ("ctc_weight", ["x", -0.1, 1.5, math.nan]),
        ("eos_token_id", [67, -1, [2, 10**6]]),
        ("pad_token_id", [67]),
        ("decoder_start_token_id", [-1]),
        ("suppress_tokens", [[5, 67], [-1]]),
        ("forced_eos_token_id", [1000]),
        ("num_beams", ["four", 2.0, True]),
        ("max_new_tokens", [[1], "3", 2.5]),
        ("no_repeat_ngram_size", ["a"]),
        ("length_penalty", ["x", [1.0]]),
        ("max_time", ["a"]),
        ("do_sample", ["yes", 1]),
        ("exponential_decay_length_penalty", [[1], 1.5, ["a", 2.0]]),
    ],
)
def test_settings_of_generate_that_cannot_work_are_named(name, values):
    model, inputs = tiny_model(ctc_loss_weight=0.3), make_inputs((61,))
    for value in values:
        with pytest.raises(ValueError, match=name):
            model.generate(**inputs, **{name: value})
        model = tiny_model(ctc_loss_weight=0.3)
        with pytest.raises(ValueError, match=name):
            setattr(model.generation_config, name, value)
            model.generate(**inputs)
        model = tiny_model(ctc_loss_weight=0.3)


def test_generate_leaves_the_models_settings_alone():
    model, inputs = tiny_model(ctc_loss_weight=0.0), make_inputs((61,))
    model.generation_config = GenerationConfig(max_length=10, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.generation_config.decoder_start_token_id = 1
    before = model.generation_config.to_dict()
    model.generate(**inputs)
    assert model.generation_config.to_dict() == before
    with pytest.raises(ValueError, match="ctc_weight is 0.5, and this model has no CTC head"):
        model.generate(**inputs, ctc_weight=0.5)


def test_an_activation_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="hidden_act 'loud' is not known; give one of .*silu"):
        tiny_model(hidden_act="loud")


def test_masks_of_any_kind_and_utterances_without_frames():
    model, inputs = tiny_model(), make_inputs((61, 37))
    labels = torch.tensor([[5, 6], [6, 7]])
    with torch.no_grad():
        expected = model(**inputs, labels=labels).logits
        mask = inputs.pop("attention_mask")
        for kind in (torch.float32, torch.bool, torch.int32):
            assert torch.equal(model(**inputs, attention_mask=mask.to(kind), labels=labels).logits, expected)
        mask[1] = 0
        logits = model(**inputs, attention_mask=mask, labels=labels).logits
    torch.testing.assert_close(logits[0], expected[0])
    assert logits.isfinite().all()


def test_labels_that_cannot_be_are_refused():
    model, inputs = tiny_model(), make_inputs((61,))
    longest = model.config.max_target_positions
    model(**inputs, labels=torch.full((1, longest), 5))
    with pytest.raises(ValueError, match=f"Labels of {longest + 1} tokens are longer than max_target_positions"):
        model(**inputs, labels=torch.full((1, longest + 1), 5))
    with pytest.raises(ValueError, match="give labels, decoder_input_ids or decoder_inputs_embeds.*label_smoothing"):
        model(**inputs)


def test_sampling_and_assisted_decoding():
    model, inputs = tiny_model(), make_inputs((61,))
    torch.manual_seed(0)
    sampled = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (2, 13)
    assistant = tiny_model("baseline", decoder_num_hidden_layers=1)
    plain = model.generate(**inputs, **GENERATE)
    assert torch.equal(model.generate(**inputs, assistant_model=assistant, **GENERATE), plain)
    assert torch.equal(model.generate(**inputs, assistant_model=copy.deepcopy(model), **GENERATE), plain)


def test_static_cache_equals_dynamic_cache():
    model, inputs = tiny_model(), make_inputs()
    expected = model.generate(**inputs, **GENERATE)
    assert torch.equal(
        model.generate(**inputs, cache_implementation="static", disable_compile=True, **GENERATE), expected
    )


def assert_steps_equal_the_whole(part, cache, name, **options):
    """A token at a time with the cache under that name gives what all tokens at once do."""
    ids = "input_ids" if part.main_input_name == "input_ids" else "decoder_input_ids"
    tokens = torch.tensor([[1, 5, 6, 7]] * 3)
    whole = part(**options, **{ids: tokens})[0]
    for t in range(4):
        step = part(**options, **{ids: tokens[:, t : t + 1], name: cache}, use_cache=True)[0]
        torch.testing.assert_close(step[:, 0], whole[:, t], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_static_cache_step_by_step(name):
    """Transformers calls the cache by the second name from 5.24 on."""
    model, inputs = tiny_model(), make_inputs()
    with torch.no_grad():
        encoded = model.model.encoder(**inputs)
        cache = EncoderDecoderCache(StaticCache(model.config, 8), StaticCache(model.config, encoded[0].shape[1]))
        assert_steps_equal_the_whole(model, cache, name, encoder_outputs=encoded)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_parts_take_the_cache_by_both_names(name):
    model, inputs = tiny_model(), make_inputs()
    with torch.no_grad():
        encoded = model.model.encoder(**inputs)
        states = {"encoder_hidden_states": encoded[0], "encoder_attention_mask": encoded.attention_mask}
        states |= {"encoder_silence": encoded.silence, "token_pitch": encoded.token_pitch}
        for part, options in ((model.model, {"encoder_outputs": encoded}), (model.model.decoder, states)):
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            assert_steps_equal_the_whole(part, cache, name, **options)


def test_the_library_warns_of_nothing(monkeypatch):
    """Its names change, such as that of the cache in 5.24."""
    told = []
    for name in ("transformers.utils.generic", "transformers.utils.deprecation", "transformers.modeling_layers"):
        logger = logging.get_logger(name)
        monkeypatch.setattr(type(logger), "warning_once", lambda self, message, *rest: told.append(message))
        monkeypatch.setattr(type(logger), "warning", lambda self, message, *rest: told.append(message))
    model, inputs = tiny_model(), make_inputs()
    for options in ({}, {"num_beams": 2}, {"ctc_weight": 0.5, "return_dict_in_generate": True}):
        model.generate(**inputs, max_length=6, **options)
    model(**inputs, labels=LABELS)
    assert model(**inputs, decoder_input_ids=LABELS[:, :1], use_cache=True).get(CACHE_NAME).get_seq_length() == 1
    model(**inputs, labels=LABELS, return_dict=False)
    mean_cross_attention(model, LABELS[:, :1], **inputs)
    assert not told


@pytest.mark.slow
def test_compiled_forward_equals_eager_forward():
    # Of the first layer and of one that is not: each is compiled by itself, which takes seconds.
    model, inputs = tiny_model(encoder_num_hidden_layers=2, decoder_num_hidden_layers=1), make_inputs()
    with torch.no_grad():
        inputs["decoder_input_ids"] = torch.tensor([[1, 5, 6, 7]] * 3)
        expected = model(**inputs)
        # Scalar code: PyTorch's own vector code does not compile where ATEN_CPU_CAPABILITY is "default".
        compiled = torch.compile(model, fullgraph=True, options={"cpp.simdlen": 1})(**inputs)
    torch.testing.assert_close(compiled.logits, expected.logits, atol=1e-4, rtol=1e-3)


def test_generation_config_lets_transcripts_be_long(tmp_path):
    model = tiny_model()
    assert model.generation_config.max_length == model.config.max_target_positions
    model.save_pretrained(tmp_path)
    loaded = EchoForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.max_length == 40
    assert loaded.generate(**make_inputs(), min_new_tokens=30).shape[1] > 20


def test_a_checkpoint_without_generation_config_is_as_one_made_new(tmp_path):
    tiny_model(cls=EchoForCTC).save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    loaded = EchoForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.to_dict() == EchoForConditionalGeneration(loaded.config).generation_config.to_dict()
    assert loaded.generation_config.max_length == loaded.config.max_target_positions
    loaded.generation_config.ctc_weight = 0.2
    loaded.save_pretrained(tmp_path / "again")
    again = EchoForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.generation_config.ctc_weight == 0.2


# Outputs


def test_attentions_and_hidden_states():
    model, inputs = tiny_model(), make_inputs()
    model.set_attn_implementation("eager")
    outputs = model(**inputs, labels=LABELS, output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in outputs.encoder_attentions] == [(3, 4, 16, 16)] * 3
    assert [a.shape for a in outputs.decoder_attentions] == [(3, 2, 5, 5)] * 2
    assert [a.shape for a in outputs.cross_attentions] == [(3, 2, 5, 16)] * 2
    assert [h.shape for h in outputs.encoder_hidden_states] == [(3, 16, 32)] * 4
    assert [h.shape for h in outputs.decoder_hidden_states] == [(3, 5, 24)] * 3
    for attention in (*outputs.encoder_attentions, *outputs.cross_attentions):
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
        assert attention[1, :, :, 10:].abs().max() == 0  # 37 frames are 10 encoder frames
    assert torch.equal(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state)
    generated = model.generate(**inputs, **GENERATE, output_attentions=True, return_dict_in_generate=True)
    assert len(generated.cross_attentions) == 12


def test_cross_attention_is_seen_without_a_change_of_the_model():
    """With four threads at once, and others' calls between: the weights that eager attention gives."""
    model, tokens = tiny_model(), torch.tensor([[1, 5, 6, 7]] * 3)
    inputs = [make_inputs(seed=seed) for seed in range(4)]
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    seen = []
    model.model.decoder.register_forward_hook(lambda *_: seen.append(model.config._attn_implementation))
    with torch.no_grad():
        expected = []
        for heard in inputs:
            outputs = eager(**heard, decoder_input_ids=tokens, output_attentions=True)
            expected.append(torch.stack(outputs.cross_attentions).mean(dim=(0, 2)))

    def look(number):
        with torch.no_grad():
            return [mean_cross_attention(model, tokens, **inputs[number]) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for number, results in enumerate(pool.map(look, range(4))):
            for weights in results:
                assert weights.shape == (3, 4, 16)
                torch.testing.assert_close(weights, expected[number], atol=1e-5, rtol=1e-4)
    assert len(seen) == 20 and set(seen) == {"sdpa"}
    with torch.no_grad():
        encoded = model.get_encoder()(**inputs[0])
        torch.testing.assert_close(
            mean_cross_attention(model, tokens, encoder_outputs=encoded), expected[0], atol=1e-5, rtol=1e-4
        )


def test_gradients_can_be_retained_and_reach_everything():
    model, inputs = tiny_model(), make_inputs()
    model.set_attn_implementation("eager")
    outputs = model(**inputs, labels=LABELS, output_attentions=True, output_hidden_states=True)
    kept = [outputs.encoder_hidden_states[0], outputs.encoder_attentions[0], outputs.cross_attentions[0]]
    for tensor in kept:
        tensor.retain_grad()
    outputs.loss.backward()
    assert all(tensor.grad is not None for tensor in kept)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_tuples_and_dicts_agree():
    model, inputs = tiny_model(), make_inputs()
    as_dict, as_tuple = model(**inputs, labels=LABELS), model(**inputs, labels=LABELS, return_dict=False)
    torch.testing.assert_close(as_dict.to_tuple()[0], as_tuple[0])
    torch.testing.assert_close(as_dict.to_tuple()[1], as_tuple[1])


def test_encoder_outputs_may_be_given():
    model, inputs = tiny_model(), make_inputs()
    with torch.no_grad():
        expected = model(**inputs, labels=LABELS)
        encoded = model.model.encoder(**inputs)
        torch.testing.assert_close(model(encoder_outputs=encoded, labels=LABELS).logits, expected.logits)
        assert torch.equal(model.generate(encoder_outputs=encoded, **GENERATE), model.generate(**inputs, **GENERATE))
        # Bare hidden states, with the mask of the frames they came from.
        baseline = tiny_model("baseline")
        expected = baseline(**inputs, labels=LABELS).logits
        bare = BaseModelOutput(last_hidden_state=baseline.model.encoder(**inputs).last_hidden_state)
        given = baseline(encoder_outputs=bare, attention_mask=inputs["attention_mask"], labels=LABELS).logits
        torch.testing.assert_close(given, expected)
        assert isinstance(encoded, EchoEncoderOutput)
        hybrid = tiny_model("baseline", ctc_loss_weight=0.5)
        hybrid.generation_config.ctc_weight = 0.5
        expected = hybrid(**inputs, labels=LABELS)
        bare = BaseModelOutput(last_hidden_state=hybrid.model.encoder(**inputs).last_hidden_state)
        mask = inputs["attention_mask"]
        for states in (bare, (bare.last_hidden_state,)):
            given = hybrid(encoder_outputs=states, attention_mask=mask, labels=LABELS)
            torch.testing.assert_close(given.ctc_loss, expected.ctc_loss)
        given = hybrid.generate(encoder_outputs=bare, attention_mask=mask, **GENERATE)
        assert torch.equal(given, hybrid.generate(**inputs, **GENERATE))
        with pytest.raises(ValueError, match="does not tell its parts"):
            model(encoder_outputs=model.model.encoder(**inputs, return_dict=False), labels=LABELS)


def test_inputs_embeds_equal_input_ids():
    model, inputs = tiny_model(), make_inputs()
    tokens = torch.tensor([[1, 5, 6]] * 3)
    by_ids = model(**inputs, decoder_input_ids=tokens).logits
    by_embeds = model(**inputs, decoder_inputs_embeds=model.get_input_embeddings()(tokens)).logits
    torch.testing.assert_close(by_ids, by_embeds)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_features": torch.rand(2, 30, 16)}, "input_features"),
        ({"input_features": torch.rand(30, 17)}, "input_features"),
        ({"input_features": torch.rand(2, 0, 17)}, "input_features"),
        ({"input_features": torch.rand(2, 17, 30)}, "feature_groups"),
        ({"attention_mask": torch.ones(2, 8)}, "attention_mask"),
        ({"input_features": None}, "encoder_outputs"),
        ({"labels": None}, "decoder_input_ids"),
    ],
)
def test_wrong_shapes_raise_and_name_the_input(change, message):
    arguments = {"input_features": torch.rand(2, 30, 17), "labels": LABELS[:2], **change}
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channel", [3, -1])  # of the spectrogram, and F0
def test_numbers_that_are_not_finite_are_no_empty_transcript(number, channel):
    inputs = make_inputs()
    inputs["input_features"][1, 10, channel] = number
    for cls in (EchoForConditionalGeneration, EchoForCTC):
        model = tiny_model(cls=cls)
        with pytest.raises(ValueError, match="input_features hold NaN or infinity"):
            model(**inputs, labels=LABELS)
    with pytest.raises(ValueError, match="input_features hold NaN or infinity"):
        tiny_model().generate(**inputs)


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
def test_padding_before_an_utterance_is_refused(kind):
    model, inputs = tiny_model(), make_inputs()
    mask = inputs["attention_mask"]
    holes = mask.clone()
    holes[0, 30] = 0
    hidden = BaseModelOutput(last_hidden_state=torch.rand(3, 16, 32))
    for wrong in (mask.flip(1), holes):
        arguments = {"attention_mask": wrong.to(kind), "labels": LABELS}
        for heard in ({"input_features": inputs["input_features"]}, {"encoder_outputs": hidden}):
            with pytest.raises(ValueError, match="attention_mask must be .* Pad on the right"):
                model(**heard, **arguments)


# Weights


@pytest.mark.parametrize("name", SETTINGS)
def test_save_and_load_round_trip(name, tmp_path):
    settings = dict(SETTINGS[name])
    model, inputs = tiny_model(**settings), make_inputs()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded, info = EchoForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model(**inputs, labels=LABELS).logits, loaded(**inputs, labels=LABELS).logits)
    base = EchoModel.from_pretrained(tmp_path)
    assert torch.equal(base.encoder(**inputs)[0], model.model.encoder(**inputs)[0])


def test_missing_weights_start_where_the_table_says(tmp_path):
    """Loading goes by way of the meta device: what a checkpoint lacks must not stay uninitialised memory."""
    tiny_model("baseline").save_pretrained(tmp_path)
    config = tiny_config("all", learn_theta=True, pitch_bias="laplacian")
    loaded, info = EchoForConditionalGeneration.from_pretrained(tmp_path, config=config, output_loading_info=True)
    missing = info["missing_keys"]
    torch.manual_seed(0)
    fresh = EchoForConditionalGeneration(config).state_dict()
    assert {"model.encoder.rotary_emb.gain", "model.encoder.blend", "model.decoder.pitch_proj.weight"} <= set(missing)
    for name in missing:
        value = loaded.state_dict()[name]
        assert value.isfinite().all()
        if "stems.pitch" not in name:
            assert torch.equal(value, fresh[name]), name


def test_what_is_added_to_a_trained_encoder_starts_as_if_it_were_not_there(tmp_path):
    model, inputs = tiny_model(), make_inputs()
    model.save_pretrained(tmp_path)
    grown = EchoForConditionalGeneration.from_pretrained(
        tmp_path, encoder_kernel_size=5, self_conditioning_layers=[1, 2]
    )
    assert grown.num_parameters() > model.num_parameters()
    assert torch.equal(grown(**inputs, labels=LABELS).logits, model(**inputs, labels=LABELS).logits)
    grown.train()(**inputs, labels=LABELS).loss.backward()  # and can leave its start
    assert all(layer.convolution.down_proj.weight.grad.abs().sum() > 0 for layer in grown.model.encoder.layers)
    assert grown.model.encoder.self_conditioning.weight.grad.abs().sum() > 0


def test_initialisation_is_the_same_by_way_of_the_meta_device(tmp_path):
    config = tiny_config("all", learn_theta=True)
    torch.manual_seed(0)
    direct = EchoForConditionalGeneration(config)
    direct.save_pretrained(tmp_path)
    loaded = EchoForConditionalGeneration.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(direct.named_parameters(), loaded.named_parameters()):
        assert torch.equal(a, b), name
    assert not list(direct.buffers())  # nothing that a load could leave behind


@pytest.mark.parametrize("field", ["encoder_num_hidden_layers", "decoder_num_hidden_layers", "stem_num_layers"])
def test_weights_with_more_layers_than_the_config_are_refused(field, tmp_path):
    tiny_model(stem_num_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{field} is 1, and the weights have [23] layers"):
        EchoForConditionalGeneration.from_pretrained(tmp_path, **{field: 1})


@pytest.mark.parametrize("dtype", ["evil", "nn", "int8", torch.int8])
def test_a_dtype_that_no_weights_can_have_is_refused(dtype, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of float32, float16"):
        EchoForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)


def test_embeddings_are_tied_and_can_be_resized():
    model, inputs = tiny_model(), make_inputs()
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    before = model(**inputs, labels=LABELS)
    model.resize_token_embeddings(75)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert model.config.vocab_size == model.proj_out.out_features == model.ctc_head.out_features == 75
    after = model(**inputs, labels=LABELS)
    torch.testing.assert_close(after.logits[..., :67], before.logits)
    torch.testing.assert_close(after.ctc_logits[..., :67], before.ctc_logits)
    grown = tiny_model(self_conditioning_layers=[2])
    before = grown(**inputs, labels=LABELS).ctc_logits
    with torch.no_grad():
        grown.resize_token_embeddings(75).weight[67:] = 0.0
        grown.model.encoder.intermediate_head.bias[67:] = -torch.inf  # who has no share says nothing
    torch.testing.assert_close(grown(**inputs, labels=LABELS).ctc_logits[..., :67], before)
    untied = tiny_model(tie_word_embeddings=False)
    assert untied.proj_out.weight is not untied.model.decoder.embed_tokens.weight
    with torch.no_grad():
        assert untied(**inputs, labels=LABELS).logits.shape[-1] == 67
    encoder = EchoForCTC(tiny_config(self_conditioning_layers=[2]))
    encoder.resize_token_embeddings(75, pad_to_multiple_of=8)
    assert encoder.config.vocab_size == 80 == encoder(**inputs, labels=LABELS).logits.shape[-1]
    assert encoder.get_encoder().intermediate_head.out_features == 80
    bare = tiny_model(cls=EchoModel, self_conditioning_layers=[2])
    bare.resize_token_embeddings(75)
    assert bare.encoder.self_conditioning.in_features == 75 == bare.decoder.embed_tokens.num_embeddings


def test_ctc_model_shares_checkpoints_with_the_hybrid_model(tmp_path):
    model, inputs = tiny_model(), make_inputs()
    model.save_pretrained(tmp_path)
    ctc, info = EchoForCTC.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    hybrid = model(**inputs, labels=LABELS)
    outputs = ctc(**inputs, labels=LABELS)
    real = model.model.encoder(**inputs).attention_mask > 0
    assert torch.equal(outputs.logits[real], hybrid.ctc_logits[real])
    assert (outputs.logits[~real].argmax(-1) == 0).all()
    torch.testing.assert_close(outputs.loss, hybrid.ctc_loss)


def test_both_heads_stand_on_models_of_their_own(tmp_path):
    hybrid, ctc = tiny_model(), tiny_model(cls=EchoForCTC)
    assert {name for name, _ in ctc.named_parameters()} < {name for name, _ in hybrid.named_parameters()}
    inputs = make_inputs()
    for model in (hybrid, ctc):
        assert isinstance(model.base_model, EchoEncoderModel) and model.base_model.config is model.config
        assert isinstance(model.get_encoder(), EchoEncoder) and model.get_encoder() is model.base_model.encoder
        model.base_model.save_pretrained(tmp_path / type(model).__name__)
        expected = model.get_encoder()(**inputs).last_hidden_state
        for cls in (EchoEncoderModel, type(model.base_model)):
            loaded, info = cls.from_pretrained(tmp_path / type(model).__name__, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            assert torch.equal(loaded.get_encoder()(**inputs).last_hidden_state, expected)
    assert torch.equal(ctc.base_model(**inputs).last_hidden_state, expected)
    ctc.freeze_encoder()
    assert [name for name, parameter in ctc.named_parameters() if parameter.requires_grad] == [
        "ctc_head.weight",
        "ctc_head.bias",
    ]


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("preset", ["baseline", "all"])
def test_half_precision_inference(preset, dtype, tolerance):
    torch.manual_seed(0)
    model, inputs = tiny_model(preset), make_inputs()
    with torch.no_grad():
        expected = model(**inputs, labels=LABELS).logits
        half = model.to(dtype)(**inputs, labels=LABELS).logits
    assert half.dtype == dtype
    assert (half.float() - expected).abs().max() < tolerance * max(expected.abs().max(), 1)
    cast = {"input_features": inputs["input_features"].to(dtype), "attention_mask": inputs["attention_mask"]}
    assert model.generate(**cast, max_new_tokens=4).shape[0] == 3


def test_angles_are_precise_whatever_the_dtype():
    config = tiny_config("published_mean_sigmoid", theta_mode="none")
    rotary = EchoRotaryEmbedding(config, 64)
    expected = rotary(torch.arange(1501)[None], torch.float32)[0][0, 0, 1500]
    assert torch.equal(rotary.to(torch.bfloat16)(torch.arange(1501)[None], torch.float32)[0][0, 0, 1500], expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, inputs = tiny_model().train(), make_inputs()
    model(**inputs, labels=LABELS).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(**inputs, labels=LABELS).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
        model.zero_grad()


def test_gradient_checkpointing_goes_without_a_cache():
    model, inputs = tiny_model().train(), make_inputs()
    tokens = torch.tensor([[1, 5, 6, 7]] * 3)
    expected = model(**inputs, decoder_input_ids=tokens, use_cache=False).logits
    expected.sum().backward()
    gradient = model.model.decoder.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    outputs = model(**inputs, decoder_input_ids=tokens, use_cache=True)
    assert outputs.get(CACHE_NAME) is None
    outputs.logits.sum().backward()
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(model.model.decoder.layers[0].self_attn.k_proj.weight.grad, gradient)


def test_device_map_and_dtype_loading(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = EchoForConditionalGeneration.from_pretrained(tmp_path, device_map="auto", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generate(**make_inputs(), max_new_tokens=3).shape[0] == 3


def test_freezing_the_encoder():
    model = tiny_model()
    model.freeze_encoder()
    model(**make_inputs(), labels=LABELS).loss.backward()
    assert all(p.grad is None for p in model.model.encoder.parameters())
    assert model.model.decoder.embed_tokens.weight.grad is not None

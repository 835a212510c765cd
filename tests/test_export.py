"""Exported programs and quantized weights say what the model says."""

import copy

import pytest
import torch
from transformers import TorchAoConfig

from echo_hf import EchoConfig, EchoForConditionalGeneration

SMALL = {"size": "2m", "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1, "stem_num_layers": 1}
SMALL["max_target_positions"] = 24
SHAPES = ((1, 11), (3, 20), (2, 101), (1, 302))  # batch, frames


def make_model(preset="all", **overrides):
    torch.manual_seed(0)
    model = EchoForConditionalGeneration(EchoConfig.from_preset(preset, **{**SMALL, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at 0, the mechanisms, shall act
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.proj_out.weight.normal_()
    return model


def with_f0(inputs, value):
    """The same speech with one F0 throughout: 0 Hz for a whisper, a number for a monotone."""
    features = inputs["input_features"].clone()
    features[..., -1] = value * inputs["attention_mask"]
    return {**inputs, "input_features": features}


def hard_inputs(model):
    """What has no variance of F0 to divide by, or nothing but silence."""
    for batch, frames in ((1, 101), (2, 30)):
        inputs = make_inputs(model, batch, frames)
        yield with_f0(inputs, 0.0)
        yield with_f0(inputs, 150.3)
        yield {**inputs, "input_features": torch.zeros_like(inputs["input_features"])}
    short = make_inputs(model, 1, 11)
    short["attention_mask"][:, 1:] = 0
    yield {**short, "input_features": short["input_features"] * short["attention_mask"][..., None]}  # a single frame


def make_inputs(model, batch, frames):
    """Noise with a pitch that wanders, unvoiced at times; all but the first a few frames shorter."""
    generator = torch.Generator().manual_seed(batch * frames)
    features = 2 * torch.rand(batch, frames, model.config.num_feature_channels, generator=generator)
    features[..., -1] = (100 + 200 * features[..., -1]) * (features[..., 0] > 0.5)
    mask = torch.ones(batch, frames, dtype=torch.long)
    mask[1:, frames - frames // 3 :] = 0
    return {"input_features": features * mask[..., None], "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, overrides",
    [
        ("baseline", {}),
        (
            "all",
            {
                "pitch_bias": "laplacian",
                "decoder_num_key_value_heads": 2,
                "encoder_num_hidden_layers": 2,
                "encoder_kernel_size": 3,
                "self_conditioning_layers": [1],
            },
        ),
    ],
)
@torch.no_grad()
def test_an_exported_program_equals_the_model(preset, overrides):
    model = make_model(preset, **overrides)
    tokens = torch.randint(3, 259, (3, 4), generator=torch.Generator().manual_seed(0))

    def arguments(inputs):
        return {**inputs, "decoder_input_ids": tokens[: len(inputs["input_features"])], "use_cache": False}

    example = arguments(make_inputs(model, 2, 121))
    free = {name: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for name in example if name != "use_cache"}
    program = torch.export.export(model, (), example, dynamic_shapes={**free, "use_cache": None}).module()
    for inputs in (*hard_inputs(model), *(make_inputs(model, *shape) for shape in SHAPES)):
        expected, got = model(**arguments(inputs)), program(**arguments(inputs))
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)


# Quantised inference -------------------------------------------------------------------------------------------------


def relative_error(model, other, inputs):
    tokens = torch.randint(3, 259, (len(inputs["input_features"]), 6), generator=torch.Generator().manual_seed(0))
    ours, theirs = (m(**inputs, decoder_input_ids=tokens).logits for m in (model, other))
    return ((ours - theirs).norm() / ours.norm()).item()


def test_no_matrix_of_a_few_columns_is_offered_to_quantisation():
    """Libraries quantise whatever is an nn.Linear, and fail at one column."""
    model = make_model()
    columns = {name: m.in_features for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(columns) > 10 and min(columns.values()) >= 32, columns


@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
def test_dynamic_quantisation_stays_close():
    model = make_model()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    inputs = make_inputs(model, 3, 101)
    kinds = {type(module).__module__ for module in quantized.modules()}
    assert any("quantized.dynamic" in kind for kind in kinds)
    assert 0 < relative_error(model, quantized, inputs) < 0.1
    assert quantized.generate(**inputs, max_new_tokens=4).shape[0] == 3


@torch.no_grad()
def test_weights_in_eight_bits_stay_close_and_are_saved(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = make_model()
    model.save_pretrained(tmp_path / "whole")
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = EchoForConditionalGeneration.from_pretrained(tmp_path / "whole", quantization_config=settings).eval()
    inputs = make_inputs(model, 3, 101)
    assert 0 < relative_error(model, quantized, inputs) < 0.03
    assert quantized.generate(**inputs, max_new_tokens=4).shape[0] == 3

    quantized.save_pretrained(tmp_path / "small")
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("small", "whole")]
    assert sizes[0] < 0.5 * sizes[1]
    again = EchoForConditionalGeneration.from_pretrained(tmp_path / "small").eval()
    assert relative_error(quantized, again, inputs) == 0.0

"""Exported graphs say what the model says, at lengths and batch sizes they were not made with."""

import copy

import numpy as np
import pytest
import torch
from transformers import TorchAoConfig

from echo_hf import EchoConfig, EchoForConditionalGeneration
from echo_hf.export import (
    DECODER_FILE,
    DecoderForExport,
    EncoderForExport,
    OnnxEcho,
    export_onnx,
    export_programs,
    min_frames,
)
from echo_hf.modeling_echo import standardize_f0

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
    short = make_inputs(model, 1, min_frames(model))
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
        # With what the graphs of ONNX below do not have.
        (
            "all",
            {
                "pitch_bias": "laplacian",
                "token_pitch": "median",
                "decoder_num_key_value_heads": 2,
                "encoder_num_hidden_layers": 2,
                "encoder_kernel_size": 3,
                "self_conditioning_layers": [1],
            },
        ),
    ],
)
@torch.no_grad()
def test_exported_programs_equal_the_model(preset, overrides):
    model = make_model(preset, **overrides)
    encoder, decoder = (program.module() for program in export_programs(model))
    for inputs in hard_inputs(model):
        torch.testing.assert_close(encoder(**inputs), EncoderForExport(model)(**inputs), atol=1e-4, rtol=1e-4)
    for batch, frames in SHAPES:
        inputs = make_inputs(model, batch, frames)
        expected, got = EncoderForExport(model)(**inputs), encoder(**inputs)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        # Step after step, the decoder says what the whole model says of the whole sequence.
        tokens = torch.randint(3, 259, (batch, 4))
        tokens[:, 0] = model.config.decoder_start_token_id
        whole = model(**inputs, decoder_input_ids=tokens, use_cache=False).logits
        logits, keys, values, *heard = got
        torch.testing.assert_close(logits, whole[:, 0], atol=1e-4, rtol=1e-4)
        for t in range(1, 4):
            names = ("cross_keys", "cross_values", "encoder_mask", "token_pitch")
            step = {"input_ids": tokens[:, t : t + 1], "keys": keys, "values": values, **dict(zip(names, heard))}
            eager = DecoderForExport(model)(**step)
            logits, keys, values = decoder(**step)
            torch.testing.assert_close((logits, keys, values), eager, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(logits, whole[:, t], atol=1e-4, rtol=1e-4)


def test_a_folder_without_graphs_is_named(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(FileNotFoundError, match="has no encoder.onnx; export_onnx"):
        OnnxEcho(tmp_path)


@torch.no_grad()
def test_an_onnx_graph_standardizes_a_constant_as_torch_does(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    class Standardize(torch.nn.Module):
        def forward(self, f0, mask):
            return standardize_f0(f0, mask)

    varied = torch.tensor([[0.0, 120.0, 240.0, 0.0]])
    mask = torch.ones_like(varied)
    torch.onnx.export(
        Standardize().eval(), (varied, mask), tmp_path / "f.onnx", input_names=["f0", "mask"], verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "f.onnx", providers=["CPUExecutionProvider"])
    for f0 in (varied, torch.zeros_like(varied), torch.full_like(varied, 150.3)):
        got = session.run(None, {"f0": f0.numpy(), "mask": mask.numpy()})[0]
        np.testing.assert_allclose(got, standardize_f0(f0, mask).numpy(), atol=0.05)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_writes_what_the_model_writes(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    model = make_model(decoder_num_hidden_layers=2)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    exported = OnnxEcho(export_onnx(model, tmp_path), options)
    assert (tmp_path / DECODER_FILE).is_file()
    lengths = set()
    shapes = (*SHAPES, (2, min_frames(model) - 1))
    for inputs in (*(make_inputs(model, *shape) for shape in shapes), *hard_inputs(model)):
        frames = inputs["input_features"].shape[1]
        arrays = {name: values.numpy() for name, values in inputs.items()}
        tokens = exported.generate(**arrays)
        expected = model.generate(**inputs, ctc_weight=0.0, do_sample=False)
        np.testing.assert_array_equal(tokens, expected.numpy())
        lengths.add(tokens.shape[1])
        assert exported.generate(**arrays, max_length=5).shape[1] <= 5
        if frames < min_frames(model):
            continue
        got = exported.encoder.run(None, arrays)
        for theirs, ours in zip(got, EncoderForExport(model)(**inputs)):
            np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4, rtol=1e-4)
    assert max(lengths) > 5


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

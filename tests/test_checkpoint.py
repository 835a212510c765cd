"""Whatever is wrong with a checkpoint is said once, by the name of the file and with the remedy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo_hf import EchoForConditionalGeneration, EchoForCTC, EchoTokenizer
from echo_hf.checkpoint import load_model_and_processor, parse_overrides
from echo_hf.cli import main
from echo_hf.inference import load_checkpoint
from echo_hf.training import ModelArguments, build_model_and_processor

WEIGHTS = "model.safetensors"


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(name, **changes):
    def change(folder):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changes}))

    return change


def narrow_features(folder):
    values = json.loads((folder / "processor_config.json").read_text())
    values["feature_extractor"]["feature_groups"] = {"spectrogram": 40, "pitch": 1}
    (folder / "processor_config.json").write_text(json.dumps(values))


def enlarge_tokenizer(folder):
    EchoTokenizer().train_new_from_iterator(["aaaa bbbb cccc"] * 9, 262).save_pretrained(folder)


def take_weights_out(folder):
    weights = {name: value for name, value in load_file(folder / WEIGHTS).items() if "mlp.gate" not in name}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def pickle_weights(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def lose_a_shard(folder):
    EchoForConditionalGeneration.from_pretrained(folder).save_pretrained(folder, max_shard_size="1MB")
    (folder / WEIGHTS).unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def spoil_weights(folder):
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if "proj" in name)
    weights[name][0, 0] = torch.nan
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def add_layer(folder):
    weights = load_file(folder / WEIGHTS)
    second = {name.replace("layers.0.", "layers.1."): values.clone() for name, values in weights.items()}
    save_file({**weights, **second}, folder / WEIGHTS, metadata={"format": "pt"})


def write_index(folder):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": null}')


def take_whisper(folder):
    values = json.loads((folder / "processor_config.json").read_text())
    values["feature_extractor"] = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80}
    (folder / "processor_config.json").write_text(json.dumps(values))


NESTED = "[" * 100_000

FAULTS = {
    "weights cut off": (cut(WEIGHTS, 100_000), rf"{WEIGHTS} is cut off or damaged: .* Copy or download it again"),
    "weights empty": (cut(WEIGHTS, 0), f"{WEIGHTS} is cut off or damaged"),
    "weights missing": (remove(WEIGHTS), rf"has no weights \({WEIGHTS}\)"),
    "weights incomplete": (take_weights_out, r"weights lack model\..*mlp\.gate.*Copy both from the same model"),
    "weights pickled": (pickle_weights, f"in pytorch_model.bin only, a pickle, .* Ask its author for {WEIGHTS}"),
    "shard missing": (lose_a_shard, r"model-00002-of-.*\.safetensors of its weights is missing: copy it"),
    "config missing": (remove("config.json"), "it has no config.json"),
    "config cut off": (cut("config.json", 50), "config.json is cut off or damaged"),
    "config of another model": (
        edit("config.json", model_type="whisper"),
        "config.json is of a model of type 'whisper'",
    ),
    "config of other shapes": (
        edit("config.json", decoder_intermediate_size=200),
        r"config.json does not describe the weights. .* is \(144, 384\) in the file and \(144, 200\) by the config",
    ),
    "config with newer fields": (
        edit("config.json", theta_of_tomorrow=1, transformers_version="9.0.0"),
        "config.json has fields that .* does not know.*: theta_of_tomorrow.*git pull, pip install",
    ),
    "config with newer values": (
        edit("config.json", theta_mode="of tomorrow"),
        "config.json: .*'theta_mode'.* got of tomorrow.*git pull, pip install",
    ),
    "config null": (write("config.json", "null"), "config.json is damaged: it holds no JSON object"),
    "config a list": (write("config.json", "[]"), "config.json is damaged: it holds no JSON object"),
    "config too deep": (write("config.json", NESTED), "config.json is cut off or damaged: .*recursion"),
    "config deep": (edit("config.json", dropout=json.loads("[" * 900 + "]" * 900)), "config.json: "),
    "config of no type": (edit("config.json", dtype="evil"), "config.json: .*evil"),
    "config of fewer layers": (
        add_layer,
        r"config.json .*weights have (model\..*layers\.1.* does not ask for|2 layers)",
    ),
    "weights NaN": (spoil_weights, "proj.*weights has NaN or infinite values.*before its training diverged"),
    "index damaged": (write_index, "index.json is damaged: it names no files"),
    "generation config null": (write("generation_config.json", "null"), "generation_config.json is damaged"),
    "extractor null": (write("processor_config.json", "null"), "processor_config.json is damaged"),
    "extractor too deep": (write("processor_config.json", NESTED), "processor_config.json is cut off or damaged"),
    "extractor of Whisper": (take_whisper, "processor_config.json .*WhisperFeatureExtractor.*save it again"),
    "tokenizer too deep": (write("tokenizer.json", NESTED), "tokenizer.json is cut off or damaged"),
    "tokenizer config null": (write("tokenizer_config.json", "null"), "tokenizer_config.json is damaged"),
    "end out of range": (
        edit("generation_config.json", eos_token_id=[2, 259]),
        "generation_config.json: eos_token_id has 259, and the model's tokens are 0 to 258. Copy the file",
    ),
    "suppressed out of range": (
        edit("generation_config.json", suppress_tokens=[-1]),
        "generation_config.json: suppress_tokens has -1",
    ),
    "generation config cut off": (cut("generation_config.json", 10), "generation_config.json is cut off or damaged"),
    "extractor missing": (remove("processor_config.json"), "has no processor_config.json: copy it from"),
    "extractor cut off": (cut("processor_config.json", 30), "processor_config.json is cut off or damaged"),
    "extractor of another model": (narrow_features, "processor_config.json .*feature_groups.*save it again"),
    "tokenizer missing": (remove("tokenizer.json"), "has no tokenizer.json: copy it from"),
    "tokenizer cut off": (cut("tokenizer.json", 500), "tokenizer.json is cut off or damaged"),
    "tokenizer no tokenizer": (
        edit("tokenizer.json", model={"type": "?"}),
        "processor_config.json and tokenizer.json are not those of the model",
    ),
    "tokenizer of another model": (enlarge_tokenizer, "tokenizer.json .*the tokenizer has 262 tokens, the model 259"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_refused_by_the_name_of_its_file(fault, checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    change, message = FAULTS[fault]
    change(folder)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        load_model_and_processor(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_commands_say_so_without_a_traceback(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "broken")
    cut(WEIGHTS, 1000)(tmp_path / "broken")
    assert main(["transcribe", "--checkpoint", str(tmp_path / "broken")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path / 'broken' / WEIGHTS} is cut off or damaged" in error
    with pytest.raises(ValueError, match="cut off or damaged"):
        build_model_and_processor(ModelArguments(model_name_or_path=str(tmp_path / "broken")), [])


def test_what_is_whole_loads_as_it_was_saved(checkpoint, ctc_checkpoint):
    for folder, model_class in ((checkpoint, EchoForConditionalGeneration), (ctc_checkpoint, EchoForCTC)):
        model, processor = load_model_and_processor(folder)
        assert type(model) is model_class
        for name, values in load_file(Path(folder) / WEIGHTS).items():
            assert torch.equal(model.state_dict()[name], values)
        assert len(processor.tokenizer) == model.config.vocab_size
    # To train further, the decoder that a CTC checkpoint lacks is made.
    model, _ = load_model_and_processor(ctc_checkpoint, EchoForConditionalGeneration, dropout=0.2)
    assert type(model) is EchoForConditionalGeneration and model.config.dropout == 0.2


# The radius is left out, as it does nothing before it is trained, and so is the bias, whose projections are narrower.
OFF = {
    "theta_mode": "none",
    "silence_scaling": False,
    "pitch_gate": False,
    "pitch_stem": False,
    "token_pitch": "none",
}


@pytest.mark.parametrize("name", OFF)
def test_a_mechanism_is_switched_off_without_a_word(name, checkpoint, caplog):
    from transformers.utils import logging

    whole, _ = load_model_and_processor(checkpoint)
    logging.enable_propagation()
    try:
        model, _ = load_checkpoint(checkpoint, "cpu", **{name: OFF[name]})
    finally:
        logging.disable_propagation()
    assert caplog.text == ""
    assert any("silence_logit" in key for key in model.state_dict()) == (name != "silence_scaling")
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in model.state_dict().items())
    assert model.generation_config.suppress_tokens == whole.generation_config.suppress_tokens
    torch.manual_seed(0)
    features = torch.randn(1, 40, sum(model.config.feature_groups.values()))
    features[..., -1] = 150.0  # Hz, and silent at the end
    features[:, 20:] = 0.0
    inputs = {"input_features": features, "decoder_input_ids": torch.tensor([[1, 70, 71]])}
    with torch.no_grad():
        is_same = torch.allclose(model(**inputs).logits, whole.eval()(**inputs).logits, atol=1e-6)
    assert is_same == (name == "theta_mode"), "the contour's gains start at 0; all else is felt"


def test_what_the_weights_do_not_hold_cannot_be_switched_on(checkpoint, tmp_path):
    load_model_and_processor(checkpoint, silence_scaling=False)[0].save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(checkpoint) / name, tmp_path)
    with pytest.raises(ValueError, match="weights lack .*silence_logit .* or leave silence_scaling as it was saved"):
        load_model_and_processor(tmp_path, silence_scaling=True)
    with pytest.raises(ValueError, match="does not describe the weights.* or leave decoder_intermediate_size"):
        load_model_and_processor(checkpoint, decoder_intermediate_size=200)
    with pytest.raises(ValueError, match="config.json cannot be changed by theta_mode='of tomorrow'"):
        load_model_and_processor(checkpoint, theta_mode="of tomorrow")


def test_overrides_are_json_where_they_can_be():
    assert parse_overrides(None) == parse_overrides(" ") == {}
    assert parse_overrides("dropout=0.1, learn_theta=true,theta_mode=none,mask_time_length=5") == {
        "dropout": 0.1,
        "learn_theta": True,
        "theta_mode": "none",
        "mask_time_length": 5,
    }
    assert parse_overrides('{"stem_strides": [2, 1]}') == {"stem_strides": [2, 1]}


@pytest.mark.parametrize(
    "text, message",
    [
        ("dropot=0.1", r"no field 'dropot'\. Did you mean dropout"),
        ("dropout", "'dropout' is not key=value"),
        ("=1", "is not key=value"),
        ("{dropout: 1}", "is not JSON"),
    ],
)
def test_bad_overrides_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(text)


def test_nothing_is_pickled_and_no_pickle_is_loaded(checkpoint, tmp_path):
    """By whatever way, the library's own included, unless it is asked for."""
    from transformers import AutoModelForSpeechSeq2Seq

    model = EchoForConditionalGeneration.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="1MB")
    suffixes = {path.suffix for folder in ("one", "many") for path in (tmp_path / folder).iterdir()}
    assert suffixes == {".json", ".py", ".safetensors"}
    pickle_weights(tmp_path / "one")
    for cls in (AutoModelForSpeechSeq2Seq, EchoForConditionalGeneration):
        with pytest.raises(OSError, match=f"no file named {WEIGHTS} found in directory {tmp_path / 'one'}"):
            cls.from_pretrained(tmp_path / "one")
    again = EchoForConditionalGeneration.from_pretrained(tmp_path / "one", use_safetensors=False)
    assert all(torch.equal(again.state_dict()[name], values) for name, values in model.state_dict().items())


def test_what_was_saved_in_half_precision_is_trained_in_whole(checkpoint, tmp_path):
    model, processor = load_model_and_processor(checkpoint)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    loaded, _ = load_model_and_processor(tmp_path / "half")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32} == {loaded.dtype}

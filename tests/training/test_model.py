"""Config, tokenizer and processor of a new model fit each other; a checkpoint stays what it is."""

import pytest
import torch

from echo_hf import EchoConfig, EchoFeatureExtractor, EchoProcessor, EchoTokenizer
from echo_hf.checkpoint import check_fit
from echo_hf.configuration_echo import BASELINE
from echo_hf.training import ModelArguments
from echo_hf.training.model import build_config, build_model_and_processor, build_processor, build_tokenizer
from tiny_training import model_arguments


def test_a_config_without_preset_has_the_mechanisms_of_echo_config():
    config, default = build_config(ModelArguments(size="2m")), EchoConfig()
    assert {name: getattr(config, name) for name in BASELINE} == {name: getattr(default, name) for name in BASELINE}
    assert config.encoder_hidden_size < default.encoder_hidden_size
    assert build_config(ModelArguments(preset="baseline")).pitch_mechanisms == []
    assert build_config(ModelArguments(preset="baseline", config_overrides="pitch_gate=true")).pitch_gate


def test_vocabulary_is_of_bytes_characters_or_subwords():
    texts = ["the cat sat on the mat", "the hat"] * 5
    assert len(build_tokenizer(texts, "byte")) == len(build_tokenizer(texts, "byte", 259)) == 259
    assert len(build_tokenizer(texts, "subword", 262)) == 262
    assert len(build_tokenizer(texts)) == len(build_tokenizer(texts, "character")) == 259  # all of one byte
    assert len(build_tokenizer([*texts, "да нет"])) == 264
    with pytest.raises(ValueError, match="at least 259"):
        build_tokenizer(texts, vocab_size=100)
    for unit, size, message in (
        ("subword", None, "needs a vocab_size"),
        ("byte", 300, "259 with"),
        ("word", None, "word"),
    ):
        with pytest.raises(ValueError, match=message):
            build_tokenizer(texts, unit, size)
    # A text too small for the vocabulary: the model gets as many tokens as there are.
    model, processor = build_model_and_processor(model_arguments(token_unit="subword", vocab_size=5000), texts)
    assert len(processor.tokenizer) == model.config.vocab_size < 5000


def test_processor_follows_the_config():
    config = build_config(ModelArguments(config_overrides="sampling_rate=8000,hop_length=80"))
    extractor = build_processor(config, EchoTokenizer()).feature_extractor
    assert (extractor.sampling_rate, extractor.hop_length, extractor.n_fft) == (8000, 80, 200)
    extractor = build_processor(EchoConfig(), EchoTokenizer()).feature_extractor
    assert extractor.to_dict() == EchoFeatureExtractor().to_dict()


@pytest.mark.parametrize("f0_method", ["dio", "autocorrelation"])
def test_the_tracker_of_f0_is_the_processors_and_is_saved(f0_method, tmp_path):
    _, processor = build_model_and_processor(model_arguments(f0_method=f0_method), ["a", "b"])
    processor.save_pretrained(tmp_path)
    assert EchoFeatureExtractor.from_pretrained(tmp_path).f0_method == f0_method


@pytest.mark.parametrize(
    "extractor, tokenizer, message",
    [
        ({"feature_groups": {"spectrogram": 40, "pitch": 1}}, EchoTokenizer(), "feature_groups: the feature extractor"),
        ({"hop_length": 80}, EchoTokenizer(), "hop_length: the feature extractor has 80, the model 160"),
        ({}, EchoTokenizer().train_new_from_iterator(["aaaa bbbb"] * 9, 261), "vocab_size: the tokenizer has 261"),
    ],
)
def test_what_does_not_fit_is_named(extractor, tokenizer, message):
    processor = EchoProcessor(EchoFeatureExtractor(**extractor), tokenizer)
    with pytest.raises(ValueError, match=message):
        check_fit(processor, EchoConfig())


def test_one_of_several_ends_may_be_the_tokenizers():
    processor = build_processor(EchoConfig(), EchoTokenizer())
    check_fit(processor, EchoConfig(eos_token_id=[2, 5]))
    with pytest.raises(ValueError, match=r"eos_token_id: 2 in the tokenizer, \[5\] in the model"):
        check_fit(processor, EchoConfig(eos_token_id=[5]))


def test_a_checkpoint_cannot_be_made_another_model(tmp_path):
    with pytest.raises(ValueError, match="size belongs to a new model"):
        build_model_and_processor(ModelArguments(model_name_or_path=str(tmp_path), size="2m"), [])
    with pytest.raises(ValueError, match="vocab_size is an option of its own"):
        build_config(ModelArguments(config_overrides="vocab_size=300"))


def test_layers_that_a_checkpoint_lacks_add_nothing_until_they_learn(tmp_path):
    start, processor = build_model_and_processor(model_arguments(), ["low", "high"])
    start.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    overrides = "encoder_num_hidden_layers=3,decoder_num_hidden_layers=2,encoder_kernel_size=3,stem_num_layers=5"
    deeper, _ = build_model_and_processor(
        ModelArguments(model_name_or_path=str(tmp_path), config_overrides=overrides), []
    )
    assert len(deeper.model.encoder.layers) == 3 and len(deeper.model.decoder.layers) == 2
    inputs = {
        "input_features": torch.rand(2, 40, start.config.num_feature_channels),
        "labels": processor.tokenizer(["low", "high"], padding=True, return_tensors="pt")["input_ids"],
    }
    torch.testing.assert_close(deeper.eval()(**inputs).logits, start.eval()(**inputs).logits, rtol=0, atol=0)
    deeper.train()(**inputs).loss.backward()
    for block in (deeper.model.encoder, deeper.model.decoder):
        assert block.layers[-1].self_attn.o_proj.weight.grad.any()
        assert block.layers[-1].mlp.down_proj.weight.grad.any()

"""EchoConfig: defaults, presets, errors, round trips."""

import json
import logging

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from echo_hf.configuration_echo import BASELINE, PRESETS, SIZES, EchoConfig


def test_default_config_logs_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        EchoConfig()
    assert not caplog.records


def test_every_field_is_documented():
    own = set(EchoConfig.__annotations__)
    for name in own - {"is_encoder_decoder"}:
        assert f"\n        {name} (`" in EchoConfig.__doc__, name


def test_round_trip(tmp_path):
    config = EchoConfig.from_preset(
        "all", size="2m", stem_strides=[2, 3], dropout=0.25, feature_groups={"pitch": 1, "spectrogram": 40}
    )
    config.save_pretrained(tmp_path)
    loaded = EchoConfig.from_pretrained(tmp_path)
    ignored = {"transformers_version", "_name_or_path"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }


def test_saved_config_names_code_that_lies_beside_it(tmp_path):
    EchoConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    references = [saved["custom_pipelines"]["automatic-speech-recognition"]["impl"]]
    for value in saved["auto_map"].values():
        references += value if isinstance(value, list) else [value]
    for reference in filter(None, references):
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()
    # Natively the pipeline comes from the package: the name would make `pipeline()` ask for trust_remote_code.
    assert not hasattr(EchoConfig.from_pretrained(tmp_path), "custom_pipelines")


def test_the_older_name_of_dtype_is_checked_too():
    with pytest.raises(ValueError, match="dtype must be one of .* got 'evil'"):
        EchoConfig(torch_dtype="evil")


def test_a_model_too_large_for_any_machine_is_refused():
    with pytest.raises(ValueError, match="about 2e\\+12 parameters.*vocab_size.*num_hidden_layers"):
        EchoConfig(encoder_hidden_size=16384, encoder_intermediate_size=16384, encoder_num_hidden_layers=1000)


def test_settings_of_generate_are_refused_in_the_models_config(tmp_path):
    """As scripts for Whisper set them: what does nothing may stand, and leaves no trace; the rest is refused."""
    config = EchoConfig()
    before = config.to_dict()
    for name, value in {"suppress_tokens": [], "begin_suppress_tokens": None, "forced_decoder_ids": None}.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    assert (
        config.to_dict()
        == before
        == EchoConfig.from_pretrained(tmp_path).to_dict() | {"transformers_version": before.get("transformers_version")}
    )
    for name, value in {"max_length": 225, "num_beams": 5, "language": "hi", "forced_decoder_ids": [[1, 5]]}.items():
        with pytest.raises(ValueError, match=rf"{name} is a setting of generate\(\).*model.generation_config.{name}"):
            setattr(config, name, value)
    config.use_cache, config.dropout, config.apply_spec_augment = False, 0.1, True
    config.save_pretrained(tmp_path)
    loaded = EchoConfig.from_pretrained(tmp_path)
    assert (loaded.use_cache, loaded.dropout, loaded.apply_spec_augment) == (False, 0.1, True)


def test_feature_groups_take_their_fixed_order():
    config = EchoConfig(feature_groups={"pitch": 1, "voicing": 1, "spectrogram": 80})
    assert list(config.feature_groups) == ["spectrogram", "voicing", "pitch"]
    assert config.num_feature_channels == 82


@pytest.mark.parametrize(
    "field, value",
    [
        ("vocab_size", 0),
        ("feature_groups", {"spectrogram": 80, "envelope": 24, "pitch": 1}),
        ("feature_groups", {"pitch": 1}),
        ("feature_groups", {"spectrogram": 0, "pitch": 1}),
        ("feature_groups", {"spectrogram": 80, "pitch": 2}),
        ("feature_groups", {"spectrogram": 80}),
        ("encoder_kernel_size", 4),
        ("encoder_kernel_size", -1),
        ("self_conditioning_layers", [0]),
        ("self_conditioning_layers", [3, 3]),
        ("self_conditioning_layers", [8]),  # the last has the CTC head
        ("stem_strides", []),
        ("stem_strides", [2, 0]),
        ("encoder_hidden_size", 250),
        ("decoder_hidden_size", 254),
        ("encoder_num_key_value_heads", 3),
        ("decoder_num_hidden_layers", 0),
        ("rotary_theta", -1.0),
        ("mel_corner_frequency", 0.0),
        ("tokens_per_second", 0.0),
        ("silence_threshold", -0.1),
        ("silence_scale_range", [0.5, 0.1]),
        ("dropout", 1.0),
        ("encoder_layerdrop", 0.1),
        ("decoder_layerdrop", -0.1),
        ("encoder_attention_window", 4),
        ("label_smoothing", -0.1),
        ("ctc_loss_weight", 1.5),
        ("mask_time_prob", 2.0),
        ("mask_time_min_masks", -1),
        ("mask_feature_length", 0),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", 1e-8),
        ("vocab_size", 10**9),
        ("encoder_num_hidden_layers", 10**5),
        ("decoder_num_hidden_layers", 10**5),
        ("stem_num_layers", 10**5),
        ("encoder_hidden_size", 10**9),
        ("decoder_hidden_size", 10**9),
        ("encoder_intermediate_size", 10**9),
        ("decoder_num_attention_heads", 10**9),
        ("encoder_num_key_value_heads", -4),
        ("encoder_kernel_size", 10**9 + 1),
        ("feature_groups", {"spectrogram": 10**9, "pitch": 1}),
        ("stem_strides", [2**20]),
        ("stem_strides", [1] * 1000),
        ("hop_length", 10**9),
        ("hop_length", 0),
        ("sampling_rate", 10**12),
        ("tokens_per_second", 1e-3),
        ("tokens_per_second", float("nan")),
        ("rotary_theta", float("inf")),
        ("silence_threshold", float("nan")),
        ("max_target_positions", 10**9),
        ("initializer_range", float("nan")),
        ("bos_token_id", 259),
        ("eos_token_id", [2, -1]),
        ("decoder_start_token_id", 10**6),
        ("dtype", "evil"),
        ("dtype", "nn"),
        ("dtype", "int8"),
        ("pad_token_id", -1),
        ("pad_token_id", None),
        ("pad_token_id", 2),
        ("decoder_start_token_id", None),
    ],
)
def test_impossible_values_raise_and_name_the_field(field, value, tmp_path):
    with pytest.raises(ValueError, match=field):
        EchoConfig(**{field: value})
    EchoConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=field):  # also as a change to a saved one
        EchoConfig.from_pretrained(tmp_path, **{field: value})
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, field: value}))
    with pytest.raises(ValueError, match=field):  # and in the file
        EchoConfig.from_pretrained(tmp_path)


def test_a_config_with_fields_that_are_gone_loads_if_they_did_nothing(tmp_path, caplog):
    EchoConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    gone = {"encoder_attention_window": None, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0}
    assert not gone.keys() & saved.keys()
    (tmp_path / "config.json").write_text(json.dumps(saved | gone))
    with caplog.at_level(logging.WARNING):
        config = EchoConfig.from_pretrained(tmp_path)
    assert not caplog.records and not gone.keys() & config.to_dict().keys()
    (tmp_path / "config.json").write_text(json.dumps(saved | {"encoder_attention_window": 250}))
    with pytest.raises(ValueError, match=r"encoder_attention_window is 250.*from_pretrained\(..., enc.*=None\)"):
        EchoConfig.from_pretrained(tmp_path)
    assert not hasattr(EchoConfig.from_pretrained(tmp_path, encoder_attention_window=None), "encoder_attention_window")


def test_changes_to_a_saved_config_are_what_they_are_in_a_new_one(tmp_path):
    EchoConfig(dropout=0.3).save_pretrained(tmp_path)
    changes = {"feature_groups": {"pitch": 1, "spectrogram": 40}, "stem_strides": (2, 1)}
    loaded, unused = EchoConfig.from_pretrained(tmp_path, **changes, more=1, return_unused_kwargs=True)
    assert list(loaded.feature_groups) == ["spectrogram", "pitch"] and loaded.stem_strides == [2, 1]
    assert loaded.dropout == 0.3 and unused == {"more": 1}


def test_heads_by_the_common_name_are_the_decoders_with_keys_of_their_own():
    config = EchoConfig(num_attention_heads=8)
    assert (config.decoder_num_attention_heads, config.decoder_num_key_value_heads) == (8, 8)
    with pytest.raises(ValueError, match="decoder_num_hidden_layers"):
        EchoConfig.from_dict(config.to_dict(), num_hidden_layers=0)


@pytest.mark.parametrize(
    "field, value",
    [
        ("theta_mode", "median"),
        ("radius_mode", 1.0),
        ("pitch_bias", "cauchy"),
        ("vocab_size", "many"),
        ("pitch_gate", 3),
    ],
)
def test_wrong_types_and_choices_raise_and_name_the_field(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        EchoConfig(**{field: value})


def test_presets_switch_one_mechanism_each():
    assert EchoConfig.from_preset("baseline").pitch_mechanisms == []
    single = {"theta", "radius", "bias", "silence", "gate", "pitch_input", "token_pitch"}
    for preset in single:
        config = EchoConfig.from_preset(preset)
        changed = [name for name, value in BASELINE.items() if getattr(config, name) != value]
        assert len(changed) == 1, preset
    every = EchoConfig.from_preset("all")
    assert all(getattr(every, name) != value for name, value in BASELINE.items())
    assert single < set(PRESETS)


def test_published_presets_are_as_published():
    for preset, modes in (("published_mean_sigmoid", ("mean", "sigmoid")), ("published_frame_raw", ("frame", "raw"))):
        config = EchoConfig.from_preset(preset)
        assert (config.theta_mode, config.radius_mode) == modes
        assert (config.rotary_frequencies, config.rotary_theta, config.learn_theta) == ("mel", 10000.0, True)
        assert (config.mel_corner_frequency, config.mel_max_frequency) == (700.0, 8000.0)


def test_unknown_preset_and_size_name_the_choices():
    with pytest.raises(ValueError, match="baseline"):
        EchoConfig.from_preset("none")
    with pytest.raises(ValueError, match="2m"):
        EchoConfig.from_preset("all", size="3g")
    assert EchoConfig.from_preset("all", size="5m", theta_mode="frame").theta_mode == "frame"
    assert list(SIZES) == ["2m", "5m", "10m", "27m", "80m"]


def test_spectrogram_alone_is_enough_without_pitch():
    config = EchoConfig.from_preset("baseline", feature_groups={"spectrogram": 80})
    assert config.num_feature_channels == 80


def test_times():
    config = EchoConfig(sampling_rate=8000, hop_length=80, stem_strides=[2, 2])
    assert config.frame_seconds == 0.01
    assert config.inputs_to_logits_ratio == 320

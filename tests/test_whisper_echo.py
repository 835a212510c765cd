"""A Whisper with pitch is that Whisper until it is trained, keeps all that Whisper does, and then hears pitch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    pipeline,
)

from conftest import SAMPLING_RATE, voice
from echo_hf import (
    EchoConfig,
    EchoWhisperConfig,
    EchoWhisperFeatureExtractor,
    EchoWhisperForConditionalGeneration,
    EchoWhisperModel,
    EchoWhisperProcessor,
    add_pitch,
    estimate_f0,
)
from echo_hf.cli import main
from echo_hf.whisper_echo import PITCH_MODULES, PITCH_SCALE, EchoWhisperPitchAttention, normalize_window
from tiny_whisper import FRAMES, make_processor, make_whisper

SWITCHES = ("pitch_stem", "pitch_gate", "pitch_radius", "pitch_theta", "pitch_bias")
NONE = dict.fromkeys(SWITCHES, False)
ALL = dict.fromkeys(SWITCHES, True)
ALONE = {name: NONE | {name: True} for name in SWITCHES}
SETTINGS = {"none": NONE, **ALONE, "all": ALL, "default": {}}


def make_f0(batch: int = 2, frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
    """Contours of F0 in Hz with unvoiced stretches, (batch, frames)."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(batch, frames, generator=generator).cumsum(1)
    f0 = 150.0 * torch.exp(0.05 * steps)
    f0[:, frames // 3 : frames // 2] = 0.0
    f0[0, -frames // 5 :] = 0.0
    return f0


def make_features(f0: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Random log-mel features of a spectrogram with F0 below."""
    log_mel = torch.randn(f0.shape[0], 80, f0.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.cat((log_mel, f0[:, None]), dim=1)


def wild_f0() -> torch.Tensor:
    f0 = make_f0()
    f0[0, ::7] = torch.tensor([torch.nan, torch.inf, -torch.inf, -100.0, 1e30, 1e-30]).repeat(3)[:15]
    f0[1] = 3e38
    return f0


def pitched(stock, attention: str = "sdpa", **switches) -> EchoWhisperForConditionalGeneration:
    model = add_pitch(stock, make_processor(), **switches)[0]
    model.set_attn_implementation(attention)
    return model


def pitch_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if any(part in name for part in PITCH_MODULES)}


def excite(model, seed: int = 0):
    """Pitch parameters as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pitch_parameters(model).values():
            parameter.normal_(0.0, 0.5 / PITCH_SCALE, generator=generator)
    return model


def encode(model, features: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.get_encoder()(features).last_hidden_state


# Before training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("switches", SETTINGS.values(), ids=SETTINGS)
def test_logits_are_whispers(switches, attention):
    stock = make_whisper()
    stock.set_attn_implementation(attention)
    model = pitched(stock, attention, **switches)
    for f0 in (make_f0(), torch.zeros(2, FRAMES), wild_f0()):
        features = make_features(f0)
        inputs = {"decoder_input_ids": torch.tensor([[257, 258, 5], [257, 259, 9]])}
        with torch.no_grad():
            expected, actual = stock(features[:, :80], **inputs), model(features, **inputs)
        assert torch.equal(expected.encoder_last_hidden_state, actual.encoder_last_hidden_state)
        assert torch.equal(expected.logits, actual.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_whispers(dtype):
    stock = make_whisper().to(dtype)
    model = pitched(stock, **ALL)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    features = make_features(make_f0()).to(dtype)
    assert torch.equal(encode(stock, features[:, :80]), encode(model, features))


def test_a_training_step_is_whispers_with_spec_augment():
    augment = {"apply_spec_augment": True, "mask_time_prob": 0.3, "mask_feature_prob": 0.3}
    stock = make_whisper(**augment)
    stock.set_attn_implementation("eager")  # "sdpa" takes another kernel for a bias that learns
    model = pitched(stock, "eager", **ALL)
    labels = torch.tensor([[258, 70, 71, 256], [258, 72, 256, -100]])
    losses = []
    for each, rows in ((stock, 80), (model, 81)):
        np.random.seed(0)
        features = make_features(make_f0())[:, :rows].clone()
        losses.append(each.train()(features, labels=labels).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    theirs = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs and parameter.requires_grad:
            assert torch.equal(parameter.grad, theirs[name].grad), name


def test_spec_augment_hides_f0_with_the_spectrogram():
    model = pitched(make_whisper(apply_spec_augment=True, mask_time_prob=0.5, mask_feature_prob=0.5)).train()
    np.random.seed(0)
    features = make_features(torch.full((2, FRAMES), 150.0))
    masked = model.model._mask_input_features(features.clone())
    hidden = (masked[:, :80] == 0).all(1)
    assert hidden.any() and not hidden.all()
    assert torch.equal(masked[:, 80], torch.where(hidden, 0.0, 150.0))


GENERATION = {
    "plain": {},
    "language": {"language": "zh", "task": "translate"},
    "timestamps": {"return_timestamps": True},
    "words": {"return_timestamps": True, "return_token_timestamps": True, "return_segments": True},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "max_new_tokens": 8, "disable_compile": True},
    "prompt": {"prompt_ids": torch.tensor([263, 65, 66, 67]), "language": "en"},
    "fallback": {
        "return_timestamps": True,
        "temperature": (0.0, 0.4, 0.8),
        "logprob_threshold": -0.1,
        "compression_ratio_threshold": 1.1,
        "no_speech_threshold": 0.9,
    },
}


def assert_same(expected, actual):
    """Equality of what `generate` returns, to the bit, whatever it is made of."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, actual)
    elif isinstance(expected, dict):
        assert list(expected) == list(actual)
        for key in expected:
            assert_same(expected[key], actual[key])
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual):
            assert_same(one, other)
    elif isinstance(expected, int | float | str | None):
        assert expected == actual


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_is_whispers(options):
    stock = make_whisper()
    model = pitched(stock, **ALL)
    features, mask = make_features(make_f0()), torch.ones(2, FRAMES, dtype=torch.long)
    results = []
    for each, rows in ((stock, 80), (model, 81)):
        torch.manual_seed(0)
        results.append(each.generate(features[:, :rows], attention_mask=mask, **options))
    assert_same(*results)


@pytest.mark.parametrize("condition", [False, True])
def test_long_form_is_whispers(condition):
    stock = make_whisper()
    model = pitched(stock, **ALL)
    features = make_features(make_f0(frames=3 * FRAMES + 20))
    mask = torch.ones(2, features.shape[-1], dtype=torch.long)
    mask[1, 2 * FRAMES :] = 0
    options = {"return_timestamps": True, "return_segments": True, "condition_on_prev_tokens": condition}
    options |= {"temperature": (0.0, 0.5), "logprob_threshold": -1.0, "prompt_ids": torch.tensor([263, 65, 66])}
    results = []
    for each, rows in ((stock, 80), (model, 81)):
        torch.manual_seed(0)
        results.append(each.generate(features[:, :rows], attention_mask=mask, **options))
    assert_same(*results)
    assert len(results[0]["segments"][0]) > 1


def test_assisted_generation():
    model, assistant = pitched(make_whisper(), **ALL), pitched(make_whisper(seed=1), **ALL)
    excite(model), excite(assistant, seed=1)
    features = make_features(make_f0(batch=1))
    expected = model.generate(features, language="en")
    assert torch.equal(expected, model.generate(features, language="en", assistant_model=assistant))


# What pitch does ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [*ALONE.values(), ALL], ids=[*ALONE, "all"])
def test_pitch_acts_once_it_has_learned_and_its_absence_never(switches):
    stock = make_whisper()
    model = excite(pitched(stock, **switches))
    features = make_features(make_f0())
    silent = make_features(torch.zeros(2, FRAMES))
    assert (encode(model, features) - encode(stock, features[:, :80])).abs().max() > 1e-3
    assert torch.equal(encode(model, silent), encode(stock, silent[:, :80]))
    assert encode(model, make_features(wild_f0())).isfinite().all()


@pytest.mark.parametrize("name", SWITCHES)
def test_only_stem_and_gate_hear_the_register(name):
    model = excite(pitched(make_whisper(), **ALONE[name]))
    low, high = (encode(model, make_features(scale * make_f0())) for scale in (1.0, 1.5))
    same = torch.allclose(low, high, atol=1e-4)
    assert same == (name not in ("pitch_stem", "pitch_gate"))


@pytest.mark.parametrize("switches", [*ALONE.values(), ALL], ids=[*ALONE, "all"])
def test_a_batch_changes_nothing(switches):
    model = excite(pitched(make_whisper(), **switches)).double()
    features = torch.cat([make_features(make_f0(seed=seed), seed) for seed in (2, 3)]).double()
    together = encode(model, features)
    for row in range(len(features)):
        torch.testing.assert_close(together[row : row + 1], encode(model, features[row : row + 1]), atol=1e-5, rtol=0)


def test_normalize_window():
    f0 = torch.tensor([[0.0, 100.0, 200.0, 0.0], [150.0, 150.0, 0.0, torch.nan]])
    half = np.log(2) / 2
    voiced, contour, register = normalize_window(f0).unbind(-1)
    assert voiced.tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    torch.testing.assert_close(contour, torch.tensor([[0.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    expected = np.log([100 / 150, 200 / 150]) / 0.5
    np.testing.assert_allclose(register[0, 1:3], expected, rtol=1e-5)
    assert half > 0.1  # else the floor of the spread would show in the contour
    padded = normalize_window(torch.nn.functional.pad(f0, (0, 5)))
    assert torch.equal(padded[:, :4], normalize_window(f0)) and not padded[:, 4:].any()


def test_scores_with_pitch_are_as_written():
    """Radius, theta and bias against the formulas, element by element in float64."""
    config = EchoWhisperConfig(d_model=12, encoder_attention_heads=2, **ALL)
    attention = EchoWhisperPitchAttention(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0.0, 0.05, generator=generator)
    pitch = normalize_window(make_f0(batch=1, frames=12))
    query, key = torch.randn(2, 1, 2, 12, 6, generator=generator, dtype=torch.float64)
    turned_query, turned_key, bias = attention(query, key, pitch)
    scores = (turned_query @ turned_key.transpose(2, 3) + bias)[0].detach()

    voiced, contour = pitch[0, :, 0].tolist(), pitch[0, :, 1].tolist()
    gain, strength = attention.theta_gain.tolist(), attention.bias_strength.tolist()
    radius = [1 + 0.5 * np.tanh(16 * attention.radius_gain.item() * value) for value in contour]
    for head in range(2):
        for i in range(12):
            for j in range(12):
                score = 0.0
                for c in range(3):
                    first, last = min(i, j), max(i, j)  # the angle between two frames is of what lies between them
                    rates = [10000 ** (-c / 3) * np.tanh(16 * gain[c] * value) for value in contour]
                    angle = sum(rates[first + 1 : last + 1]) * (1 if i > j else -1)
                    q = complex(query[0, head, i, c], query[0, head, i, c + 3])
                    k = complex(key[0, head, j, c], key[0, head, j, c + 3])
                    score += radius[i] * radius[j] * (q * np.exp(1j * angle) * k.conjugate()).real
                near = np.exp(-((contour[i] - contour[j]) ** 2) / 2) * voiced[i] * voiced[j]
                assert scores[head, i, j].item() == pytest.approx(score + 16 * strength[head] * near, abs=1e-4)


def test_f0_is_taken_at_the_middle_of_the_encoders_frames():
    model = excite(pitched(make_whisper(), **ALL))
    features = make_features(make_f0())
    other = features.clone()
    other[:, 80, 1::2] = 440.0  # between them
    assert torch.equal(encode(model, features), encode(model, other))
    other[:, 80, ::2] = 440.0
    assert not torch.equal(encode(model, features), encode(model, other))


# Training -------------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([[258, 70, 71, 256], [258, 72, 256, -100]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradient_reaches_every_pitch_parameter(attention):
    model = pitched(make_whisper(), attention, **ALL).train()
    model(make_features(make_f0()), labels=LABELS).loss.backward()
    parameters = pitch_parameters(model)
    assert len(parameters) == 1 + 2 * 4  # the stem; gate, radius, theta and bias of two layers
    for name, parameter in parameters.items():
        assert not parameter.any() and parameter.grad.any(), name


def test_a_step_moves_pitch_sixteen_times_as_far():
    model = pitched(make_whisper(), **NONE | {"pitch_radius": True}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model(make_features(make_f0()), labels=LABELS).loss.backward()
    optimizer.step()
    attention = model.model.encoder.layers[0].self_attn.pitch_attention
    states, pitch = torch.ones(1, 2, 1, 8), torch.tensor([[[1.0, 1.0, 0.0]]])
    query, _, _ = attention(states, states, pitch)
    expected = 1 + 0.5 * np.tanh(16 * 1e-3)
    assert query[0, 0, 0, 0].item() in (pytest.approx(expected, abs=1e-5), pytest.approx(2 - expected, abs=1e-5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    model = excite(pitched(make_whisper(), "eager", **ALL)).train()
    features = make_features(make_f0())
    gradients = []
    for turn in range(2):
        if turn:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # which a reentrant checkpoint needs
        model.zero_grad()
        model(features, labels=LABELS).loss.backward()
        gradients.append({name: value.grad.clone() for name, value in pitch_parameters(model).items()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)


def test_the_encoder_compiles_to_one_graph():
    model = excite(pitched(make_whisper(), **ALL))
    features = make_features(make_f0())
    compiled = torch.compile(model.model.encoder, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(features).last_hidden_state, encode(model, features))


def test_hidden_states_attentions_and_freezing():
    model = pitched(make_whisper(), "eager", **ALL)
    outputs = model.model.encoder(make_features(make_f0()), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, FRAMES // 2, 16)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, FRAMES // 2, FRAMES // 2)] * 2
    model.freeze_encoder()
    assert not any(parameter.requires_grad for parameter in model.model.encoder.parameters())


class StockCollator:
    """As recipes for Whisper have it: features padded by the extractor, labels by the tokenizer and with -100."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        features = [{"input_features": row["input_features"]} for row in rows]
        batch = self.processor.feature_extractor.pad(features, return_tensors="pt")
        labels = self.processor.tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"].ne(1), -100)
        return batch


def make_rows(processor, count: int = 4) -> list[dict]:
    rows = []
    for index in range(count):
        audio = voice(0.5 + 0.1 * index, f0=120.0 + 40 * index)
        features = processor.feature_extractor(audio, sampling_rate=SAMPLING_RATE).input_features[0]
        rows.append({"input_features": features, "labels": processor.tokenizer("ab" * (index + 1)).input_ids})
    return rows


def fit(model, processor, folder, **options):
    arguments = Seq2SeqTrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        predict_with_generate=True,
        generation_max_length=8,
        remove_unused_columns=False,
        label_names=["labels"],
        **options,
    )
    rows = make_rows(processor)
    trainer = Seq2SeqTrainer(
        model, arguments, StockCollator(processor), rows, rows[:2], processing_class=processor.feature_extractor
    )
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    return trainer


def test_the_stock_trainer_and_collator_train_pitch(tmp_path):
    model, processor = add_pitch(make_whisper(), make_processor(), **ALL)
    trainer = fit(model, processor, tmp_path)
    for name, parameter in pitch_parameters(model).items():
        assert parameter.any(), name
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same(dict(model.state_dict()), dict(again.state_dict()))


def test_lora_trains_pitch_in_full(tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = add_pitch(make_whisper(), make_processor(), **ALL)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=PITCH_MODULES)
    adapted = peft.get_peft_model(model, config)
    fit(adapted, processor, tmp_path)
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    pitch = {name: value for name, value in trained.items() if "modules_to_save" in name}
    assert len(pitch) == 1 + 2 * 4 and all(value.any() for value in pitch.values())
    assert all("lora" in name for name in trained if name not in pitch)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = add_pitch(make_whisper(), make_processor(), **ALL)[0]
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    features = make_features(make_f0())
    expected, actual = (each.eval()(features, labels=LABELS).logits for each in (adapted, loaded))
    torch.testing.assert_close(actual, expected)


# Features -------------------------------------------------------------------------------------------------------------


def test_f0_is_the_last_row_and_tracked_before_padding():
    extractor = EchoWhisperFeatureExtractor(chunk_length=2)
    audio = [voice(1.0), voice(1.5, f0=220.0), voice(2.5, f0=100.0)]
    features = extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt", return_attention_mask=True)
    stock = WhisperFeatureExtractor(chunk_length=2)(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    assert features.input_features.shape == (3, 81, 200) and features.attention_mask.shape == (3, 200)
    assert torch.equal(features.input_features[:, :80], stock.input_features)
    for row, waveform in enumerate(audio):
        heard = waveform[: 2 * SAMPLING_RATE]
        f0 = estimate_f0(heard, SAMPLING_RATE, 160, "autocorrelation")[:200]
        expected = np.zeros(200, dtype=np.float32)
        expected[: len(f0)] = f0
        np.testing.assert_allclose(features.input_features[row, 80], expected, rtol=1e-5)
        assert (expected > 0).sum() > 50


@pytest.mark.parametrize("kind", [list, tuple, np.array, "stack"])
def test_kinds_of_audio(kind):
    extractor = EchoWhisperFeatureExtractor(chunk_length=1)
    audio = voice(0.5)
    expected = extractor(audio, sampling_rate=SAMPLING_RATE)["input_features"]
    assert isinstance(expected, np.ndarray) and expected.dtype == np.float32 and expected.shape == (1, 81, FRAMES)
    if kind == "stack":
        both = extractor(np.stack((audio, audio)), sampling_rate=SAMPLING_RATE)["input_features"]
        np.testing.assert_allclose(both, np.concatenate((expected, expected)), atol=1e-4)
    else:
        np.testing.assert_array_equal(extractor(kind(audio), sampling_rate=SAMPLING_RATE)["input_features"], expected)


def test_long_audio_is_not_cut_where_it_is_asked_not_to():
    extractor = EchoWhisperFeatureExtractor(chunk_length=1)
    options = {"truncation": False, "padding": "longest", "return_attention_mask": True, "return_tensors": "pt"}
    features = extractor([voice(2.5), voice(1.2)], sampling_rate=SAMPLING_RATE, **options).input_features
    assert features.shape == (2, 81, 250)
    assert (features[0, 80, 110:] > 0).any() and not features[1, 80, 125:].any()


def test_audio_without_samples_is_unvoiced():
    extractor = EchoWhisperFeatureExtractor(chunk_length=1)
    features = extractor([np.zeros(0, dtype=np.float32), voice(0.5)], sampling_rate=SAMPLING_RATE)["input_features"]
    assert not features[0, 80].any() and features[1, 80].any()


def test_other_trackers_and_their_limits():
    extractor = EchoWhisperFeatureExtractor(chunk_length=1, f0_method="dio", f0_max=400.0)
    again = EchoWhisperFeatureExtractor.from_dict(extractor.to_dict())
    assert (again.f0_method, again.f0_max) == ("dio", 400.0)
    with pytest.raises(ValueError, match="choose one of"):
        EchoWhisperFeatureExtractor(f0_method="none")


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    """A tiny stock Whisper on disk."""
    folder = tmp_path_factory.mktemp("whisper")
    make_whisper().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, whisper_folder):
    """The same with pitch that it has learned."""
    folder = tmp_path_factory.mktemp("pitched")
    model, processor = add_pitch(Path(whisper_folder), **ALL)
    excite(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_auto_classes(folder):
    kinds = {AutoConfig: EchoWhisperConfig, AutoFeatureExtractor: EchoWhisperFeatureExtractor}
    kinds |= {AutoProcessor: EchoWhisperProcessor, AutoTokenizer: WhisperTokenizer, AutoModel: EchoWhisperModel}
    kinds |= {AutoModelForSpeechSeq2Seq: EchoWhisperForConditionalGeneration}
    for auto, kind in kinds.items():
        assert type(auto.from_pretrained(folder)) is kind
    config = AutoConfig.from_pretrained(folder)
    assert all(getattr(config, name) for name in SWITCHES)
    assert sorted(name for name in os.listdir(folder) if name.endswith(".py")) == sorted(needed_modules())


def needed_modules() -> set[str]:
    """whisper_echo.py and what it imports of the package, by following the imports, within functions too."""
    package = os.path.dirname(sys.modules["echo_hf"].__file__)
    found, waiting = set(), ["whisper_echo.py"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            with open(os.path.join(package, name), encoding="utf-8") as file:
                lines = [line.split() for line in file if line.lstrip().startswith("from .")]
            waiting += [line[1].lstrip(".") + ".py" for line in lines]
    return found


def test_what_is_saved_is_loaded_and_saved_again(folder, tmp_path):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32)
    features = make_features(make_f0())
    expected = encode(excite(pitched(make_whisper(), **ALL)), features)
    assert torch.equal(encode(model, features), expected)
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(folder))
    assert torch.equal(encode(EchoWhisperModel.from_pretrained(tmp_path, dtype=torch.float32), features), expected)


def test_echos_own_checkpoints_do_not_carry_it(tmp_path):
    EchoConfig().save_pretrained(tmp_path)
    assert "whisper_echo.py" not in os.listdir(tmp_path)


PIPELINE_OPTIONS = {
    "short": (0.8, {}),
    "segments": (0.8, {"return_timestamps": True}),
    "words": (0.8, {"return_timestamps": "word"}),
    "language": (0.8, {"return_language": True, "return_timestamps": True}),
    "long": (2.5, {"return_timestamps": "word"}),
    "chunked": (2.5, {"chunk_length_s": 1, "stride_length_s": 0.2, "batch_size": 2}),
}


@pytest.mark.parametrize(("seconds", "options"), PIPELINE_OPTIONS.values(), ids=PIPELINE_OPTIONS)
def test_the_pipeline_gives_what_it_gives_for_whisper(whisper_folder, tmp_path, seconds, options):
    model, processor = add_pitch(whisper_folder, **ALL)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    results = []
    for each in (whisper_folder, str(tmp_path)):
        recognize = pipeline("automatic-speech-recognition", each, dtype=torch.float32, device="cpu")
        results.append(recognize(voice(seconds), generate_kwargs={"num_beams": 1}, **options))
    assert results[0] == results[1]
    assert results[0]["text"]


def make_pipeline(model, processor, **options):
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor, "device": "cpu"}
    return pipeline("automatic-speech-recognition", model, **{**parts, **options})


@pytest.mark.parametrize("seconds", [[2.5], [2.5, 2.5]])
def test_times_are_right_behind_a_window_of_any_length(seconds):
    model, processor = add_pitch(make_whisper(), make_processor(), **ALL)
    audio = [voice(duration, f0=150.0 + 50 * number) for number, duration in enumerate(seconds)]
    options = {"return_timestamps": True, "batch_size": len(audio), "return_language": True}
    results = make_pipeline(model, processor)(audio, generate_kwargs={"num_beams": 1}, **options)
    for result in results:
        times = [time for chunk in result["chunks"] for time in chunk["timestamp"]]
        assert times == sorted(times) and 2.0 < times[-1] <= 3.0 and len(times) > 4  # windows of 1 s
        assert "".join(chunk["text"] for chunk in result["chunks"]) == result["text"]
        assert {chunk["language"] for chunk in result["chunks"]} <= {"english", "chinese"}


def test_the_pipeline_of_a_window_of_30_s_gives_what_it_gives_for_whisper():
    stock, theirs = make_whisper(max_source_positions=1500), make_processor(chunk_length=30)
    model, ours = add_pitch(stock, theirs)
    options = {"return_timestamps": True, "generate_kwargs": {"num_beams": 1, "max_new_tokens": 4}}
    expected, actual = (make_pipeline(*each)(voice(31.0), **options) for each in ((stock, theirs), (model, ours)))
    assert expected == actual and expected["chunks"]


def test_no_time_is_behind_the_window():
    stock = make_whisper(max_source_positions=100, vocab_size=317 + 50)  # with times of up to 2 s
    model = add_pitch(stock, make_processor(chunk_length=2), window=1)[0]
    features = make_features(make_f0(batch=8))
    times = [
        each.generate(rows, return_timestamps=True, max_new_tokens=12) - 266
        for each, rows in ((stock, torch.nn.functional.pad(features[:, :80], (0, FRAMES))), (model, features))
    ]
    assert times[0].max() > 50 and 0 < times[1].max() <= 50


def test_what_the_pipeline_cannot_do_is_refused():
    model, processor = add_pitch(make_whisper(), make_processor())
    with pytest.raises(ValueError, match="hears 1 s at a time. Give at most 1, or return_timestamps=True"):
        make_pipeline(model, processor)(voice(2.5), chunk_length_s=30)
    with pytest.raises(ValueError, match="longer than the 100 frames.*return_timestamps=True"):
        make_pipeline(model, processor)(voice(2.5))
    for other in (Wav2Vec2FeatureExtractor(), EchoWhisperFeatureExtractor(chunk_length=2)):
        with pytest.raises(ValueError, match=r"model's 100 frames. Give AutoProcessor.from_pretrained\(checkpoint\)"):
            make_pipeline(model, processor, feature_extractor=other)
    with pytest.raises(ValueError, match=r"81, frames\).*AutoProcessor.from_pretrained"):
        make_pipeline(model, processor, feature_extractor=make_processor().feature_extractor)(voice(0.5))


STRANGER = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "echo_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
import numpy as np
from transformers import AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

folder, again, audio = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(folder, **trust)
model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, **trust)
inputs = processor(audio, sampling_rate=16000, return_tensors="pt")
report = {"tokens": model.generate(**inputs).tolist(), "shape": list(inputs.input_features.shape)}
report["model"] = type(AutoModel.from_pretrained(folder, **trust)).__name__
model.save_pretrained(again)
processor.save_pretrained(again)
recognize = pipeline("automatic-speech-recognition", again, device="cpu", **trust)
report["pipeline"] = [type(recognize).__name__, recognize(audio, return_timestamps="word")]
print(json.dumps(report))
"""


@pytest.mark.slow
def test_without_the_package(folder, tmp_path):
    audio = voice(0.8)
    np.save(tmp_path / "audio.npy", audio)
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, folder, str(tmp_path / "again"), str(tmp_path / "audio.npy")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    model, processor = AutoModelForSpeechSeq2Seq.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    assert report["tokens"] == model.generate(**inputs).tolist() and report["shape"] == [1, 81, FRAMES]
    assert report["model"] == "EchoWhisperModel"
    recognize = pipeline("automatic-speech-recognition", folder, device="cpu")
    expected = json.loads(json.dumps(recognize(audio, return_timestamps="word")))
    assert report["pipeline"] == ["EchoWhisperPipeline", expected]
    assert sorted(os.listdir(tmp_path / "again")) == sorted(os.listdir(folder))


# Windows and what is refused ------------------------------------------------------------------------------------------


def test_a_shorter_window_keeps_the_first_positions():
    stock = make_whisper(max_source_positions=150)
    model, processor = add_pitch(stock, make_processor(chunk_length=3), window=2)
    assert model.config.max_source_positions == 100 and processor.feature_extractor.chunk_length == 2
    expected = stock.model.encoder.embed_positions.weight[:100]
    assert torch.equal(model.model.encoder.embed_positions.weight, expected)
    features = processor(voice(0.5), sampling_rate=SAMPLING_RATE, return_tensors="pt")
    assert features.input_features.shape == (1, 81, 200)
    assert model.generate(**features, max_new_tokens=4).shape[0] == 1
    assert stock.model.encoder.embed_positions.weight.shape[0] == 150  # theirs stays as it is


@pytest.mark.parametrize("window", [0, 4, 1.5, True])
def test_windows_that_are_not_possible(window):
    with pytest.raises(ValueError, match="window must be a whole number of seconds from 1 to 3"):
        add_pitch(make_whisper(max_source_positions=150), make_processor(chunk_length=3), window=window)


def test_the_given_model_stays_as_it_is_and_shares_nothing():
    stock = make_whisper()
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    model = pitched(stock)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.generation_config.max_length = 5
    assert_same(before, dict(stock.state_dict()))
    assert stock.generation_config.max_length == 32


def test_the_command(whisper_folder, tmp_path, capfd):
    new = tmp_path / "new"
    assert main(["add-pitch", whisper_folder, str(new), "--mechanisms", "stem", "theta"]) == 0
    assert "until it is fine-tuned" in capfd.readouterr().err
    config = AutoConfig.from_pretrained(new)
    assert [name for name in SWITCHES if getattr(config, name)] == ["pitch_stem", "pitch_theta"]
    features = make_features(make_f0())
    stock = WhisperForConditionalGeneration.from_pretrained(whisper_folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(new)
    assert torch.equal(encode(model, features), encode(stock, features[:, :80]))
    assert model.generation_config.to_diff_dict() == stock.generation_config.to_diff_dict()

    assert main(["add-pitch", whisper_folder, str(new)]) == 1
    assert "is not an empty folder" in capfd.readouterr().err
    assert main(["add-pitch", whisper_folder, str(tmp_path / "short"), "--window", "2"]) == 1
    assert "from 1 to 1, got 2" in capfd.readouterr().err
    assert main(["add-pitch", str(tmp_path / "nothing"), str(tmp_path / "short")]) == 1
    assert "nothing" in capfd.readouterr().err and not (tmp_path / "short").exists()


@pytest.mark.parametrize("rows", [80, 82, 129])
def test_features_with_other_rows_are_refused(rows):
    model = pitched(make_whisper())
    for call in (model, model.model, model.model.encoder, model.generate):
        for shape in ((1, rows, FRAMES), (rows, FRAMES), (1, FRAMES, 81)):
            with pytest.raises(ValueError, match=r"81, frames\).*AutoProcessor.from_pretrained"):
                call(torch.zeros(shape))


def test_what_is_no_whisper_is_refused(tmp_path, folder):
    Wav2Vec2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'wav2vec2', and pitch can be added to Whisper"):
        add_pitch(str(tmp_path))
    with pytest.raises(ValueError, match="has pitch already"):
        add_pitch(folder)
    with pytest.raises(ValueError, match="Give the processor"):
        add_pitch(make_whisper())
    with pytest.raises(ValueError, match="128 channels, and the model takes 80 mel bins"):
        add_pitch(make_whisper(), make_processor(feature_size=128))
    with pytest.raises(ValueError, match="hears 30 s at a time, and the model 1 s"):
        add_pitch(make_whisper(), make_processor(chunk_length=30))
    with pytest.raises(ValueError, match="no switch pitch_gates; there are pitch_stem"):
        add_pitch(make_whisper(), make_processor(), pitch_gates=True)

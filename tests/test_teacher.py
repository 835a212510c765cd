"""A teacher's states go with the frames they are of, whatever is done to these, and the encoder learns to tell them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from transformers import BertConfig
from transformers import BertModel
from transformers import HubertConfig
from transformers import HubertModel
from transformers import Wav2Vec2FeatureExtractor
from transformers import WhisperConfig
from transformers import WhisperFeatureExtractor
from transformers import WhisperModel

from echo_hf import EchoConfig
from echo_hf import EchoFeatureExtractor
from echo_hf import EchoForConditionalGeneration
from echo_hf import EchoProcessor
from echo_hf import EchoTokenizer
from echo_hf.augmentation import VoicePerturbation
from echo_hf.data import EchoDataCollator
from echo_hf.data import load_sources
from echo_hf.data import prepare_dataset
from echo_hf.modeling_echo import teacher_loss
from echo_hf.teacher import Teacher
from echo_hf.training import DataArguments
from echo_hf.training import listen_to
from echo_hf.training import train
from test_training import Interrupt
from test_training import model_arguments
from test_training import trainer_arguments

RATE = 16000
FRAME = 640  # samples an encoder frame of Echo's spans


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whisper")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    WhisperModel(WhisperConfig(**sizes, **tokens)).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hubert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    HubertModel(HubertConfig(**sizes, **convolutions)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return folder


@pytest.fixture
def manifest(tmp_path):
    """Four recordings of 2.1 to 2.4 s that sweep up or down."""
    lines = []
    for number in range(4):
        times = np.arange(33600 + 1600 * number) / RATE
        rising = 100 * times + 100 * times**2
        wave = np.sin(2 * np.pi * (rising if number % 2 else rising[::-1]))
        soundfile.write(tmp_path / f"{number}.wav", 0.3 * wave, RATE)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": ("down", "up")[number % 2]}))
    path = tmp_path / "sweeps.jsonl"
    path.write_text("\n".join(lines))
    return path


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=round(seconds * RATE)).astype(np.float32) * 0.1


@pytest.mark.parametrize("kind", ["whisper", "hubert"])
def test_states_are_standardised_and_one_for_each_frame(kind, request):
    teacher = Teacher(request.getfixturevalue(kind), FRAME)
    for samples in (32000, 33000, 50001):
        states = teacher(noise(samples / RATE), RATE)
        assert states.shape == (-(-samples // FRAME), 16) and states.dtype == np.float16
        np.testing.assert_allclose(states.astype(np.float32).mean(0), 0, atol=2e-3)
        np.testing.assert_allclose(states.astype(np.float32).std(0), 1, atol=2e-3)
    assert teacher(noise(1.9), RATE).shape == (0, 16), "too short to be standardised"


@pytest.mark.parametrize("kind", ["whisper", "hubert"])
def test_a_state_is_of_its_time(kind, request):
    """Silence and noise differ in their states, and these change over where the audio does."""
    teacher = Teacher(request.getfixturevalue(kind), FRAME)
    states = teacher(np.concatenate([np.zeros(RATE, np.float32), noise(2.0)]), RATE).astype(np.float32)
    first, second = states[3:22].mean(0), states[28:].mean(0)
    nearer = np.abs(states - first).mean(1) < np.abs(states - second).mean(1)
    assert nearer[2:23].mean() > 0.8 and nearer[28:].mean() < 0.2  # 25 frames a second


def test_whisper_hears_what_is_there_alone(whisper):
    """As the library's own encoder hears the same frames, were it made for so many."""
    audio, teacher = noise(3.0), Teacher(whisper, FRAME)
    states = teacher(audio, RATE).astype(np.float32)
    encoder = WhisperModel.from_pretrained(whisper).get_encoder()
    frames = WhisperFeatureExtractor()(np.pad(audio, (0, RATE)), sampling_rate=RATE, return_tensors="pt")
    weights = encoder.embed_positions.weight[:200]
    encoder.config.max_source_positions, encoder.embed_positions = 200, torch.nn.Embedding.from_pretrained(weights)
    expected = encoder(frames["input_features"][..., :400]).last_hidden_state[0, :150].detach().numpy()
    expected = expected.reshape(75, 2, 16).mean(1)
    expected = (expected - expected.mean(0)) / expected.std(0)
    np.testing.assert_allclose(states, expected, atol=0.02)


def test_long_recordings_are_heard_in_pieces_to_their_end(whisper):
    teacher, audio = Teacher(whisper, FRAME), noise(65.0)
    assert teacher(audio, RATE).shape == (1625, 16)
    piece = audio[: 29 * RATE].copy()
    piece[: 27 * RATE] = 0.0
    states = teacher(piece, RATE).astype(np.float32)
    first, last = states[:670].mean(0), states[-45:].mean(0)
    is_noise = np.abs(states - last).mean(1) < np.abs(states - first).mean(1)
    assert is_noise[: 27 * 25].mean() < 0.3 and is_noise[27 * 25 :].mean() > 0.9  # of 2 s


def test_another_rate_is_the_same_sound(whisper):
    times = np.arange(3 * 8000) / 8000
    sweep = np.sin(2 * np.pi * (200 + 300 * times) * times).astype(np.float32)
    fine = np.sin(2 * np.pi * (200 + 300 * np.arange(3 * RATE) / RATE) * np.arange(3 * RATE) / RATE).astype(np.float32)
    coarse_states = Teacher(whisper, FRAME // 2)(sweep, 8000).astype(np.float32)
    states = Teacher(whisper, FRAME)(fine, RATE).astype(np.float32)
    assert np.corrcoef(coarse_states.ravel(), states.ravel())[0, 1] > 0.9


def test_the_fingerprint_follows_weights_frames_and_dtype(whisper, hubert):
    makers = [(whisper, FRAME), (whisper, 320), (hubert, FRAME), (whisper, FRAME, torch.bfloat16)]
    assert len({Teacher(*maker).fingerprint for maker in makers}) == 4
    assert Teacher(whisper, FRAME).fingerprint == Teacher(whisper, FRAME).fingerprint


def test_what_is_no_teacher_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="No teacher could be loaded from .*nothing"):
        Teacher(tmp_path / "nothing", FRAME)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path)
    WhisperFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes input_ids, not audio; name a speech encoder"):
        Teacher(tmp_path, FRAME)


# Batches -------------------------------------------------------------------------------------------------------------


def make_rows(processor, lengths):
    """Features whose first channel, and states whose only one, say which frame of which row they are of."""
    rows = []
    for number, length in enumerate(lengths):
        features = np.zeros((length, processor.feature_extractor.feature_size), dtype=np.float32)
        features[:, 0] = 1000 * (number + 1) + np.arange(length)
        states = 1000 * (number + 1) + 4 * np.arange(-(-length // 4), dtype=np.float32)[:, None]
        rows.append({"input_features": features, "labels": [1, 5, 2], "text": "a", "teacher_states": states})
    return rows


@pytest.mark.parametrize("feature_groups", [{"spectrogram": 8, "pitch": 1}, {"spectrogram": 8}])
@pytest.mark.parametrize("change", ["nothing", "tempo", "pause", "join"])
def test_states_follow_their_frames(change, feature_groups):
    processor = EchoProcessor(EchoFeatureExtractor(feature_groups=feature_groups), EchoTokenizer())
    perturb = None
    if change in ("tempo", "pause"):
        perturb = VoicePerturbation(processor.feature_extractor, **{change: 1.0}).batch
    collator = EchoDataCollator(processor, perturb=perturb, join=float(change == "join"), teacher_frames=4)
    batch = collator(make_rows(processor, (90, 41, 7)))
    assert batch["input_features"].shape[-1] == sum(feature_groups.values())
    heard, states, mask = batch["input_features"][..., 0], batch["teacher_states"][..., 0], batch["teacher_mask"]
    assert states.shape[1] == -(-heard.shape[1] // 4)
    compared = 0
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for frame in range(states.shape[1]):
            middle = heard[row, min(4 * frame + 2, length - 1)].item()
            if 4 * frame >= length:
                assert not mask[row, frame] and not states[row, frame]
            elif change != "pause":  # a pause may hold frames of the recording, where the teacher heard nothing
                assert mask[row, frame] and abs(states[row, frame] - middle) <= 4
                compared += 1
        if change == "pause":
            number = (-(-90 // 4), -(-41 // 4), -(-7 // 4))[row]
            assert abs(int(mask[row].sum()) - number) <= 1
            assert (states[row][mask[row].bool()] // 1000 == row + 1).all()
    assert compared or change == "pause"


def test_rows_without_states_are_not_taught():
    processor = EchoProcessor(EchoFeatureExtractor(feature_groups={"spectrogram": 8}), EchoTokenizer())
    rows = make_rows(processor, (40, 40))
    rows[0]["teacher_states"] = np.zeros((0, 1), dtype=np.float16)
    batch = EchoDataCollator(processor, teacher_frames=4)(rows)
    assert batch["teacher_mask"].sum(1).tolist() == [0, 10]
    rows[1]["teacher_states"] = np.zeros((0, 1), dtype=np.float16)
    assert "teacher_states" not in EchoDataCollator(processor, teacher_frames=4)(rows)
    assert "teacher_states" not in EchoDataCollator(processor)(make_rows(processor, (40, 40)))


# Loss and training ---------------------------------------------------------------------------------------------------


def test_the_loss_is_what_is_left_of_the_states_a_token():
    told = torch.tensor([[[1.0, 0.0], [2.0, 2.0]], [[0.0, 0.0], [9.0, 9.0]]])
    states = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[3.0, 1.0], [0.0, 0.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    torch.testing.assert_close(teacher_loss(told, states, mask, 5), torch.tensor((0.5 + 2.0 + 5.0) / 5))


def test_the_layer_that_tells_learns_and_those_behind_it_do_not(whisper):
    config = EchoConfig.from_preset("all", size="2m")
    model = EchoForConditionalGeneration(config).train()
    listen_to(Teacher(whisper, FRAME), model, weight=2.0, layer=1)
    inputs = {"input_features": torch.rand(2, 80, 81), "labels": torch.tensor([[5, 6, 2], [5, 2, -100]])}
    states = {"teacher_states": torch.randn(2, 20, 16), "teacher_mask": torch.ones(2, 20)}
    outputs = model(**inputs, **states)
    hybrid = torch.lerp(outputs.ce_loss, outputs.ctc_loss, config.ctc_loss_weight)
    torch.testing.assert_close(outputs.loss, hybrid + 2.0 * outputs.teacher_loss)
    outputs.teacher_loss.backward()
    first, second = model.model.encoder.layers[:2]
    assert first.mlp.down_proj.weight.grad.any() and model.model.encoder.teacher_head.weight.grad.any()
    assert second.mlp.down_proj.weight.grad is None
    # Without states the head has a gradient all the same, for which several processes would wait.
    model.zero_grad()
    model(**inputs).loss.backward()
    assert model.model.encoder.teacher_head.weight.grad is not None
    assert not model.model.encoder.teacher_head.weight.grad.any()
    assert model(**inputs).teacher_loss is None and model.eval()(**inputs, **states).teacher_loss is None
    with pytest.raises(ValueError, match="teacher_layer must be an encoder layer, from 1 to"):
        listen_to(Teacher(whisper, FRAME), model, weight=1.0, layer=99)
    with pytest.raises(ValueError, match="teacher_loss_weight must not be negative"):
        listen_to(Teacher(whisper, FRAME), model, weight=-1.0)


def test_states_are_computed_once_and_only_where_asked_for(whisper, manifest, tmp_path, monkeypatch):
    processor = EchoProcessor(EchoFeatureExtractor(), EchoTokenizer())
    table, options = load_sources([str(manifest)], "train"), {"cache_dir": tmp_path / "cache"}
    assert "teacher_states" not in prepare_dataset(table, processor, **options).dataset.column_names
    taught = prepare_dataset(table, processor, teacher=Teacher(whisper, FRAME), **options).dataset
    for row in taught:
        assert row["teacher_states"].shape == (-(-row["length"] // 4), 16)
    monkeypatch.setattr(Teacher, "__call__", None)
    again = prepare_dataset(table, processor, teacher=Teacher(whisper, FRAME), **options).dataset
    np.testing.assert_array_equal(again[3]["teacher_states"], taught[3]["teacher_states"])


def test_a_teacher_of_no_weight_changes_nothing_and_none_stays_in_the_model(whisper, manifest, tmp_path):
    def run(name: str, **settings) -> EchoForConditionalGeneration:
        data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"), **settings)
        train(model_arguments(), data, trainer_arguments(tmp_path / name, max_steps=20, learning_rate=1e-2))
        return EchoForConditionalGeneration.from_pretrained(tmp_path / name)

    alone = run("alone")
    unheard = run("unheard", teacher=str(whisper), teacher_weight=0.0)
    heard = run("heard", teacher=str(whisper), teacher_weight=1.0, teacher_layer=1)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(unheard.state_dict()[name], value, msg=name)
    assert list(heard.state_dict()) == list(alone.state_dict())
    assert heard.config.to_diff_dict() == alone.config.to_diff_dict()
    assert any((heard.state_dict()[name] != value).any() for name, value in alone.state_dict().items())


def test_a_resumed_run_goes_on_with_its_teacher(whisper, manifest, tmp_path):
    data = DataArguments(
        train_data=[str(manifest)],
        cache_dir=str(tmp_path / "cache"),
        tempo_perturbation=0.2,
        join=0.5,
        non_speech_share=0.5,
        teacher=str(whisper),
    )
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    train(model_arguments(), data, trainer_arguments(tmp_path / "straight", **settings))
    with pytest.raises(KeyboardInterrupt):
        train(model_arguments(), data, trainer_arguments(tmp_path / "broken", **settings), callbacks=[Interrupt()])
    alone = replace(data, teacher=None)
    with pytest.raises(ValueError, match="was trained with a teacher; resume it with the same"):
        train(model_arguments(), alone, trainer_arguments(tmp_path / "broken", **settings), resume=True)
    train(model_arguments(), data, trainer_arguments(tmp_path / "broken", **settings), resume=True)
    straight = EchoForConditionalGeneration.from_pretrained(tmp_path / "straight").state_dict()
    resumed = EchoForConditionalGeneration.from_pretrained(tmp_path / "broken").state_dict()
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_a_mean_with_the_start_leaves_what_tells_the_states_aside(whisper, manifest, tmp_path):
    options = {"train_data": [str(manifest)], "cache_dir": str(tmp_path / "cache")}
    train(model_arguments(), DataArguments(**options), trainer_arguments(tmp_path / "start"))
    data = DataArguments(**options, teacher=str(whisper), start_share=0.5)
    arguments = model_arguments(model_name_or_path=str(tmp_path / "start"), config_overrides=None, feature_groups=None)
    train(arguments, data, trainer_arguments(tmp_path / "mean"))
    assert EchoForConditionalGeneration.from_pretrained(tmp_path / "mean").config.teacher_hidden_size is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_layer": 1}, "teacher_layer is set, and there is no teacher"),
        ({"teacher": "nowhere", "teacher_weight": -1.0}, "teacher_weight must not be negative, got -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(manifest, tmp_path, settings, message):
    data = DataArguments(train_data=[str(manifest)], **settings)
    with pytest.raises(ValueError, match=message):
        train(model_arguments(), data, trainer_arguments(tmp_path / "run"))

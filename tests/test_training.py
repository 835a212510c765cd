"""Settings fit each other or are refused early; a run leaves a complete checkpoint and can be resumed."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from transformers import AutoModelForSpeechSeq2Seq
from transformers import AutoProcessor
from transformers import Seq2SeqTrainingArguments
from transformers import TrainerCallback
from transformers import pipeline

from echo_hf import EchoConfig
from echo_hf import EchoFeatureExtractor
from echo_hf import EchoForConditionalGeneration
from echo_hf import EchoForCTC
from echo_hf import EchoProcessor
from echo_hf import EchoTokenizer
from echo_hf import training
from echo_hf.augmentation import VoicePerturbation
from echo_hf.configuration_echo import BASELINE
from echo_hf.data import EchoDataCollator
from echo_hf.data import load_sources
from echo_hf.data import prepare_dataset
from echo_hf.training import TRAINING_DEFAULTS
from echo_hf.training import CheckpointAveraging
from echo_hf.training import DataArguments
from echo_hf.training import EchoTrainer
from echo_hf.training import ModelArguments
from echo_hf.training import build_config
from echo_hf.training import build_model_and_processor
from echo_hf.training import build_processor
from echo_hf.training import build_tokenizer
from echo_hf.training import check_fit
from echo_hf.training import count_beyond_ctc
from echo_hf.training import find_last_checkpoint
from echo_hf.training import train

TINY = "encoder_hidden_size=16,encoder_num_hidden_layers=1,decoder_hidden_size=16,encoder_num_attention_heads=2," + (
    "decoder_num_attention_heads=2,encoder_intermediate_size=16,decoder_intermediate_size=16,max_target_positions=12"
)
TINY_FEATURES = '{"spectrogram": 20, "pitch": 1}'


@pytest.fixture
def manifest(tmp_path):
    """Six tones of 0.3 to 0.55 s that are called by their pitch."""
    lines = []
    for number in range(6):
        frequency, times = (120, 240)[number % 2], np.arange(4800 + 800 * number) / 16000
        soundfile.write(tmp_path / f"{number}.wav", 0.3 * np.sin(2 * np.pi * frequency * times), 16000)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": ("low", "high")[number % 2]}))
    path = tmp_path / "tones.jsonl"
    path.write_text("\n".join(lines))
    return path


def trainer_arguments(output_dir, **changes) -> Seq2SeqTrainingArguments:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none"}
    settings |= {"disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return Seq2SeqTrainingArguments(output_dir=str(output_dir), **{**TRAINING_DEFAULTS, **settings, **changes})


def model_arguments(**changes) -> ModelArguments:
    return ModelArguments(**{"config_overrides": TINY, "feature_groups": TINY_FEATURES, **changes})


# Settings ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("f0_method", ["dio_fast", "autocorrelation"])
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


def test_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert find_last_checkpoint(tmp_path / "nowhere") is None
    for step in (900, 1000, 1100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert find_last_checkpoint(tmp_path) is None
    for step in (900, 1000):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert find_last_checkpoint(tmp_path).name == "checkpoint-1000"


def test_utterances_with_too_many_tokens_for_ctc_are_counted(manifest, tmp_path):
    config = build_config(model_arguments())
    processor = build_processor(config, EchoTokenizer())
    table = load_sources(manifest).select([0, 1, 2])  # 30, 35 and 40 frames: 8, 9 and 10 encoder frames
    texts = ["12345678", "123456789", "11111123"]  # 8, 9 and 8 + 5 blanks
    table = table.remove_columns("text").add_column("text", texts)
    prepared = prepare_dataset(table, processor, cache_dir=tmp_path / "cache")
    assert count_beyond_ctc(prepared, config) == 1
    config.eos_token_id = [config.eos_token_id, config.vocab_size - 1]  # several may end a text
    assert count_beyond_ctc(prepared, config) == 1


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_complete_checkpoint(manifest, tmp_path):
    output_dir = tmp_path / "run"
    data = DataArguments(train_data=[str(manifest)], eval_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    arguments = trainer_arguments(
        output_dir, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, label_smoothing_factor=0.1
    )
    summary = train(model_arguments(), data, arguments)

    assert summary["steps"] == 4 and summary["train"]["utterances"] == 6
    assert summary["best_checkpoint"] is None  # the last is what was saved
    assert summary["metrics"]["reference_words"] == 6
    assert 0 <= summary["metrics"]["wer"]
    for name in ("train_results.json", "eval_results.json", "trainer_state.json", "run_summary.json"):
        assert json.loads((output_dir / name).read_text())
    # Label smoothing went to the model, whose own loss knows CTC, and not to the Trainer.
    model = AutoModelForSpeechSeq2Seq.from_pretrained(output_dir)
    assert isinstance(model, EchoForConditionalGeneration)
    assert model.config.label_smoothing == 0.1 and arguments.label_smoothing_factor == 0.1
    assert model.generation_config.max_length == model.config.max_target_positions == 12
    processor = AutoProcessor.from_pretrained(output_dir)
    assert processor.feature_extractor.feature_groups == model.config.feature_groups == json.loads(TINY_FEATURES)
    assert (output_dir / "modeling_echo.py").is_file()
    transcribe = pipeline("automatic-speech-recognition", model=str(output_dir))
    assert isinstance(transcribe(str(manifest.parent / "0.wav"))["text"], str)
    with pytest.raises(ValueError, match=r"holds a run already \(checkpoint-4\)"):
        train(model_arguments(), data, trainer_arguments(output_dir))

    # A checkpoint is where the next run may start from.
    further = ModelArguments(model_name_or_path=str(output_dir), config_overrides="dropout=0.2")
    train(further, data, trainer_arguments(tmp_path / "further", max_steps=1))
    config = EchoConfig.from_pretrained(tmp_path / "further")
    assert (config.dropout, config.label_smoothing) == (0.2, 0.0)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_missing_text_of_a_dataset_is_named_or_left_out(normalize, manifest, tmp_path):
    audio = [{"bytes": None, "path": str(manifest.parent / f"{number}.wav")} for number in range(3)]
    saved = datasets.Dataset.from_dict({"audio": audio, "text": ["low", None, "high"]})
    saved.save_to_disk(str(tmp_path / "saved"))
    options = {"normalize_text": normalize, "cache_dir": str(tmp_path / "cache")}
    data = DataArguments(train_data=[str(tmp_path / "saved")], **options)
    with pytest.raises(ValueError, match="saved row 1: there is no text"):
        train(model_arguments(), data, trainer_arguments(tmp_path / "run", max_steps=1))
    data.skip_broken = True
    assert train(model_arguments(), data, trainer_arguments(tmp_path / "run", max_steps=1))["train"]["utterances"] == 2


def test_a_run_resumed_after_its_last_step_takes_no_other(manifest, tmp_path):
    """As when the disk was full at the end. The last step is not the last of an epoch."""
    output_dir = tmp_path / "run"
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    arguments = trainer_arguments(output_dir, save_strategy="steps", save_steps=4, **settings)
    train(model_arguments(), data, arguments)
    expected = (output_dir / "model.safetensors").read_bytes()
    assert (output_dir / "checkpoint-4" / "model.safetensors").read_bytes() == expected
    (output_dir / "model.safetensors").unlink()
    assert train(model_arguments(), data, arguments, resume=True)["steps"] == 4
    assert (output_dir / "model.safetensors").read_bytes() == expected
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-4"]


def test_every_part_of_the_loss_is_trained(manifest, tmp_path):
    output_dir = tmp_path / "run"
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    train(model_arguments(), data, trainer_arguments(output_dir, label_smoothing_factor=0.1))
    before, _ = build_model_and_processor(model_arguments(), [])
    after = EchoForConditionalGeneration.from_pretrained(output_dir)
    assert not before.ctc_head.bias.any(), "biases start at 0"
    assert after.ctc_head.bias.any()


# Consistency ---------------------------------------------------------------------------------------------------------


def test_disagreement_is_the_divergence_of_each_view_from_the_other():
    first, second = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.125, 0.125, 0.75])
    logits = torch.stack([first.log(), second.log(), second.log(), second.log()])[:, None].repeat(1, 2, 1)
    logits.requires_grad_()
    mask = torch.tensor([[1, 0], [1, 0], [1, 1], [1, 1]])  # the second utterance's views are the same
    value = training.disagreement(logits + 3.0, mask)
    expected = (second * (second / first).log()).sum() + (first * (first / second).log()).sum()
    torch.testing.assert_close(value, expected)
    # Each view is drawn to the other as to a target: the gradient of a cross-entropy.
    value.backward()
    torch.testing.assert_close(logits.grad[:2, 0], torch.stack([first - second, second - first]))
    assert logits.grad[2:].abs().max() < 1e-6 and not logits.grad[:2, 1].any()


def test_consistency_adds_what_views_disagree_on_a_token_to_the_loss(manifest, tmp_path, monkeypatch):
    model, processor = build_model_and_processor(model_arguments(), ["low", "high"])
    rows = list(prepare_dataset(load_sources(manifest), processor, cache_dir=tmp_path / "cache").dataset)
    batch = EchoDataCollator(processor)(rows)
    tokens = (batch["labels"] != -100).sum()
    frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1)).sum()

    def loss_of(weight, model=model, inputs=batch, **settings):
        trainer = EchoTrainer(
            model=model,
            args=trainer_arguments(tmp_path / "run"),
            data_collator=EchoDataCollator(processor),
            train_dataset=rows,
            processing_class=processor,
            consistency_weight=weight,
        )
        return trainer.compute_loss(model, dict(inputs), **settings)

    def disagree_by_one(context):
        """At every real position, so that it is known how much is added."""
        context.setattr(training, "disagreement", lambda logits, mask: (mask.expand(logits.shape[:2]) * 1.0).sum())

    model.train()
    ctc_weight = model.config.ctc_loss_weight
    for num_processes in (1, 2):  # of which the Trainer takes the mean, having multiplied the loss by their number
        monkeypatch.setattr(Accelerator, "num_processes", property(lambda self, number=num_processes: number))
        for settings in ({}, {"num_items_in_batch": tokens}, {"num_items_in_batch": 3 * tokens}):
            plain = loss_of(0.0, **settings)
            # Nothing is masked or dropped out, so two views say the same as one.
            torch.testing.assert_close(loss_of(0.5, **settings), plain)
            with monkeypatch.context() as context:
                disagree_by_one(context)
                share = num_processes * tokens / settings["num_items_in_batch"] if settings else 1.0
                expected = plain + 0.5 * share * ((1 - ctc_weight) + ctc_weight * frames / tokens)
                torch.testing.assert_close(loss_of(0.5, **settings), expected)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 1))

    # A model without a decoder disagrees about frames alone; without a mask all of them are real.
    ctc_model = EchoForCTC(model.config).train()
    whole = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    all_frames = len(rows) * model._get_feat_extract_output_lengths(batch["input_features"].shape[1])
    for inputs, count in ((batch, frames), (whole, all_frames)):
        plain = loss_of(0.0, ctc_model, inputs)
        torch.testing.assert_close(loss_of(0.5, ctc_model, inputs), plain)
        with monkeypatch.context() as context:
            disagree_by_one(context)
            torch.testing.assert_close(loss_of(0.5, ctc_model, inputs), plain + 0.5 * count / tokens)

    model.eval()
    monkeypatch.setattr(training, "disagreement", lambda *_: pytest.fail("an evaluation hears each once"))
    loss_of(0.5)


def test_a_run_hears_views_that_differ(manifest, tmp_path, monkeypatch):
    measured, measure = [], training.disagreement
    monkeypatch.setattr(training, "disagreement", lambda *given: measured.append(measure(*given)) or measured[-1])
    made, make = [], EchoDataCollator.__call__
    monkeypatch.setattr(EchoDataCollator, "__call__", lambda self, rows: made.append(make(self, rows)) or made[-1])
    data = DataArguments(
        train_data=[str(manifest)],
        cache_dir=str(tmp_path / "cache"),
        consistency_weight=0.2,
        join=1.0,
        max_seconds=1.0,
    )
    settings = {"per_device_train_batch_size": 4, "max_steps": 10}
    arguments = model_arguments(config_overrides=TINY + ",dropout=0.2")
    summary = train(arguments, data, trainer_arguments(tmp_path / "run", **settings))
    assert len(measured) == 20 and all(value > 0 for value in measured)  # tokens and frames of 10 steps
    assert np.isfinite(summary["train_loss"])
    # Joined to 1 s and 12 tokens at most; in this vocabulary "high low" has 10, and three texts have more.
    seconds = [batch["attention_mask"].sum(-1).max() / 100 for batch in made]
    assert 0.6 < max(seconds) <= 1.0
    assert 5 < max(batch["labels"].shape[1] for batch in made) <= 12


class Interrupt(TrainerCallback):
    """The user's Ctrl+C in the middle of the second epoch."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("save_steps", "muon"), [(2, False), (3, False), (2, True)])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(manifest, tmp_path, save_steps, muon):
    """To the bit of chance: perturbation, masks, dropout and LayerDrop go on where they were, also within an epoch."""
    data = DataArguments(
        train_data=[str(manifest)],
        cache_dir=str(tmp_path / "cache"),
        tempo_perturbation=0.2,
        voice_perturbation=0.2,
        channel_perturbation=0.2,
        join=0.5,
        consistency_weight=0.2,
        muon=muon,
    )
    chance = "dropout=0.2,apply_spec_augment=true"
    arguments = model_arguments(config_overrides=f"{TINY},{chance}")
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": save_steps}  # an epoch has 3 steps
    train(arguments, data, trainer_arguments(tmp_path / "straight", **settings))
    with pytest.raises(KeyboardInterrupt):
        train(arguments, data, trainer_arguments(tmp_path / "broken", **settings), callbacks=[Interrupt()])
    last = f"checkpoint-{save_steps}"
    assert find_last_checkpoint(tmp_path / "broken").name == last
    summary = train(arguments, data, trainer_arguments(tmp_path / "broken", **settings), resume=True)
    assert (summary["resumed_from"], summary["steps"]) == (last, 6)
    straight = EchoForConditionalGeneration.from_pretrained(tmp_path / "straight").state_dict()
    resumed = EchoForConditionalGeneration.from_pretrained(tmp_path / "broken").state_dict()
    for name, values in straight.items():
        torch.testing.assert_close(resumed[name], values, msg=name)


def test_muon_trains_the_matrices_by_the_settings_of_the_run(manifest, tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, arguments, state, control, optimizer=None, **kwargs):
            seen.extend(optimizer.param_groups)

    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"), muon=True)
    settings = {"learning_rate": 0.01, "adam_beta2": 0.9, "weight_decay": 0.2, "lr_scheduler_type": "constant"}
    train(model_arguments(), data, trainer_arguments(tmp_path / "run", **settings), callbacks=[Look()])
    assert [group["muon"] for group in seen] == [True, False, False]
    assert [group["weight_decay"] for group in seen] == [0.2, 0.2, 0.0]
    assert all(group["initial_lr"] == 0.01 and group["betas"][1] == 0.9 for group in seen)


def test_weights_are_averaged_over_the_last_checkpoints_also_after_an_interruption(manifest, tmp_path):
    """Not those before, and what was saved before an interruption counts as what was saved after it."""
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"), average_checkpoints=3)
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 4}
    with pytest.raises(KeyboardInterrupt):
        train(model_arguments(), data, trainer_arguments(tmp_path / "run", **settings), callbacks=[Interrupt()])
    train(model_arguments(), data, trainer_arguments(tmp_path / "run", **settings), resume=True)
    folders = [tmp_path / "run" / f"checkpoint-{step}" for step in (3, 4, 5)]
    weights = [EchoForConditionalGeneration.from_pretrained(folder).state_dict() for folder in folders]
    averaged = EchoForConditionalGeneration.from_pretrained(tmp_path / "run").state_dict()
    assert averaged.keys() == weights[0].keys()
    moved = 0
    for name, value in averaged.items():
        mean = (weights[0][name] + weights[1][name] + weights[2][name]) / 3
        torch.testing.assert_close(value, mean, msg=name)
        moved += not torch.equal(value, weights[2][name])
    assert moved > len(averaged) / 2


def test_too_few_checkpoints_to_average_leave_the_last_weights(manifest, tmp_path, monkeypatch):
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"), average_checkpoints=3)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    warnings = []
    monkeypatch.setattr(training.logger, "warning", warnings.append)
    train(model_arguments(), data, trainer_arguments(tmp_path / "run", **settings))
    assert any("only 2 checkpoints were saved" in warning for warning in warnings)
    last = (tmp_path / "run" / "checkpoint-4" / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == last


def test_the_end_is_the_mean_of_start_and_last_also_after_an_interruption(manifest, tmp_path):
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    train(model_arguments(), data, trainer_arguments(tmp_path / "start"))
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "start"))
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    train(arguments, data, trainer_arguments(tmp_path / "plain", **settings))
    data.start_share = 0.25
    with pytest.raises(KeyboardInterrupt):
        train(arguments, data, trainer_arguments(tmp_path / "mean", **settings), callbacks=[Interrupt()])
    train(arguments, data, trainer_arguments(tmp_path / "mean", **settings), resume=True)
    start, last, mean = (
        EchoForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("start", "plain", "mean")
    )
    for name, value in mean.items():
        torch.testing.assert_close(value, 0.25 * start[name] + 0.75 * last[name], atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(value, last[name]) for name, value in mean.items())
    # What was saved on the way is the model in training.
    saved = EchoForConditionalGeneration.from_pretrained(tmp_path / "mean" / "checkpoint-6").state_dict()
    assert all(torch.equal(value, last[name]) for name, value in saved.items())


def test_a_mean_with_the_start_that_cannot_be_is_an_error(manifest, tmp_path):
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"), start_share=0.5)
    with pytest.raises(ValueError, match="no model_name_or_path to start from"):
        train(model_arguments(), data, trainer_arguments(tmp_path / "run"))
    model, processor = build_model_and_processor(model_arguments(), ["low", "high"])
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    deeper = ModelArguments(model_name_or_path=str(tmp_path / "start"), config_overrides="encoder_num_hidden_layers=2")
    with pytest.raises(ValueError, match=r"model of the shape that it starts with.*encoder\.layers\.1"):
        train(deeper, data, trainer_arguments(tmp_path / "run"))
    data.start_share = 1.0
    with pytest.raises(ValueError, match="below 1, got 1.0"):
        train(ModelArguments(model_name_or_path=str(tmp_path / "start")), data, trainer_arguments(tmp_path / "run"))


def test_averaging_waits_for_the_process_that_writes_checkpoints(tmp_path):
    model, _ = build_model_and_processor(model_arguments(), ["low"])

    def write(step, value):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")

    @contextmanager
    def main_process_first(local, desc):
        assert not local
        write(3, 4.0)  # the last one, as seen by a process that did wait
        yield

    write(1, 1.0)
    write(2, 2.0)
    arguments = SimpleNamespace(output_dir=str(tmp_path), main_process_first=main_process_first)
    CheckpointAveraging(2).on_train_end(arguments, None, None, model=model)
    assert all((parameter == 3.0).all() for parameter in model.parameters())


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


def test_wider_feed_forwards_add_nothing_until_they_learn(tmp_path):
    start, processor = build_model_and_processor(model_arguments(), ["low", "high"])
    start.generation_config.ctc_weight = 0.7
    start.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    overrides = "encoder_intermediate_size=24,decoder_intermediate_size=20,encoder_num_hidden_layers=2,pitch_gate=true"
    wider, _ = build_model_and_processor(
        ModelArguments(model_name_or_path=str(tmp_path), config_overrides=overrides), []
    )
    assert (wider.config.encoder_intermediate_size, wider.config.decoder_intermediate_size) == (24, 20)
    assert wider.generation_config.ctc_weight == 0.7
    inputs = {
        "input_features": torch.rand(2, 40, start.config.num_feature_channels),
        "labels": processor.tokenizer(["low", "high"], padding=True, return_tensors="pt")["input_ids"],
    }
    torch.testing.assert_close(wider.eval()(**inputs).logits, start.eval()(**inputs).logits)
    wider.train()(**inputs).loss.backward()
    for block in (wider.model.encoder, wider.model.decoder):
        assert block.layers[0].mlp.down_proj.weight.grad[:, 16:].any()
    for width in (8, "many"):
        overrides = json.dumps({"encoder_intermediate_size": width})
        with pytest.raises(
            ValueError, match=f"encoder_intermediate_size is to be {width}, and is 16 in the checkpoint"
        ):
            build_model_and_processor(ModelArguments(model_name_or_path=str(tmp_path), config_overrides=overrides), [])
    wider.save_pretrained(tmp_path / "wider")
    again = EchoForConditionalGeneration.from_pretrained(tmp_path / "wider").eval()
    torch.testing.assert_close(again(**inputs).logits, start(**inputs).logits)


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (1, {}, "average_checkpoints must be 0, or at least 2, got 1"),
        (3, {"save_total_limit": 2}, "save_total_limit keeps 2; raise it"),
        (
            3,
            {"save_total_limit": 3, "eval_strategy": "steps"},
            "the best, which may be old; raise it to 4",
        ),
        (2, {"load_best_model_at_end": True, "eval_strategy": "steps"}, "leave one of them out"),
        (2, {"save_strategy": "no"}, "none are saved; set save_strategy"),
    ],
)
def test_averaging_that_cannot_be_is_an_error(manifest, tmp_path, count, settings, message):
    data = DataArguments(
        train_data=[str(manifest)],
        eval_data=[str(manifest)],
        cache_dir=str(tmp_path / "cache"),
        average_checkpoints=count,
    )
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1, **settings}
    with pytest.raises(ValueError, match=message):
        train(model_arguments(), data, trainer_arguments(tmp_path / "run", **settings))


def test_clips_without_speech_are_trained_on_with_an_empty_text(manifest, tmp_path):
    _, processor = build_model_and_processor(model_arguments(), ["low", "high"])
    data = prepare_dataset(load_sources(manifest), processor, cache_dir=tmp_path)
    both = training.add_non_speech(data, 0.4, processor, seed=3, cache_dir=tmp_path)
    assert len(both.dataset) == len(data.dataset) + 3  # 2.4, rounded up
    assert both.dataset["text"][-3:] == ["", "", ""] and both.seconds > data.seconds
    config = processor.tokenizer
    assert both.dataset["labels"][-3:] == [[config.bos_token_id, config.eos_token_id]] * 3
    np.testing.assert_array_equal(both.dataset[0]["input_features"], data.dataset[0]["input_features"])
    again = training.add_non_speech(data, 0.4, processor, seed=3, cache_dir=tmp_path / "other")
    np.testing.assert_array_equal(both.dataset[-1]["input_features"], again.dataset[-1]["input_features"])
    settings = DataArguments(
        train_data=[str(manifest)], non_speech_share=0.5, f0_drop=0.5, f0_shift=0.2, cache_dir=str(tmp_path)
    )
    spoken = data.dataset.add_column("language", ["en"] * 6)
    told = training.PreparedData(spoken.with_format("numpy", ["input_features"], output_all_columns=True), [], 1.0)
    languages = training.add_non_speech(told, 0.4, processor, seed=3, cache_dir=tmp_path).dataset["language"]
    assert languages[:] == ["en"] * 6 + [None] * 3  # which utterances are joined hangs on it
    summary = train(model_arguments(attn_implementation="eager"), settings, trainer_arguments(tmp_path / "run"))
    assert summary["train"]["utterances"] == 9 and summary["train"]["without_speech"] == 3
    assert np.isfinite(summary["train_loss"])
    assert "attn_implementation" not in (tmp_path / "run" / "config.json").read_text()


def test_settings_that_cannot_be_are_refused_before_features_are_computed(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "prepare_dataset", lambda *_, **__: pytest.fail("features were computed"))
    for options, settings, message in (
        ({"non_speech_share": 1.5}, {}, r"non_speech_share must be in \[0, 1\], got 1.5"),
        (
            {"average_checkpoints": 3},
            {"save_strategy": "steps", "save_total_limit": 2},
            "average_checkpoints is 3, and save_total_limit keeps 2",
        ),
        ({"voice_perturbation": 1.5}, {}, r"voice must be in \[0, 1\], got 1.5"),
        ({"join": -0.5}, {}, r"join must be in \[0, 1\], got -0.5"),
        ({"consistency_weight": -1.0}, {}, "consistency_weight must not be negative, got -1.0"),
        ({"consistency_weight": 0.2}, {}, "two views of an utterance would be the same"),
        ({"muon": True}, {"optim": "adafactor"}, "muon is set, and so is optim, to adafactor"),
        ({"muon": True}, {"optim_args": "foreach=true"}, "takes nothing of optim_args, 'foreach=true'"),
    ):
        data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"), **options)
        with pytest.raises(ValueError, match=message):
            train(model_arguments(), data, trainer_arguments(tmp_path / "run", **settings))


def test_resuming_keeps_the_tokenizer_of_the_weights(manifest, tmp_path):
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    arguments = model_arguments(token_unit="subword", vocab_size=261)
    train(arguments, data, trainer_arguments(tmp_path / "run", label_smoothing_factor=0.2, **settings))
    tokenizer = EchoTokenizer.from_pretrained(tmp_path / "run")
    manifest.write_text(manifest.read_text().replace("high", "zzzz"))  # another text, which makes other tokens
    train(arguments, data, trainer_arguments(tmp_path / "run", **{**settings, "max_steps": 3}), resume=True)
    assert EchoTokenizer.from_pretrained(tmp_path / "run").get_vocab() == tokenizer.get_vocab()
    assert EchoConfig.from_pretrained(tmp_path / "run").label_smoothing == 0.2


def test_text_can_be_trained_as_it_is_scored(manifest, tmp_path):
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("\n".join(json.dumps({**line, "text": line["text"].title() + "!"}) for line in lines))
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"), normalize_text=True)
    arguments = ModelArguments(
        config_overrides=TINY, feature_groups=TINY_FEATURES, token_unit="subword", vocab_size=262
    )
    train(arguments, data, trainer_arguments(tmp_path / "run"))
    merged = AutoProcessor.from_pretrained(tmp_path / "run").tokenizer.get_vocab()
    assert {"gh", "hi", "lo"} <= set(merged)  # as written, it would be merged with the capitals


def test_only_training_batches_are_perturbed(manifest, tmp_path):
    model, processor = build_model_and_processor(
        ModelArguments(preset="all", config_overrides=TINY, feature_groups=TINY_FEATURES), ["low", "high"], 0.0
    )
    data = prepare_dataset(load_sources([str(manifest)]), processor, cache_dir=tmp_path / "cache").dataset
    perturb = VoicePerturbation(processor.feature_extractor, voice=0.3).batch
    trainer = EchoTrainer(
        model=model,
        args=trainer_arguments(tmp_path / "run", per_device_train_batch_size=6, per_device_eval_batch_size=6),
        data_collator=EchoDataCollator(processor),
        train_collator=EchoDataCollator(processor, perturb=perturb),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
    )
    persistent = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    with pytest.raises(ValueError, match="dataloader_persistent_workers"):
        EchoTrainer(
            model=model,
            args=trainer_arguments(tmp_path / "run", **persistent),
            train_collator=EchoDataCollator(processor, perturb=perturb),
            train_dataset=data,
            processing_class=processor,
        )
    pitches = {round(float(row["input_features"][:, -1].max()), 2) for row in data}
    for loader, equal in ((trainer.get_eval_dataloader(), True), (trainer.get_train_dataloader(), False)):
        batch = next(iter(loader))
        heard = {round(float(value), 2) for value in batch["input_features"][..., -1].amax(-1)}
        assert (heard <= pitches) == equal


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to resume from .*start without --resume"):
        train(ModelArguments(), DataArguments(train_data=["x"]), trainer_arguments(tmp_path), resume=True)


def test_training_on_what_is_evaluated_is_said(manifest, monkeypatch):
    messages = []
    monkeypatch.setattr(training.logger, "warning", messages.append)
    table = load_sources(manifest)
    training._warn_of_overlap(table.select([0, 1]), table.select([2, 3]))
    assert messages == []
    training._warn_of_overlap(table.select([0, 1]), table.select([1, 2]))
    assert "1 of 2 recordings to evaluate on are trained on too" in messages[0]

"""A run leaves a complete checkpoint, can be resumed, and refuses what cannot be before it computes."""

import json

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

from echo_hf import EchoConfig, EchoForConditionalGeneration, EchoTokenizer
from echo_hf.data import EchoDataCollator, PreparedData, load_sources, prepare_dataset
from echo_hf.training import (
    AugmentationArguments,
    DataArguments,
    ModelArguments,
    build_model_and_processor,
    find_last_checkpoint,
    preparation,
    run,
    train,
)
from echo_hf.training.model import build_config, build_processor
from echo_hf.training.preparation import add_non_speech, count_beyond_ctc
from tiny_training import TINY, TINY_FEATURES, Interrupt, model_arguments, trainer_arguments, write_six_tones


@pytest.fixture
def manifest(tmp_path):
    return write_six_tones(tmp_path)


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


def test_utterances_are_joined_within_the_limits_of_a_run(manifest, tmp_path, monkeypatch):
    made, make = [], EchoDataCollator.__call__
    monkeypatch.setattr(EchoDataCollator, "__call__", lambda self, rows: made.append(make(self, rows)) or made[-1])
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"), max_seconds=1.0)
    settings = {"per_device_train_batch_size": 4, "max_steps": 10}
    augmentation = AugmentationArguments(join=1.0)
    arguments = trainer_arguments(tmp_path / "run", **settings)
    summary = train(model_arguments(), data, arguments, augmentation_arguments=augmentation)
    assert np.isfinite(summary["train_loss"])
    # Joined to 1 s and 12 tokens at most; in this vocabulary "high low" has 10, and three texts have more.
    seconds = [batch["attention_mask"].sum(-1).max() / 100 for batch in made]
    assert 0.6 < max(seconds) <= 1.0
    assert 5 < max(batch["labels"].shape[1] for batch in made) <= 12


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(manifest, tmp_path):
    """To the bit of chance: perturbation, masks and dropout go on where they were, also within an epoch of 3 steps."""
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    augmentation = AugmentationArguments(
        tempo_perturbation=0.2, voice_perturbation=0.2, channel_perturbation=0.2, join=0.5
    )
    model = model_arguments(config_overrides=f"{TINY},dropout=0.2,apply_spec_augment=true")

    def go(folder, save_steps, **options):
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": save_steps}
        arguments = trainer_arguments(tmp_path / folder, **settings)
        return train(model, data, arguments, augmentation_arguments=augmentation, **options)

    go("straight", save_steps=6)
    straight = EchoForConditionalGeneration.from_pretrained(tmp_path / "straight").state_dict()
    for save_steps in (2, 3):
        folder, last = f"broken{save_steps}", f"checkpoint-{save_steps}"
        with pytest.raises(KeyboardInterrupt):
            go(folder, save_steps, callbacks=[Interrupt()])
        assert find_last_checkpoint(tmp_path / folder).name == last
        summary = go(folder, save_steps, resume=True)
        assert (summary["resumed_from"], summary["steps"]) == (last, 6)
        resumed = EchoForConditionalGeneration.from_pretrained(tmp_path / folder).state_dict()
        for name, values in straight.items():
            torch.testing.assert_close(resumed[name], values, msg=name)


def test_clips_without_speech_are_trained_on_with_an_empty_text(manifest, tmp_path):
    _, processor = build_model_and_processor(model_arguments(), ["low", "high"])
    data = prepare_dataset(load_sources(manifest), processor, cache_dir=tmp_path)
    both = add_non_speech(data, 0.4, processor, seed=3, cache_dir=tmp_path)
    assert len(both.dataset) == len(data.dataset) + 3  # 2.4, rounded up
    assert both.dataset["text"][-3:] == ["", "", ""] and both.seconds > data.seconds
    config = processor.tokenizer
    assert both.dataset["labels"][-3:] == [[config.bos_token_id, config.eos_token_id]] * 3
    np.testing.assert_array_equal(both.dataset[0]["input_features"], data.dataset[0]["input_features"])
    again = add_non_speech(data, 0.4, processor, seed=3, cache_dir=tmp_path / "other")
    np.testing.assert_array_equal(both.dataset[-1]["input_features"], again.dataset[-1]["input_features"])
    settings = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path))
    augmentation = AugmentationArguments(non_speech_share=0.5, f0_drop=0.5)
    spoken = data.dataset.add_column("language", ["en"] * 6)
    told = PreparedData(spoken.with_format("numpy", ["input_features"], output_all_columns=True), [], 1.0)
    languages = add_non_speech(told, 0.4, processor, seed=3, cache_dir=tmp_path).dataset["language"]
    assert languages[:] == ["en"] * 6 + [None] * 3  # which utterances are joined hangs on it
    arguments = trainer_arguments(tmp_path / "run")
    model = model_arguments(attn_implementation="eager")
    summary = train(model, settings, arguments, augmentation_arguments=augmentation)
    assert summary["train"]["utterances"] == 9 and summary["train"]["without_speech"] == 3
    assert np.isfinite(summary["train_loss"])
    assert "attn_implementation" not in (tmp_path / "run" / "config.json").read_text()


def test_settings_that_cannot_be_are_refused_before_features_are_computed(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "prepare_dataset", lambda *_, **__: pytest.fail("features were computed"))
    for augmentation, message in (
        (AugmentationArguments(non_speech_share=1.5), r"non_speech_share must be in \[0, 1\], got 1.5"),
        (AugmentationArguments(voice_perturbation=1.5), r"voice must be in \[0, 1\], got 1.5"),
        (AugmentationArguments(join=-0.5), r"join must be in \[0, 1\], got -0.5"),
    ):
        data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
        arguments = trainer_arguments(tmp_path / "run")
        with pytest.raises(ValueError, match=message):
            train(model_arguments(), data, arguments, augmentation_arguments=augmentation)


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


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to resume from .*start without --resume"):
        train(ModelArguments(), DataArguments(train_data=["x"]), trainer_arguments(tmp_path), resume=True)


def test_training_on_what_is_evaluated_is_said(manifest, monkeypatch):
    messages = []
    monkeypatch.setattr(run.logger, "warning", messages.append)
    table = load_sources(manifest)
    run._warn_of_overlap(table.select([0, 1]), table.select([2, 3]))
    assert messages == []
    run._warn_of_overlap(table.select([0, 1]), table.select([1, 2]))
    assert "1 of 2 recordings to evaluate on are trained on too" in messages[0]


@pytest.mark.parametrize(
    ("capabilities", "bf16", "warns"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False, "cpu_name": "bf16"}, True, True),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False, False),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, True, False),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": True}, True, False),
    ],
)
def test_bfloat16_on_a_processor_without_it_is_said_to_be_slow(capabilities, bf16, warns, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(run.logger, "warning", messages.append)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    run.check_settings(trainer_arguments(tmp_path, bf16=bf16), AugmentationArguments())
    assert [("no instructions for bfloat16" in message) for message in messages] == [True] * warns

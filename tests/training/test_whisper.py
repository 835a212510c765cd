"""A run starts from a Whisper, gives it pitch on the way, and leaves a complete checkpoint that can be trained on."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration, pipeline

from echo_hf import EchoWhisperFeatureExtractor, EchoWhisperForConditionalGeneration, EchoWhisperProcessor, load_audio
from echo_hf.cli import main
from echo_hf.cli.options import generate_options
from echo_hf.data import load_sources, prepare_dataset
from echo_hf.data.whisper import WhisperDataCollator, WhisperFrameProcessor
from echo_hf.inference import _count_cut_off, load_recognizer, recognize
from echo_hf.training import (
    AugmentationArguments,
    DataArguments,
    ModelArguments,
    build_model_and_processor,
    find_last_checkpoint,
    train,
)
from tiny_training import trainer_arguments, write_six_tones
from tiny_whisper import FRAMES, make_processor, make_whisper


@pytest.fixture
def manifest(tmp_path):
    return write_six_tones(tmp_path)


@pytest.fixture
def whisper(tmp_path):
    make_whisper(max_source_positions=100).save_pretrained(tmp_path / "whisper")
    make_processor(chunk_length=2).save_pretrained(tmp_path / "whisper")
    return str(tmp_path / "whisper")


def whisper_arguments(output_dir, **changes):
    return trainer_arguments(output_dir, **{"learning_rate": 1e-4, "generation_max_length": 8, **changes})


def test_a_run_gives_a_whisper_pitch_and_can_be_resumed_and_trained_further(whisper, manifest, tmp_path, capsys):
    data = DataArguments(train_data=[str(manifest)], eval_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    model = ModelArguments(
        whisper, language="en", window=1, config_overrides="pitch_theta=true,pitch_gate=false,apply_spec_augment=true"
    )
    arguments = whisper_arguments(tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=2)
    summary = train(model, data, arguments)
    assert summary["steps"] == 2 and summary["metrics"]["reference_words"] == 6
    assert "echo_whisper" in (tmp_path / "run" / "config.json").read_text()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "read by ffmpeg" in card and "need `return_timestamps=True`" in card
    assert "It hears 1 s at a time" in card and "pitch_stem=True, pitch_radius=True, pitch_theta=True." in card

    trained = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "run")
    assert isinstance(trained, EchoWhisperForConditionalGeneration) and trained.config.apply_spec_augment
    assert trained.generation_config.language == "en" and trained.generation_config.task == "transcribe"
    for name, parameter in trained.named_parameters():
        if "pitch_" in name:
            assert parameter.any(), name
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert processor.feature_extractor.chunk_length == 1
    assert processor.decode(processor.tokenizer("x").input_ids).startswith("<|startoftranscript|><|en|><|transcribe|>")
    recognize = pipeline("automatic-speech-recognition", str(tmp_path / "run"))
    assert isinstance(recognize(load_audio(manifest.parent / "0.wav")[0])["text"], str)

    run = str(tmp_path / "run")
    options = ["--cache_dir", str(tmp_path / "cache"), "--device", "cpu", "--format", "json", "--max_new_tokens", "8"]
    assert main(["evaluate", str(manifest), "--checkpoint", run, "--control", "shuffled", *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["sources"][0]["real"]["reference_words"] == 6

    arguments.max_steps = 3
    assert train(model, data, arguments, resume=True)["resumed_from"] == "checkpoint-2"
    assert find_last_checkpoint(tmp_path / "run").name == "checkpoint-3"
    further = ModelArguments(str(tmp_path / "run"), config_overrides="pitch_gate=true")
    train(further, data, whisper_arguments(tmp_path / "further", max_steps=1))
    config = json.loads((tmp_path / "further" / "config.json").read_text())
    assert config["pitch_gate"] and config["pitch_theta"]


def test_batches_are_what_the_model_takes(whisper, manifest, tmp_path):
    model, processor = build_model_and_processor(ModelArguments(whisper, language="zh", f0_method="dio"), [])
    table = load_sources(manifest)
    preparation = WhisperFrameProcessor(processor)
    prepared = prepare_dataset(table, preparation, cache_dir=tmp_path / "cache").dataset
    collator = WhisperDataCollator(preparation.feature_extractor, model.config.decoder_start_token_id)
    batch = collator([prepared[0], prepared[5]])
    audio = [load_audio(manifest.parent / f"{number}.wav")[0] for number in (0, 5)]
    expected = processor.feature_extractor(audio, sampling_rate=16000, return_tensors="pt")
    torch.testing.assert_close(batch["input_features"], expected.input_features, atol=1e-4, rtol=0)
    assert processor.feature_extractor.f0_method == "dio"
    texts = processor.batch_decode(batch["labels"].where(batch["labels"] >= 0, model.config.pad_token_id))
    assert texts[0] == "<|zh|><|transcribe|><|notimestamps|>low<|endoftext|><|endoftext|>"
    assert texts[1] == "<|zh|><|transcribe|><|notimestamps|>high<|endoftext|>"
    assert batch["labels"][0, -1] == -100 and batch["labels"][0, -2] == model.config.eos_token_id
    loss = model(**batch).loss
    stock = WhisperForConditionalGeneration.from_pretrained(whisper)
    assert loss == stock(batch["input_features"][:, :80], labels=batch["labels"]).loss


def test_speech_longer_than_the_window_is_left_out_and_not_cut(whisper, tmp_path, capsys):
    manifest = write_six_tones(tmp_path)  # 0.3 to 0.55 s
    lines = manifest.read_text().splitlines() + [json.dumps({"audio": "long.wav", "text": "long"})]
    manifest.write_text("\n".join(lines))
    soundfile.write(tmp_path / "long.wav", np.zeros(40000), 16000)
    data = DataArguments(train_data=[str(manifest)], eval_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    model = ModelArguments(whisper, language="en")
    summary = train(model, data, whisper_arguments(tmp_path / "run", max_steps=1))
    assert (summary["train"]["utterances"], summary["train"]["skipped"]) == (6, 1)
    assert (summary["eval"]["utterances"], summary["eval"]["skipped"]) == (6, 1)
    command = ["evaluate", str(manifest), "--checkpoint", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, "--cache_dir", str(tmp_path / "cache")]) == 1
    assert "audio has 2.5 s, and this Whisper hears 2 s at a time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "augmentation", "trainer", "message"),
    [
        ({"preset": "all"}, {}, {}, "preset: only an Echo"),
        ({}, {"join": 0.5}, {}, "join: only an Echo"),
        ({}, {}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor: only an Echo"),
        ({}, {}, {"learning_rate": 5e-4}, "Give at most 0.0001; 1e-05 is usual"),
        ({"config_overrides": "pitch_gates=true"}, {}, {}, "EchoWhisperConfig has no field 'pitch_gates'"),
        ({"language": "klingon"}, {}, {}, "klingon"),
        ({}, {}, {}, "knows many. Give the one of the texts, e.g. --language en"),
        ({"window": 3}, {}, {}, "from 1 to 2, got 3"),
    ],
)
def test_what_a_whisper_cannot_be_trained_with_is_refused(
    whisper, manifest, tmp_path, model, augmentation, trainer, message
):
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    arguments = whisper_arguments(tmp_path / "run", **trainer)
    augmentation = AugmentationArguments(**augmentation)
    with pytest.raises(ValueError, match=message):
        train(ModelArguments(whisper, **model), data, arguments, augmentation_arguments=augmentation)


def test_the_learning_rate_is_a_whispers_where_none_is_given(whisper, monkeypatch):
    given = {}

    def record(model, data, training, **options):
        given[model.model_name_or_path] = training.learning_rate
        raise KeyboardInterrupt

    monkeypatch.setattr("echo_hf.training.train", record)
    command = ["train", "--train_data", "x.jsonl", "--output_dir", "out", "--use_cpu"]
    for options in (["--model_name_or_path", whisper], []):
        assert main([*command, *options]) == 130
    assert given == {whisper: 1e-5, None: 5e-4}


@pytest.fixture
def pitched(whisper, tmp_path):
    """A checkpoint of a Whisper with pitch whose window is 1 s."""
    assert (
        main(["add-pitch", whisper, str(tmp_path / "pitched"), "--window", "1", "--mechanisms", "stem", "theta"]) == 0
    )
    return str(tmp_path / "pitched")


def test_transcribe_takes_a_whisper_and_recordings_longer_than_its_window(pitched, manifest, capsys):
    folder = manifest.parent
    times = np.arange(40000) / 16000
    soundfile.write(folder / "long.flac", 0.3 * np.sin(2 * np.pi * 150 * times), 16000)
    files = [str(folder / name) for name in ("0.wav", "long.flac", "1.wav")]
    command = ["transcribe", *files, "--checkpoint", pitched, "--device", "cpu", "--format", "json"]
    capsys.readouterr()
    assert main(command) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    recognize = pipeline("automatic-speech-recognition", pitched, device="cpu")
    for path, result in zip(files, results, strict=True):
        audio = load_audio(path)[0]
        long = {"return_timestamps": True} if len(audio) > 16000 else {}
        assert result["text"] == recognize(audio, generate_kwargs={"num_beams": 1}, **long)["text"].strip()
        assert result["seconds"] == len(audio) / 16000 and "chunks" not in result
    assert main([*command, "--timestamps", "segment"]) == 0
    for line, path in zip(capsys.readouterr().out.splitlines(), files, strict=True):
        result = json.loads(line)
        assert result["path"] == path
        times = [chunk[name] for chunk in result["chunks"] for name in ("start", "end")]
        assert times == sorted(times) and 0 < times[-1] <= result["seconds"]  # behind the first window, too
    for option in (["--chunk_length_s", "5"], ["--ctc_weight", "0.5"]):
        assert main([*command, *option]) == 1
        assert "does not apply to EchoWhisperForConditionalGeneration" in capsys.readouterr().err


def test_evaluate_names_and_switches_the_mechanisms_of_a_whisper(pitched, manifest, tmp_path, capsys):
    command = ["evaluate", str(manifest), "--checkpoint", pitched, "--device", "cpu", "--max_new_tokens", "4"]
    command += ["--format", "json", "--cache_dir", str(tmp_path / "cache")]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["mechanisms"] == {"pitch_stem": True, "pitch_theta": True}
    assert main([*command, "--config_overrides", "pitch_theta=false"]) == 0
    assert json.loads(capsys.readouterr().out)["mechanisms"] == {"pitch_stem": True}
    assert main([*command, "--config_overrides", "theta_mode=none"]) == 1
    assert "EchoWhisperConfig has no field 'theta_mode'" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"language": "en"}, {"window": 10}])
def test_what_is_of_a_whisper_is_refused_without_one(option):
    with pytest.raises(ValueError, match="is of a Whisper alone"):
        build_model_and_processor(ModelArguments(**option), [])


def test_features_do_not_hang_on_the_processor_they_are_saved_with(whisper):
    processor = build_model_and_processor(ModelArguments(whisper, language="en"), [])[1]
    frames = WhisperFrameProcessor(processor).feature_extractor
    assert frames.feature_size == 81 and frames.mel_filters.shape[1] == 80
    assert type(processor.feature_extractor) is EchoWhisperFeatureExtractor
    assert processor.feature_extractor.nb_max_frames == 2 * FRAMES


def test_zeroed_audio_is_silence(pitched, manifest, tmp_path):
    model, processor = load_recognizer(pitched, "cpu")
    preparation = WhisperFrameProcessor(processor)
    prepared = prepare_dataset(load_sources(manifest), preparation, cache_dir=tmp_path / "cache").dataset
    texts, _ = recognize(model, preparation, prepared, control="zeroed", max_length=6)
    silence = processor.feature_extractor(np.zeros(16000), sampling_rate=16000, return_tensors="pt").input_features
    assert texts == processor.batch_decode(model.generate(silence, max_length=6), skip_special_tokens=True) * 6
    assert (silence[0, :80] == -1.5).all() and not silence[0, 80].any()  # (log10(1e-10) + 4) / 4


def test_what_is_cut_off_is_counted_and_as_long_as_asked(pitched):
    model = load_recognizer(pitched, "cpu")[0]
    end = model.generation_config.pad_token_id
    ids = torch.tensor([[5, 6, 7, end], [5, 6, 7, 8]])  # `generate` drops the end; the longest text is not padded
    assert [_count_cut_off(ids, model, {"max_length": length}) for length in (3, 4, 5)] == [2, 1, 0]
    assert _count_cut_off(ids, model, {}) == 0
    given = {"num_beams": 1, "ctc_weight": None, "max_new_tokens": 4, "generate_kwargs": '{"repetition_penalty": 2}'}
    settings = generate_options(Namespace(**given), model)
    assert settings == {"num_beams": 1, "max_length": 4, "repetition_penalty": 2}
    ids = model.generate(torch.randn(2, 81, FRAMES), **settings | {"repetition_penalty": 2.0, "suppress_tokens": [end]})
    assert ids.shape == (2, 4) and _count_cut_off(ids, model, settings) == 2


def test_settings_of_generate_are_passed_on(pitched, manifest, capsys):
    command = ["transcribe", str(manifest.parent / "0.wav"), "--checkpoint", pitched, "--device", "cpu"]
    fallback = {"temperature": [0.0, 0.5], "logprob_threshold": -0.1, "compression_ratio_threshold": 1.1}
    assert main([*command, "--generate_kwargs", json.dumps({"no_speech_threshold": 0.6, **fallback})]) == 0
    assert main([*command, "--generate_kwargs", '{"max_length": 3, "suppress_tokens": null}']) == 0
    assert main([*command, "--generate_kwargs", '{"temprature": 0.5}']) == 1
    assert "not used by the model: ['temprature']" in capsys.readouterr().err
    assert main([*command, "--generate_kwargs", '{"num_return_sequences": 2}']) == 1
    assert "num_return_sequences changes what generate() returns" in capsys.readouterr().err
    assert main([*command, "--generate_kwargs", '{"length_penalty": "x"}']) == 1
    assert "--generate_kwargs: length_penalty must be a number, or left out, got 'x'." in capsys.readouterr().err
    assert main([*command, "--generate_kwargs", "temperature=0.5"]) == 1
    assert "--generate_kwargs: 'temperature=0.5' is not JSON" in capsys.readouterr().err


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "cut off or damaged": cut_weights,
    "has no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "has no processor_config.json": lambda folder: (folder / "processor_config.json").unlink(),
    "is WhisperFeatureExtractor, which tracks no F0": lambda folder: make_processor().save_pretrained(folder),
    "hears 2 s at a time, and the model 1 s": lambda folder: EchoWhisperProcessor(
        EchoWhisperFeatureExtractor(chunk_length=2), make_processor().tokenizer
    ).save_pretrained(folder),
    "with 128 channels, and the model takes 80 mel bins": lambda folder: EchoWhisperProcessor(
        EchoWhisperFeatureExtractor(chunk_length=1, feature_size=128), make_processor().tokenizer
    ).save_pretrained(folder),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGES.items(), ids=DAMAGES)
def test_a_checkpoint_that_is_not_complete_or_does_not_fit_is_an_error_everywhere(pitched, tmp_path, message, damage):
    damage(Path(shutil.copytree(pitched, tmp_path / "damaged")))
    for load in (load_recognizer, lambda name: build_model_and_processor(ModelArguments(name, language="en"), [])):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path / "damaged"))


def test_mechanisms_without_weights_and_whispers_without_pitch_are_refused(pitched, whisper):
    with pytest.raises(ValueError, match=r"weights lack .*pitch.*leave pitch_gate as it was saved"):
        load_recognizer(pitched, pitch_gate=True)
    with pytest.raises(ValueError, match="of type 'whisper'.*Give it pitch first: echo-hf add-pitch"):
        load_recognizer(whisper)

"""`pipeline("automatic-speech-recognition", model=folder)`, with the package and with the checkpoint's own code."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import soundfile
import soxr
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    pipeline,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.pipelines.pt_utils import KeyDataset

from conftest import SAMPLING_RATE, voice
from echo_hf import (
    EchoAutomaticSpeechRecognitionPipeline,
    EchoForConditionalGeneration,
    EchoForCTC,
    EchoTokenizer,
    pipeline_echo,
)
from echo_hf.inference import BUNDLED_CHECKPOINT, BUNDLED_RECORDINGS, find_audio_files
from echo_hf.segmentation_echo import read_blocks, runs

TASK = "automatic-speech-recognition"


@pytest.fixture(scope="module")
def recognizer(checkpoint):
    return pipeline(TASK, model=str(checkpoint))


@pytest.fixture(scope="module")
def ctc_recognizer(ctc_checkpoint):
    return pipeline(TASK, model=str(ctc_checkpoint))


@pytest.fixture(params=["seq2seq", "ctc"])
def either(request, recognizer, ctc_recognizer):
    return recognizer if request.param == "seq2seq" else ctc_recognizer


@pytest.fixture
def files(tmp_path):
    """One recording as 24-bit FLAC, float WAV, stereo WAV and 16-bit WAV at 8 kHz."""
    audio = voice(1.0)
    paths = {name: tmp_path / f"{name}.wav" for name in ("wav", "stereo", "8khz")} | {"flac": tmp_path / "flac.flac"}
    soundfile.write(paths["flac"], audio, SAMPLING_RATE, subtype="PCM_24")
    soundfile.write(paths["wav"], audio, SAMPLING_RATE, subtype="FLOAT")
    soundfile.write(paths["stereo"], np.stack([audio, audio], axis=1), SAMPLING_RATE, subtype="FLOAT")
    soundfile.write(paths["8khz"], soxr.resample(audio, SAMPLING_RATE, 8000), 8000, subtype="FLOAT")
    return paths


def by_hand(recognizer, audio: np.ndarray, **generate_kwargs) -> str:
    """What the pipeline should say, by its parts."""
    model, tokenizer = recognizer.model, recognizer.tokenizer
    inputs = recognizer.feature_extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    with torch.no_grad():
        if model.can_generate():
            return tokenizer.decode(model.generate(**inputs, **generate_kwargs)[0], skip_special_tokens=True)
        return tokenizer.decode_ctc(model(**inputs).logits.argmax(-1)[0])


def test_class_and_head_are_the_checkpoints(recognizer, ctc_recognizer):
    assert type(recognizer) is type(ctc_recognizer) is EchoAutomaticSpeechRecognitionPipeline
    assert (type(recognizer.model), recognizer.type) == (EchoForConditionalGeneration, "seq2seq")
    assert (type(ctc_recognizer.model), ctc_recognizer.type) == (EchoForCTC, "ctc")


def test_either_head_can_be_asked_of_a_checkpoint(checkpoint, recognizer):
    model = EchoForCTC.from_pretrained(checkpoint)
    ctc = pipeline(TASK, model=model, tokenizer=recognizer.tokenizer, feature_extractor=recognizer.feature_extractor)
    assert ctc.type == "ctc"
    assert ctc(voice(1.0))["text"] == by_hand(ctc, voice(1.0))


def test_array(either):
    texts = set()
    for f0 in (100, 150, 250):
        result = either(voice(1.0, f0))
        assert result == {"text": by_hand(either, voice(1.0, f0))}
        texts.add(result["text"])
    assert len(texts) > 1  # it hears


def test_files_and_bytes(either, files):
    expected = either(voice(1.0))
    assert either(str(files["wav"])) == expected
    assert either(files["wav"]) == expected  # a Path
    assert either(files["wav"].read_bytes()) == expected
    assert either(str(files["stereo"])) == expected
    assert either({"path": str(files["wav"]), "bytes": None}) == expected
    # 24 bits and the way through 8 kHz change the samples a little, and an untrained model may mind.
    audio, _ = soundfile.read(files["flac"], dtype="float32")
    assert either(str(files["flac"])) == either(audio)
    audio, _ = soundfile.read(files["8khz"], dtype="float32")
    assert either(str(files["8khz"])) == either(soxr.resample(audio, 8000, SAMPLING_RATE, quality="HQ"))


def test_url(recognizer, files, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=files["wav"].parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        assert recognizer(address + "wav.wav") == recognizer(voice(1.0))
        with pytest.raises(ValueError, match="missing.wav cannot be downloaded: .*404"):
            recognizer(address + "missing.wav")
        server.shutdown()
    with pytest.raises(ValueError, match="wav.wav cannot be downloaded"):
        recognizer(address + "wav.wav")


def test_dicts(either):
    audio = voice(1.0)
    expected = either(audio)
    given = {"raw": audio, "sampling_rate": SAMPLING_RATE}
    assert either(given) == expected
    assert set(given) == {"raw", "sampling_rate"}  # the caller's dict is left alone
    assert either({"array": torch.tensor(audio), "sampling_rate": SAMPLING_RATE, "path": "x.wav"}) == expected
    high = soxr.resample(audio, SAMPLING_RATE, 44100)
    low = soxr.resample(high, 44100, SAMPLING_RATE, quality="HQ")
    assert either({"raw": high, "sampling_rate": 44100}) == either(low)
    assert either({**given, "speaker": 7}) == {**expected, "speaker": [7]}
    with pytest.raises(ValueError, match="sampling_rate"):
        either({"raw": audio})


def test_no_key_of_the_callers_reaches_the_pipelines(either):
    audio = voice(1.0)
    expected = either(audio, return_timestamps=True)
    own = (
        "input_features",
        "attention_mask",
        "is_last",
        "tokens",
        "spans",
        "segment",
        "overlaps",
        "is_speech",
        "context",
    )
    row = {"array": audio, "sampling_rate": SAMPLING_RATE, **{key: "the caller's" for key in own}}
    row |= {"text": "the reference", "chunks": ["of another model"]}
    extra = {key: ["the caller's"] for key in own}
    assert either(row, return_timestamps=True) == {**expected, **extra}
    assert either(row) == {"text": expected["text"], **extra}
    # Rows of a batch may have different keys.
    batch = [row, {"array": audio, "sampling_rate": SAMPLING_RATE, "speaker": np.arange(3)}]
    first, second = either(batch, batch_size=2)
    assert first == {"text": expected["text"], **extra}
    assert second["text"] == expected["text"] and second["speaker"][0] is batch[1]["speaker"]


def test_several_recordings_of_any_container(either):
    recordings = [voice(0.5, 100), voice(0.5, 250)]
    expected = [either(recording) for recording in recordings]
    assert expected[0] != expected[1]
    rows = [
        {"audio": {"bytes": None, "path": None, "array": recording, "sampling_rate": SAMPLING_RATE}}
        for recording in recordings
    ]
    dataset = Dataset.from_list([{**row, "text": "its reference"} for row in rows])
    several = [tuple(recordings), np.stack(recordings), torch.tensor(np.stack(recordings)), dataset["audio"], dataset]
    for inputs in several:
        assert either(inputs) == expected
    lazy = [iter(recordings), map(np.asarray, recordings), dataset.to_iterable_dataset(), KeyDataset(dataset, "audio")]
    for inputs in lazy:
        results = either(inputs)
        assert not isinstance(results, list) and list(results) == expected
    for nothing in ([], (), dataset.select([])["audio"], np.zeros((0, 800), np.float32), iter([])):
        assert list(either(nothing)) == []


def test_an_input_of_no_known_kind_is_named(either):
    dataset = Dataset.from_dict({"speech": [[0.0]], "text": ["a"]})
    for inputs, message in [
        (dataset, r"columns speech, text.*dataset\[name\]"),
        (DatasetDict({"train": dataset, "test": dataset}), "splits train, test"),
        ({"audio": {"array": voice(0.5), "sampling_rate": SAMPLING_RATE}}, r"Pass row\['audio'\]"),
        (voice(0.5).tolist(), "Give samples as an array"),
        (np.zeros((8000, 2), np.float32), r"\(8000, 2\) looks like \(samples, channels\).*audio.mean\(axis=1\)"),
        (np.zeros((2, 2, 800), np.float32), "2, 2, 800"),
        (None, "must hold numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            either(inputs)


def test_nan_is_refused_where_it_arises(either):
    audio = voice(1.0)
    layer = either.model.get_submodule("model.encoder").layers[0].mlp
    name, weight = next(iter(layer.named_parameters()))
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(torch.nan)
        for options in ({}, {"return_timestamps": "word"}, {"batch_size": 2}):
            with pytest.raises(ValueError, match="The model predicts NaN"):
                either([audio, audio], **options)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_nan_features_are_refused(either, monkeypatch):
    features = either.feature_extractor(voice(1.0), sampling_rate=SAMPLING_RATE, return_tensors="pt")
    features["input_features"][0, 3, 5] = torch.nan
    monkeypatch.setattr(type(either.feature_extractor), "__call__", lambda *args, **kwargs: features)
    with pytest.raises(ValueError, match="input_features hold NaN"):
        either(voice(1.0))


@pytest.mark.parametrize("ctc_head", [True, False])
def test_threads_share_a_pipeline(ctc_head, checkpoint, recognizer):
    model = EchoForConditionalGeneration.from_pretrained(checkpoint, ctc_loss_weight=0.3 if ctc_head else 0.0)
    parts = {"tokenizer": recognizer.tokenizer, "feature_extractor": recognizer.feature_extractor}
    timed = pipeline(TASK, model=model, **parts)
    recordings = [voice(0.5, 100 + 20 * index) for index in range(8)]
    options = {"return_timestamps": "word", "generate_kwargs": {"max_new_tokens": 5}}
    expected = [timed(audio, **options) for audio in recordings]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # so that the threads meet
    try:
        with ThreadPoolExecutor(4) as threads:
            for _ in range(2):
                assert list(threads.map(lambda audio: timed(audio, **options), recordings)) == expected
    finally:
        sys.setswitchinterval(interval)
    assert model.config._attn_implementation == "sdpa"


def test_a_pipeline_is_pickled(recognizer):
    again = pickle.loads(pickle.dumps(recognizer))
    assert again(voice(1.0)) == recognizer(voice(1.0))


def test_batches_say_what_single_recordings_say(either):
    recordings = [voice(0.5, 100), voice(1.2, 150), voice(0.8, 250)]
    single = [either(audio) for audio in recordings]
    assert either(recordings, batch_size=2) == single
    assert list(either((audio for audio in recordings), batch_size=3)) == single


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["seq2seq", "ctc"])
def test_half_precision(dtype, head, checkpoint, ctc_checkpoint):
    recognizer = pipeline(TASK, model=str(checkpoint if head == "seq2seq" else ctc_checkpoint), dtype=dtype)
    assert recognizer.model.dtype == dtype
    assert recognizer(voice(1.0)) == {"text": by_hand(recognizer, voice(1.0))}
    assert recognizer(voice(1.0), return_timestamps="word")["text"] == by_hand(recognizer, voice(1.0))
    assert [set(result) for result in recognizer([voice(0.5), voice(1.0)], batch_size=2)] == [{"text"}, {"text"}]


def test_of_several_hypotheses_the_best_is_given(recognizer):
    recordings, beams = [voice(1.0, f0) for f0 in (100, 150, 250)], {"num_beams": 3}
    several = {"generate_kwargs": {**beams, "num_return_sequences": 3}, "batch_size": 3}
    expected = recognizer(recordings, generate_kwargs=beams)
    assert recognizer(recordings, **several) == expected and len({result["text"] for result in expected}) > 1
    assert recognizer(recordings, return_timestamps="word", **several) == recognizer(
        recordings, return_timestamps="word", generate_kwargs=beams
    )


def test_greedy_unless_told_otherwise(recognizer):
    for f0 in range(90, 400, 15):  # the first voice on which the two differ, or the test below shows nothing
        audio = voice(1.0, f0)
        greedy, beams = by_hand(recognizer, audio, num_beams=1), by_hand(recognizer, audio, num_beams=5)
        if greedy != beams:
            break
    assert greedy != beams
    assert recognizer(audio)["text"] == greedy
    assert recognizer(audio, generate_kwargs={"num_beams": 5})["text"] == beams
    assert len(recognizer(audio, generate_kwargs={"max_new_tokens": 3})["text"]) == 3
    recognizer.model.generation_config.num_beams = 5
    try:
        assert recognizer(audio)["text"] == beams
    finally:
        recognizer.model.generation_config.num_beams = 1


def test_bad_audio_is_named(either, tmp_path):
    for audio, message in [
        (np.zeros(0, np.float32), "empty"),
        (np.full(SAMPLING_RATE, np.nan, np.float32), "NaN"),
        (np.zeros(10, np.float32), "10 samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            either(audio)
    (tmp_path / "text.wav").write_text("not audio")
    with pytest.raises(ValueError, match="text.wav"):
        either(str(tmp_path / "text.wav"))
    with pytest.raises(FileNotFoundError, match="missing.wav"):
        either("missing.wav")


def check_chunks(result: dict, seconds: float, joint: str = ""):
    """The chunks are the text, and their times are in order and within the audio."""
    assert joint.join(chunk["text"] for chunk in result["chunks"]) == result["text"]
    times = [time for chunk in result["chunks"] for time in chunk["timestamp"]]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= seconds


def test_timestamps_are_taken_among_the_arguments_of_generate(recognizer):
    asked = recognizer(voice(1.0), generate_kwargs={"return_timestamps": "word", "max_new_tokens": 9})
    assert asked == recognizer(voice(1.0), return_timestamps="word", generate_kwargs={"max_new_tokens": 9})
    assert asked["chunks"]
    with pytest.raises(ValueError, match="return_timestamps='chars' is not known"):
        recognizer(voice(1.0), generate_kwargs={"return_timestamps": "chars"})


def test_timestamps_that_are_not_known(recognizer, ctc_recognizer, checkpoint):
    with pytest.raises(ValueError, match="return_timestamps='char'"):
        recognizer(voice(1.0), return_timestamps="char")
    with pytest.raises(ValueError, match="return_timestamps='sentence'.*'char'"):
        ctc_recognizer(voice(1.0), return_timestamps="sentence")
    with pytest.raises(ValueError, match="return_timestamps"):
        pipeline(TASK, model=str(checkpoint), return_timestamps="char")


@pytest.mark.parametrize("ctc_head", [True, False])
def test_timestamps_of_generated_text(ctc_head, checkpoint, recognizer):
    model = EchoForConditionalGeneration.from_pretrained(checkpoint, ctc_loss_weight=0.3 if ctc_head else 0.0)
    assert (model.ctc_head is not None) == ctc_head
    parts = {"tokenizer": recognizer.tokenizer, "feature_extractor": recognizer.feature_extractor}
    timed = pipeline(TASK, model=model, **parts)
    model.generation_config.suppress_tokens = [
        token for token in range(259) if timed.tokenizer.convert_ids_to_tokens(token) not in ("Ġ", *"abcdefghij")
    ]
    # A text of as many letters as can be told apart, and of more than 15 frames hold: then attention has to do. The
    # decoder alone writes so many.
    for seconds, ctc_weight in ((2.0, model.generation_config.ctc_weight), (0.6, 0.0)):
        model.generation_config.ctc_weight = ctc_weight
        audio = voice(seconds)
        plain = timed(audio)
        words = timed(audio, return_timestamps="word")
        assert words["text"].strip() == plain["text"].strip() and len(words["text"]) > 15
        check_chunks(words, seconds)
        assert [chunk["text"].split() for chunk in words["chunks"]] == [[word] for word in plain["text"].split()]
        assert timed(audio, return_timestamps=True) == {
            **plain,
            "chunks": [{"text": plain["text"], "timestamp": (0.0, seconds)}],
        }
        several = timed([audio, voice(0.9, 200), audio], return_timestamps="word", batch_size=2)
        assert several[0] == several[2] == words
        assistant = {"assistant_model": copy.deepcopy(model)}
        assert timed(audio, return_timestamps="word", generate_kwargs=assistant) == words
        beams = timed(audio, return_timestamps="word", generate_kwargs={"num_beams": 3})
        assert beams["text"].strip() == timed(audio, generate_kwargs={"num_beams": 3})["text"].strip()
    assert model.config._attn_implementation == "sdpa"


def test_words_are_where_ctc_heard_them(recognizer, monkeypatch):
    tokenizer = recognizer.tokenizer
    text = "low é"
    path = [0, 0, *tokenizer.encode("low", add_special_tokens=False), 0, 0, 0, 0]
    path += [*tokenizer.encode(" ", add_special_tokens=False), 0, *tokenizer.encode("é", add_special_tokens=False)]
    path += [0] * (50 - len(path))

    def certain(hidden_states):
        logits = torch.zeros(1, hidden_states.shape[1], recognizer.model.config.vocab_size)
        logits[0, torch.arange(50), torch.tensor(path)] = 20.0
        return logits

    ids = torch.tensor([tokenizer.encode(text)])
    monkeypatch.setattr(recognizer.model, "generate", lambda **kwargs: ids)
    monkeypatch.setattr(recognizer.model.ctc_head, "forward", certain)
    result = recognizer(voice(2.0), return_timestamps="word")
    assert result["text"] == text
    frames = [(chunk["text"], *np.round(np.divide(chunk["timestamp"], 0.04)).tolist()) for chunk in result["chunks"]]
    assert frames == [("low", 2, 5), (" é", 11, 13)]


def test_words_are_where_attention_was(recognizer, checkpoint, monkeypatch):
    model = EchoForConditionalGeneration.from_pretrained(checkpoint, ctc_loss_weight=0.0)
    tokenizer = recognizer.tokenizer
    timed = pipeline(TASK, model=model, tokenizer=tokenizer, feature_extractor=recognizer.feature_extractor)
    ids = tokenizer.encode("low é")  # of 6 tokens, and the end of sequence
    stretches = [(0, 3), (3, 8), (8, 12), (20, 21), (21, 30), (30, 41), (45, 50)]

    def attend(encoder_outputs, texts):
        (tokens,) = texts
        weights = np.zeros((1, len(tokens) + 1, 50))
        for row, (start, stop) in enumerate(stretches):
            weights[0, row, start:stop] = 1.0 / (stop - start)
        return weights

    monkeypatch.setattr(model, "generate", lambda **kwargs: torch.tensor([ids]))
    monkeypatch.setattr(timed, "_cross_attention", attend)
    result = timed(voice(2.0), return_timestamps="word")
    frames = [(chunk["text"], *np.round(np.divide(chunk["timestamp"], 0.04)).tolist()) for chunk in result["chunks"]]
    assert frames == [("low", 0, 12), (" é", 21, 41)]


def test_attention_is_that_of_generating(recognizer):
    features = recognizer.feature_extractor(voice(1.0), sampling_rate=SAMPLING_RATE, return_tensors="pt")
    model, options = recognizer.model, {"output_attentions": True, "return_dict_in_generate": True}
    model.set_attn_implementation("eager")
    generated = model.generate(**features, min_new_tokens=5, **options)
    model.set_attn_implementation("sdpa")
    tokens = generated["sequences"][0, 1:-1].tolist()
    # Beside another utterance, longer and with fewer tokens.
    both = [voice(1.0), voice(1.5, f0=200.0)]
    both = recognizer.feature_extractor(both, sampling_rate=SAMPLING_RATE, return_tensors="pt", padding=True)
    with torch.no_grad():
        encoder_outputs = model.get_encoder()(both["input_features"], attention_mask=both["attention_mask"])
        weights = recognizer._cross_attention(encoder_outputs, [tokens, tokens[:1]])
    assert weights.shape == (2, len(tokens) + 1, 38) and not weights[0, :, 25:].any()
    weights = weights[0, :, :25]
    steps = [torch.stack(step).mean(dim=(0, 2))[0, -1] for step in generated["cross_attentions"]]  # layers and heads
    np.testing.assert_allclose(weights, torch.stack(steps).numpy(), atol=1e-5)
    assert len(tokens) >= 4
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-5)
    assert recognizer.model.config._attn_implementation == "sdpa"


def test_ctc_timestamps(ctc_recognizer):
    result = ctc_recognizer(voice(2.0), return_timestamps="char")
    assert result["text"] == by_hand(ctc_recognizer, voice(2.0))
    check_chunks(result, 2.0)
    result = ctc_recognizer(voice(2.0), return_timestamps=True)
    assert result["chunks"] == [{"text": result["text"], "timestamp": (0.0, 2.0)}]


def test_ctc_timestamps_of_a_known_path(ctc_recognizer, monkeypatch):
    # One frame of 40 ms each, but two for "e"; between the words a space, a blank and a character of three bytes.
    o, e = (ctc_recognizer.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "oe")
    space = ctc_recognizer.tokenizer.encode(" ", add_special_tokens=False)[0]
    euro = ctc_recognizer.tokenizer.encode("€", add_special_tokens=False)
    path = [0, o, 0, e, e, space, 0, *euro, o]
    logits = torch.nn.functional.one_hot(torch.tensor([path + [0] * (25 - len(path))]), 259)
    monkeypatch.setattr(ctc_recognizer.model, "forward", lambda *args, **kwargs: CausalLMOutput(logits=logits))
    result = ctc_recognizer(voice(1.0), return_timestamps="word")
    assert result["text"] == "oe €o"
    words = [(chunk["text"], *np.round(np.divide(chunk["timestamp"], 0.04)).tolist()) for chunk in result["chunks"]]
    assert words == [("oe", 1, 5), ("€o", 7, 11)]


def test_a_stride_is_refused(either):
    with pytest.raises(ValueError, match="A stride is not usable.*Leave it out"):
        either({"raw": voice(1.0), "sampling_rate": SAMPLING_RATE, "stride": (0, 100)})


def test_last_chunk_may_be_a_few_samples(either):
    audio = np.append(voice(1.0), np.zeros(50, np.float32))
    result = either(audio, chunk_length_s=0.5, stride_length_s=0, ignore_warning=True)
    assert result == either(voice(1.0), chunk_length_s=0.5, stride_length_s=0, ignore_warning=True)
    assert either(audio, chunk_length_s=0.5, stride_length_s=0, ignore_warning=True, batch_size=2) == result


# Long recordings -----------------------------------------------------------------------------------------------------


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLING_RATE), np.float32)


def test_utterances_with_pauses_say_what_each_says_alone(either):
    # The quarter of a second that segments keep of a pause is in the utterances.
    utterances = [
        np.concatenate([silence(0.25), voice(seconds, f0), silence(0.25)])
        for seconds, f0 in ((1.0, 100), (0.7, 200), (1.3, 150), (0.5, 250))
    ]
    alone = [either(utterance)["text"].strip() for utterance in utterances]
    assert len(set(alone)) > 1 and all(alone)
    audio = np.concatenate([part for utterance in utterances for part in (silence(1.0), utterance)])
    assert either(audio, chunk_length_s=0)["text"] != " ".join(alone), "or the next line shows nothing"
    result = either(audio, chunk_length_s=2, return_timestamps=True)
    assert result["text"] == " ".join(alone)
    check_chunks(result, len(audio) / SAMPLING_RATE)
    start = 0.0
    for chunk, utterance in zip(result["chunks"], utterances, strict=True):
        assert chunk["timestamp"] == pytest.approx(
            (start + 1.0, start + 1.0 + len(utterance) / SAMPLING_RATE), abs=0.02
        )
        start += 1.0 + len(utterance) / SAMPLING_RATE
    assert either(audio, chunk_length_s=2, return_timestamps=True, batch_size=3) == result
    words = either(audio, chunk_length_s=2, return_timestamps="word", batch_size=2)
    assert words["text"] == result["text"]
    if either.type == "seq2seq":
        check_chunks(words, len(audio) / SAMPLING_RATE)


def test_several_long_recordings_at_once(either, tmp_path):
    first = np.concatenate([voice(1.0, 100), silence(2.0), voice(1.5, 200)])
    second = np.concatenate([silence(1.0), voice(4.0, 150)])
    soundfile.write(tmp_path / "first.wav", first, SAMPLING_RATE, subtype="FLOAT")
    recordings = [str(tmp_path / "first.wav"), second, {"raw": first, "sampling_rate": SAMPLING_RATE, "speaker": 7}]
    options = {"chunk_length_s": 2, "return_timestamps": True}
    single = [either(recording, **options) for recording in recordings]
    assert [len(result["chunks"]) for result in single] == [2, 3, 2]
    assert single[2] == {**single[0], "speaker": [7]}
    batch = either(recordings[:2], batch_size=4, **options)
    assert batch == single[:2]


NOTES = {"do": 110.0, "re": 147.0, "mi": 196.0, "fa": 262.0, "sol": 349.0}
NOTE_SECONDS, BREATH_SECONDS = 0.42, 0.1  # a breath is too short to be a pause


def sing(notes: list[str]) -> np.ndarray:
    times = np.arange(round(NOTE_SECONDS * SAMPLING_RATE)) / SAMPLING_RATE
    sung = [
        0.2 * sum(np.sin(2 * np.pi * k * NOTES[note] * times) / k for k in range(1, 6)).astype(np.float32)
        for note in notes
    ]
    return np.concatenate([part for note in sung for part in (note, silence(BREATH_SECONDS))])


@pytest.fixture
def solfege(either, monkeypatch):
    """A pipeline that names the notes it hears by their F0, and mishears those that are cut. Its `batches` are the
    shapes of what it was given."""
    either.batches = []
    tokenizer = either.tokenizer

    def listen(features, attention_mask):
        either.batches.append(tuple(features.shape))
        for row, mask in zip(features, attention_mask):
            f0 = row[: int(mask.sum()), -1].numpy()
            tokens, spans = [], []
            for start, stop in runs(f0 > 0):
                pitch = np.median(f0[start:stop])
                name = min(NOTES, key=lambda note: abs(np.log(NOTES[note] / pitch)))
                if stop - start < 38:
                    name = "hm"
                letters = tokenizer.encode(" " + name, add_special_tokens=False)
                edges = np.linspace(start / 4, -(-stop // 4), len(letters) + 1).round().astype(int).tolist()
                tokens += letters
                spans += zip(edges, edges[1:])
            yield tokens, spans

    def generate(features, attention_mask, with_times, generate_kwargs):
        for tokens, spans in listen(features, attention_mask):
            yield tokens, spans if with_times else None

    monkeypatch.setattr(either, "_generate", generate)
    monkeypatch.setattr(either, "_best_paths", lambda features, mask: listen(features, mask))
    yield either
    del either.batches


@pytest.mark.parametrize("kinds", [1, 2, 5])
def test_without_pauses_no_word_is_lost_or_doubled(kinds, solfege):
    generator = np.random.default_rng(kinds)
    notes = generator.choice(list(NOTES)[:kinds], 70).tolist()  # of one kind: "do do do do ..."
    audio = sing(notes)
    result = solfege(audio, chunk_length_s=8, return_timestamps="word", batch_size=2)
    assert result["text"] == " ".join(notes)
    check_chunks(result, len(audio) / SAMPLING_RATE, joint=" " if solfege.type == "ctc" else "")
    for index, chunk in enumerate(result["chunks"]):
        start = index * (NOTE_SECONDS + BREATH_SECONDS)
        assert chunk["timestamp"][1] == pytest.approx(start + NOTE_SECONDS, abs=0.1)
        assert start - 0.1 < chunk["timestamp"][0] < start + 0.5 * NOTE_SECONDS  # a CTC path has spaces of their own
    assert len(solfege.batches) > 2 and max(shape[0] for shape in solfege.batches) == 2
    assert max(shape[1] for shape in solfege.batches) <= 800, "never more frames than 8 s hold"
    segments = solfege(audio, chunk_length_s=8, return_timestamps=True)
    assert segments["text"] == solfege(audio, chunk_length_s=8)["text"] == " ".join(notes)
    check_chunks(segments, len(audio) / SAMPLING_RATE)
    if solfege.type == "ctc":
        check_chunks(solfege(audio, chunk_length_s=8, return_timestamps="char"), len(audio) / SAMPLING_RATE)


def test_twenty_seconds_are_the_limit_if_nothing_is_said(solfege):
    notes = ["do", "mi"] * 30
    assert solfege(sing(notes[:38]))["text"].split() == notes[:38]
    assert solfege.batches.pop()[1] > 1900
    assert solfege(sing(notes))["text"].split() == notes
    assert [frames <= 2000 for _, frames, _ in solfege.batches] == [True, True]


def test_silence_is_not_sent_to_the_model(either, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("There is nothing to recognise.")

    monkeypatch.setattr(either.model, "forward", never)
    hush = (1e-4 * np.random.default_rng(0).standard_normal(5 * SAMPLING_RATE)).astype(np.float32)  # -80 dB
    for audio in (silence(0.5), silence(600), hush):
        assert either(audio, return_timestamps=True) == {"text": "", "chunks": []}
        assert either(audio, chunk_length_s=0) == {"text": ""}
    assert either([silence(1), silence(30)], batch_size=2) == [{"text": ""}] * 2


def test_silence_among_speech_in_a_batch(either):
    recordings = [silence(1.0), voice(1.0), silence(40.0), voice(0.5)]
    expected = ["", either(voice(1.0))["text"], "", either(voice(0.5))["text"]]
    for batch_size in (1, 2, 4):
        assert [result["text"] for result in either(recordings, batch_size=batch_size)] == expected


def test_progress_is_told_in_seconds_of_audio(recognizer, files):
    told = []
    recognizer(np.concatenate([voice(1.0), silence(70.3)]), progress=told.append)
    assert sum(told) == pytest.approx(71.3) and len(told) > 1
    told.clear()
    recognizer(str(files["8khz"]), progress=told.append)
    assert sum(told) == pytest.approx(1.0)


def test_texts_that_are_cut_off_are_told_of(recognizer, monkeypatch):
    told = []
    monkeypatch.setattr(pipeline_echo.logger, "warning_once", told.append)
    recognizer(voice(1.0), generate_kwargs={"max_new_tokens": 3})
    assert len(told) == 1 and "chunk_length_s" in told[0]


@pytest.mark.slow
def test_the_bundled_recordings_in_one():
    # Each alone has the same silence around it, and whole frames: where either changes, this checkpoint hears other
    # words in these prompts.
    recognizer = pipeline(TASK, model=str(BUNDLED_CHECKPOINT))
    gap, spoken = silence(2.0), []
    for path in find_audio_files(BUNDLED_RECORDINGS):
        audio = np.concatenate([*read_blocks(path, SAMPLING_RATE)])
        spoken.append(np.pad(audio, (0, -len(audio) % recognizer.feature_extractor.hop_length)))
    alone = [recognizer(np.concatenate([gap, audio, gap]), chunk_length_s=5)["text"] for audio in spoken]
    audio = np.concatenate([gap, *(part for audio in spoken for part in (audio, gap))])
    result = recognizer(audio, return_timestamps="word", batch_size=2)
    assert result["text"] == " ".join(alone) and len(set(alone)) == 5
    check_chunks(result, len(audio) / SAMPLING_RATE)
    # Every word lies where its recording does.
    ends = np.cumsum([2.0 + len(part) / SAMPLING_RATE for part in spoken])
    owners = [int(np.searchsorted(ends, chunk["timestamp"][0])) for chunk in result["chunks"]]
    assert owners == [index for index, text in enumerate(alone) for _ in text.split()]


# Other models --------------------------------------------------------------------------------------------------------


def test_other_models_run_as_in_the_stock_pipeline(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "a": 2, "b": 3, "<unk>": 4}))
    config = Wav2Vec2Config(
        vocab_size=5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(20, 16),
        conv_kernel=(20, 16),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    torch.manual_seed(0)
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    stock = pipeline(TASK, model=str(tmp_path))
    assert type(stock) is AutomaticSpeechRecognitionPipeline
    assert type(stock.model) is Wav2Vec2ForCTC
    assert stock(voice(1.0), return_timestamps="char")["text"]


def test_other_models_keep_the_stock_defaults():
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    )
    parts = {"tokenizer": EchoTokenizer(), "feature_extractor": WhisperFeatureExtractor()}
    whisper = EchoAutomaticSpeechRecognitionPipeline(WhisperForConditionalGeneration(config), **parts)
    assert type(whisper) is AutomaticSpeechRecognitionPipeline
    assert whisper.type == "seq2seq_whisper"
    assert whisper._generation_defaults["num_beams"] == 5


# In a fresh interpreter, isolated from this environment's settings: what a checkpoint does for who only has it.
NOT_INSTALLED = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "echo_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""

REMOTE = """
import numpy as np
import transformers
from transformers import pipeline

folder, target, audio, head = sys.argv[1:]
audio = np.load(audio)
report = {}
try:
    pipeline("automatic-speech-recognition", model=folder, trust_remote_code=False)
    report["refused"] = ""
except ValueError as error:
    report["refused"] = str(error)
trust = {"trust_remote_code": True}
names = ["AutoConfig", "AutoModel", "AutoModelForCTC", "AutoModelForSpeechSeq2Seq", "AutoFeatureExtractor",
         "AutoTokenizer", "AutoProcessor"]
loaded = {name: getattr(transformers, name).from_pretrained(folder, **trust) for name in names}
report["classes"] = {name: type(value).__name__ for name, value in loaded.items()}
report["modules"] = sorted({type(value).__module__.partition(".")[0] for value in loaded.values()})
recognizer = pipeline("automatic-speech-recognition", model=folder, **trust)
report["pipeline"] = [type(recognizer).__name__, type(recognizer.model).__name__, recognizer.type]
report["text"] = recognizer(audio)["text"]
report["long"] = recognizer(audio, chunk_length_s=0.4, return_timestamps="word", batch_size=2)
# Saved again, it is as good.
loaded[head].save_pretrained(target)
loaded["AutoProcessor"].save_pretrained(target)
recognizer = pipeline("automatic-speech-recognition", model=target, **trust)
report["text again"] = recognizer(audio)["text"]
recognizer.save_pretrained(target + " third")
recognizer = pipeline("automatic-speech-recognition", model=target + " third", **trust)
report["text third"] = recognizer(audio)["text"]
# With a model already loaded.
parts = {"tokenizer": loaded["AutoTokenizer"], "feature_extractor": loaded["AutoFeatureExtractor"]}
recognizer = pipeline("automatic-speech-recognition", model=loaded[head], **parts)
report["text fourth"] = recognizer(audio)["text"]
report["echo_hf"] = any(name.partition(".")[0] == "echo_hf" for name in sys.modules)
print(json.dumps(report))
"""


def run_isolated(code: str, folder: Path, *arguments) -> dict:
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "home" / "hub"),
        "HF_MODULES_CACHE": str(folder / "home" / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def cached_from_hub(folder: Path, home: Path) -> str:
    """Puts a checkpoint where a download from the Hub would have put it; gives its name."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hub" / "models--someone--echo"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return "someone/echo"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "from_hub"),
    [("AutoModelForSpeechSeq2Seq", False), ("AutoModelForCTC", True)],  # test_hub.py has the other one by name
)
def test_checkpoint_runs_where_the_package_is_not_installed(
    head, from_hub, tmp_path, checkpoint, ctc_checkpoint, recognizer, ctc_recognizer
):
    native = recognizer if head == "AutoModelForSpeechSeq2Seq" else ctc_recognizer
    folder = checkpoint if head == "AutoModelForSpeechSeq2Seq" else ctc_checkpoint
    if from_hub:
        folder = cached_from_hub(folder, tmp_path / "home")
    np.save(tmp_path / "audio.npy", voice(1.0))
    report = run_isolated(
        NOT_INSTALLED + REMOTE, tmp_path, folder, tmp_path / "saved again", tmp_path / "audio.npy", head
    )
    assert not report["echo_hf"]
    assert "trust_remote_code" in report["refused"]
    assert report["modules"] == ["transformers_modules"]
    assert report["classes"] == {
        "AutoConfig": "EchoConfig",
        "AutoModel": "EchoModel",
        "AutoModelForCTC": "EchoForCTC",
        "AutoModelForSpeechSeq2Seq": "EchoForConditionalGeneration",
        "AutoFeatureExtractor": "EchoFeatureExtractor",
        "AutoTokenizer": "EchoTokenizer",
        "AutoProcessor": "EchoProcessor",
    }
    assert report["pipeline"] == [type(native).__name__, type(native.model).__name__, native.type]
    again = [report[f"text{time}"] for time in ("", " again", " third", " fourth")]
    assert again == [native(voice(1.0))["text"]] * 4
    long = native(voice(1.0), chunk_length_s=0.4, return_timestamps="word", batch_size=2)
    assert report["long"] == json.loads(json.dumps(long))
    # What was saved without the package is the same to who has it.
    assert pipeline(TASK, model=str(tmp_path / "saved again"))(voice(1.0))["text"] == report["text"]


# What the speech recognition example of Transformers does before it trains.
PREPARE = """
import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor

folder = sys.argv[1]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, config=config, **trust)
rows = [{"audio": np.sin(np.arange(4000) * (0.05 + 0.01 * index)), "text": "row " + str(index)} for index in range(4)]

def prepare(row):
    batch = processor(audio=np.asarray(row["audio"]), text=row["text"], sampling_rate=16000)
    assert batch["labels"][0] != config.decoder_start_token_id
    return {"input_features": batch["input_features"][0], "labels": batch["labels"]}

parts = [config, processor, processor.tokenizer, processor.feature_extractor, type(model), type(config), prepare]
fingerprints = [Hasher.hash(part) for part in parts]
prepared = []
for workers in (2, 1):
    dataset = Dataset.from_list(rows).map(prepare, num_proc=workers)
    features = [float(np.sum(rows)) for rows in dataset["input_features"]]
    prepared.append([dataset._fingerprint, features, dataset["labels"][:]])
print(json.dumps([fingerprints, prepared]))
"""


@pytest.mark.slow
def test_remote_code_prepares_data_in_workers_and_is_the_same_to_the_cache_in_each_run(tmp_path, checkpoint):
    first, second = (run_isolated(NOT_INSTALLED + PREPARE, tmp_path, checkpoint) for _ in range(2))
    assert first == second
    by_two_workers, by_one = first[1]
    assert by_two_workers[1:] == by_one[1:]


@pytest.mark.slow
def test_trusting_the_checkpoints_code_does_no_harm_where_the_package_is_installed(tmp_path, checkpoint, recognizer):
    np.save(tmp_path / "audio.npy", voice(1.0))
    code = """
import json, sys
sys.path.insert(0, sys.argv[3])
import echo_hf
import numpy as np
from transformers import pipeline
recognizer = pipeline("automatic-speech-recognition", model=sys.argv[1], trust_remote_code=True)
print(json.dumps([type(recognizer.model).__module__, recognizer(np.load(sys.argv[2]))["text"]]))
"""
    source = Path(sys.modules["echo_hf"].__file__).parents[1]
    report = run_isolated(code, tmp_path, checkpoint, tmp_path / "audio.npy", source)
    assert report == ["echo_hf.modeling_echo", recognizer(voice(1.0))["text"]]

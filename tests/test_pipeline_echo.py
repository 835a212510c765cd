"""`pipeline("automatic-speech-recognition", model=folder)`, with the package and with the checkpoint's own code."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import soundfile
import soxr
import torch
from transformers import AutomaticSpeechRecognitionPipeline
from transformers import Wav2Vec2Config
from transformers import Wav2Vec2CTCTokenizer
from transformers import Wav2Vec2FeatureExtractor
from transformers import Wav2Vec2ForCTC
from transformers import WhisperConfig
from transformers import WhisperFeatureExtractor
from transformers import WhisperForConditionalGeneration
from transformers import pipeline

from conftest import SAMPLING_RATE
from conftest import voice
from echo_hf import EchoAutomaticSpeechRecognitionPipeline
from echo_hf import EchoForConditionalGeneration
from echo_hf import EchoForCTC
from echo_hf import EchoTokenizer

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
    inputs = recognizer.feature_extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt").to(model.dtype)
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
        with pytest.raises(Exception, match="404"):
            recognizer(address + "missing.wav")
        server.shutdown()


def test_dicts(either):
    audio = voice(1.0)
    expected = either(audio)
    given = {"raw": audio, "sampling_rate": SAMPLING_RATE}
    assert either(given) == expected
    assert set(given) == {"raw", "sampling_rate"}  # the caller's dict is left alone
    assert either({"array": torch.tensor(audio), "sampling_rate": SAMPLING_RATE, "path": "x.wav"}) == expected
    assert either({"raw": np.stack([audio, audio]), "sampling_rate": SAMPLING_RATE}) == expected
    high = soxr.resample(audio, SAMPLING_RATE, 44100)
    low = soxr.resample(high, 44100, SAMPLING_RATE, quality="HQ")
    assert either({"raw": high, "sampling_rate": 44100}) == either(low)
    assert either({**given, "speaker": 7}) == {**expected, "speaker": [7]}
    with pytest.raises(ValueError, match="sampling_rate"):
        either({"raw": audio})


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
    assert [set(result) for result in recognizer([voice(0.5), voice(1.0)], batch_size=2)] == [{"text"}, {"text"}]


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


def test_timestamps_need_ctc(recognizer, checkpoint):
    with pytest.raises(ValueError, match="return_timestamps"):
        recognizer(voice(1.0), return_timestamps=True)
    with pytest.raises(ValueError, match="return_timestamps"):
        pipeline(TASK, model=str(checkpoint), return_timestamps="word")


def test_ctc_timestamps(ctc_recognizer):
    result = ctc_recognizer(voice(2.0), return_timestamps="char")
    assert "".join(chunk["text"] for chunk in result["chunks"]) == result["text"] == by_hand(ctc_recognizer, voice(2.0))
    times = [time for chunk in result["chunks"] for time in chunk["timestamp"]]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 2.0
    with pytest.raises(ValueError, match="word"):
        ctc_recognizer(voice(2.0), return_timestamps=True)


def test_ctc_timestamps_of_a_known_path(ctc_recognizer):
    # One frame of 40 ms each, but two for "e"; between the words a space, a blank and a character of three bytes.
    o, e = (ctc_recognizer.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "oe")
    space = ctc_recognizer.tokenizer.encode(" ", add_special_tokens=False)[0]
    euro = ctc_recognizer.tokenizer.encode("€", add_special_tokens=False)
    path = [0, o, 0, e, e, space, 0, *euro, o]
    outputs = [{"tokens": torch.tensor([path[:6]]), "is_last": False}, {"tokens": torch.tensor([path[6:]])}]
    result = ctc_recognizer.postprocess(outputs, return_timestamps="word")
    assert result["text"] == "oe €o"
    words = [(chunk["text"], *np.round(np.divide(chunk["timestamp"], 0.04)).tolist()) for chunk in result["chunks"]]
    assert words == [("oe", 1, 5), ("€o", 7, 11)]


def test_chunks_of_ctc_join_to_the_whole(ctc_recognizer):
    # The chunks' frames that are kept are as many as the whole recording's, so times stay true.
    audio = voice(3.01)
    chunked = ctc_recognizer(audio, chunk_length_s=1.0, return_timestamps="char")
    assert chunked["text"] == "".join(chunk["text"] for chunk in chunked["chunks"])
    assert 2.0 < chunked["chunks"][-1]["timestamp"][1] <= 3.04
    assert ctc_recognizer(audio, chunk_length_s=1.0, return_timestamps="char", batch_size=3) == chunked
    path = {"raw": audio, "sampling_rate": SAMPLING_RATE, "stride": (0, SAMPLING_RATE)}
    assert ctc_recognizer(path, return_timestamps="char")["chunks"][-1]["timestamp"][1] <= 2.04


def test_last_chunk_may_be_a_few_samples(either):
    audio = np.append(voice(1.0), np.zeros(50, np.float32))
    result = either(audio, chunk_length_s=0.5, stride_length_s=0, ignore_warning=True)
    assert result == either(voice(1.0), chunk_length_s=0.5, stride_length_s=0, ignore_warning=True)
    assert either(audio, chunk_length_s=0.5, stride_length_s=0, ignore_warning=True, batch_size=2) == result


def test_any_sampling_rate_of_a_stride(ctc_recognizer):
    audio = voice(2.0)
    given = {"raw": soxr.resample(audio, SAMPLING_RATE, 8000), "sampling_rate": 8000, "stride": (0, 8000)}
    assert ctc_recognizer(given, return_timestamps="char")["chunks"][-1]["timestamp"][1] <= 1.0


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
    ours = pipeline(TASK, model=str(tmp_path))
    assert type(ours) is EchoAutomaticSpeechRecognitionPipeline
    assert type(ours.model) is Wav2Vec2ForCTC
    stock = AutomaticSpeechRecognitionPipeline(
        ours.model, tokenizer=ours.tokenizer, feature_extractor=ours.feature_extractor
    )
    audio = voice(1.0)
    assert ours(audio, return_timestamps="char") == stock(audio, return_timestamps="char")


def test_other_models_keep_the_stock_defaults():
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    )
    parts = {"tokenizer": EchoTokenizer(), "feature_extractor": WhisperFeatureExtractor()}
    whisper = EchoAutomaticSpeechRecognitionPipeline(WhisperForConditionalGeneration(config), **parts)
    assert whisper.type == "seq2seq_whisper"
    assert whisper._generation_defaults["num_beams"] == 5


# In a fresh interpreter, isolated from this environment's settings: what a checkpoint does for who only has it.
REMOTE = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "echo_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())

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
# Saved again, it is as good.
loaded[head].save_pretrained(target)
loaded["AutoProcessor"].save_pretrained(target)
recognizer = pipeline("automatic-speech-recognition", model=target, **trust)
report["text again"] = recognizer(audio)["text"]
recognizer.save_pretrained(target + " third")
recognizer = pipeline("automatic-speech-recognition", model=target + " third", **trust)
report["text third"] = recognizer(audio)["text"]
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
@pytest.mark.parametrize("from_hub", [False, True])
@pytest.mark.parametrize("head", ["AutoModelForSpeechSeq2Seq", "AutoModelForCTC"])
def test_checkpoint_runs_where_the_package_is_not_installed(
    head, from_hub, tmp_path, checkpoint, ctc_checkpoint, recognizer, ctc_recognizer
):
    native = recognizer if head == "AutoModelForSpeechSeq2Seq" else ctc_recognizer
    folder = checkpoint if head == "AutoModelForSpeechSeq2Seq" else ctc_checkpoint
    if from_hub:
        folder = cached_from_hub(folder, tmp_path / "home")
    np.save(tmp_path / "audio.npy", voice(1.0))
    report = run_isolated(REMOTE, tmp_path, folder, tmp_path / "saved again", tmp_path / "audio.npy", head)
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
    assert report["text"] == report["text again"] == report["text third"] == native(voice(1.0))["text"]
    # What was saved without the package is the same to who has it.
    assert pipeline(TASK, model=str(tmp_path / "saved again"))(voice(1.0))["text"] == report["text"]


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

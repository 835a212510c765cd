"""Models are pushed to a Hub and loaded from it by name, by the real client; connections fail and nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import echo_hf
from conftest import voice
from echo_hf import add_pitch
from echo_hf.training.model_card import write_model_card
from hub_server import PICKLES, Hub, metadata_of
from tiny_whisper import make_processor, make_whisper

TOKEN, RATE = "hf_of_someone", 16000

# What its author does, who has the package.
AUTHOR = """
import json, sys
import torch
from huggingface_hub import HfApi
from echo_hf import EchoForConditionalGeneration, EchoProcessor
from echo_hf.inference import load_checkpoint

folder, home = sys.argv[1:]
model, processor = EchoForConditionalGeneration.from_pretrained(folder), EchoProcessor.from_pretrained(folder)
report = {}

def weights():
    return float(sum(values.double().abs().sum() for values in model.state_dict().values()))

def change():
    with torch.no_grad():
        model.model.encoder.layers[0].self_attn.q_proj.weight.add_(0.05)

def fail(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]

model.push_to_hub("someone/echo")
report["first"] = [processor.push_to_hub("someone/echo").oid, weights()]
change()
report["second"] = [model.push_to_hub("someone/echo", commit_message="Train on").oid, weights()]
report["unchanged"] = model.push_to_hub("someone/echo").oid
model.push_to_hub("someone/echo", revision="experiment", commit_message="No change, but a branch")
model.push_to_hub("someone/sharded", max_shard_size="1MB")
processor.push_to_hub("someone/sharded")

# The server drops the upload once (the client tries again by itself), and then the commit (which it does not).
processor.push_to_hub("someone/interrupted")
report["before"] = [model.push_to_hub("someone/interrupted").oid, weights()]
change()
report["dropped"] = fail(model.push_to_hub, "someone/interrupted")
report["again"] = [model.push_to_hub("someone/interrupted").oid, weights()]

# The same for a folder: that is how a finished run is pushed.
api = HfApi()
api.create_repo("someone/folder")
report["dropped folder"] = fail(api.upload_folder, repo_id="someone/folder", folder_path=folder)
report["folder"] = api.upload_folder(repo_id="someone/folder", folder_path=folder).oid

report["wrong token"] = fail(model.push_to_hub, "someone/echo", token="hf_wrong")
report["whoami"] = [api.whoami()["name"], fail(api.whoami, token="hf_wrong")]
report["not mine"] = fail(model.push_to_hub, "another/echo")
# By the package, which is stricter than the library.
model, _ = load_checkpoint("someone/sharded")
report["by name"] = weights()
api.create_repo("someone/pickled")
api.upload_file(path_or_fileobj=folder + "/config.json", path_in_repo="config.json", repo_id="someone/pickled")
api.upload_file(path_or_fileobj=b"pickle", path_in_repo="pytorch_model.bin", repo_id="someone/pickled")
report["pickled"] = fail(load_checkpoint, "someone/pickled")
report["nothing"] = fail(load_checkpoint, "someone/nothing")
report["no model"] = fail(EchoForConditionalGeneration.from_pretrained, "someone/nothing")
report["no revision"] = fail(EchoForConditionalGeneration.from_pretrained, "someone/echo", revision="v9")
print(json.dumps(report))
"""

# What others do, who have nothing but Transformers and an empty cache.
STRANGER = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "echo_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
import numpy as np
from transformers import AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

wanted, audio = json.loads(sys.argv[1]), np.load(sys.argv[2])
trust = {"trust_remote_code": True}
report = {}
try:
    AutoModel.from_pretrained("someone/echo", trust_remote_code=False)
except ValueError as error:
    report["refused"] = str(error)
report["model"] = type(AutoModel.from_pretrained("someone/echo", **trust)).__name__
for name, revision in wanted:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(name, revision=revision, **trust)
    weights = float(sum(values.double().abs().sum() for values in model.state_dict().values()))
    processor = AutoProcessor.from_pretrained(name, revision=revision, **trust)
    inputs = processor(audio=audio, sampling_rate=16000, return_tensors="pt")
    text = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0]
    report[f"{name} {revision}"] = [weights, text]
# The task is not named: it is in the metadata of the card, if the model has one of ours.
recognizer = pipeline(model="someone/trained", **trust)
report["pipeline"] = [type(recognizer).__name__, recognizer(audio)["text"]]
recognizer = pipeline("automatic-speech-recognition", model="someone/echo", revision=wanted[0][1], **trust)
report["pipeline at first"] = recognizer(audio)["text"]
report["echo_hf"] = any(name.partition(".")[0] == "echo_hf" for name in sys.modules)
print(json.dumps(report))
"""

TINY = "encoder_hidden_size=16,encoder_num_hidden_layers=1,decoder_hidden_size=16,encoder_num_attention_heads=2," + (
    "decoder_num_attention_heads=2,encoder_intermediate_size=16,decoder_intermediate_size=16,max_target_positions=12"
)


def run(hub: Hub, home: Path, *command, package: bool = True) -> subprocess.CompletedProcess:
    """Runs Python with a Hub of its own and an empty cache."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(echo_hf.__file__).parents[1]) if package else "",
    }
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, cwd=home.parent, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def hub():
    with Hub({TOKEN: "someone"}) as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, checkpoint, tmp_path_factory):
    """What the author saw."""
    hub.drop("PUT", "/storage/someone/interrupted/", skip=1)
    hub.drop("POST", "/someone/interrupted/commit/", skip=2)
    hub.drop("POST", "/someone/folder/commit/")
    home = tmp_path_factory.mktemp("author") / "home"
    done = run(hub, home, "-c", AUTHOR, checkpoint, home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not hub.faults
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(hub, tmp_path_factory):
    """Folder of a run that was pushed while it went on, and at its end."""
    folder = tmp_path_factory.mktemp("trainer")
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", voice(0.3 + 0.05 * number, (120, 240)[number % 2]), RATE)
    rows = [{"audio": f"{number}.wav", "text": ("low", "high")[number % 2]} for number in range(6)]
    (folder / "tones.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [
        "--train_data",
        "tones.jsonl",
        "--eval_data",
        "tones.jsonl",
        "--output_dir",
        "run",
        "--cache_dir",
        "cache",
    ]
    options += ["--config_overrides", TINY, "--feature_groups", '{"spectrogram": 20, "pitch": 1}', "--max_steps", "4"]
    options += ["--per_device_train_batch_size", "2", "--use_cpu", "--eval_strategy", "steps", "--eval_steps", "2"]
    options += ["--push_to_hub", "--hub_model_id", "someone/trained", "--hub_token", TOKEN, "--report_to", "none"]
    options += ["--card_license", "cc-by-4.0", "--card_language", "en", "ga", "--card_eval_name", "six tones"]
    done = run(hub, folder / "home", "-m", "echo_hf.cli", "train", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Pushed to {hub.url}/someone/trained" in done.stdout
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(hub, pushed, trained, tmp_path_factory):
    """What the stranger saw. One of the downloads breaks off, and is taken up where it ended."""
    home = tmp_path_factory.mktemp("stranger") / "home"
    np.save(home.parent / "audio.npy", voice(1.0))
    wanted = [["someone/echo", pushed["first"][0]], ["someone/echo", "main"], ["someone/echo", "experiment"]]
    wanted += [[f"someone/{name}", "main"] for name in ("sharded", "interrupted", "folder", "trained")]
    hub.drop("GET", "/storage/someone/echo/", after=100_000)
    done = run(hub, home, "-c", STRANGER, json.dumps(wanted), home.parent / "audio.npy", package=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not hub.faults
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_pushed_model_loads_by_name_where_the_package_is_not_installed(hub, pushed, loaded):
    assert not loaded["echo_hf"]
    assert "trust_remote_code" in loaded["refused"]
    assert loaded["model"] == "EchoModel"
    assert loaded["someone/echo main"][0] == pushed["second"][1]
    assert loaded["someone/echo main"] == loaded["someone/echo experiment"] == loaded["someone/sharded main"]
    assert loaded["someone/trained main"][1] == loaded["pipeline"][1]
    assert loaded["pipeline"][0] == "EchoAutomaticSpeechRecognitionPipeline"
    files = hub.repos["someone/echo"].files()
    for name in ("config.json", "generation_config.json", "model.safetensors", "modeling_echo.py", "pipeline_echo.py"):
        assert files[name]
    assert "processing_echo.py" in files and "tokenizer.json" in files and "README.md" in files


@pytest.mark.slow
def test_a_revision_has_the_weights_it_had(pushed, loaded):
    first, weights = pushed["first"]
    assert weights != pushed["second"][1]
    assert loaded[f"someone/echo {first}"][0] == weights
    assert loaded["pipeline at first"] == loaded[f"someone/echo {first}"][1]


@pytest.mark.slow
def test_pushing_the_same_again_makes_no_commit(pushed):
    assert pushed["unchanged"] == pushed["second"][0]


@pytest.mark.slow
def test_shards(hub, loaded):
    files = hub.repos["someone/sharded"].files()
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2 and "model.safetensors.index.json" in files
    assert set(json.loads(files["model.safetensors.index.json"])["weight_map"].values()) == set(shards)


@pytest.mark.slow
def test_an_interrupted_push_is_made_good_by_the_next(hub, pushed, loaded):
    """The Hub's state in between is the one before, what was uploaded already is not uploaded again."""
    assert pushed["dropped"][0] == "RemoteProtocolError"
    repo = hub.repos["someone/interrupted"]
    assert [commit.sha for commit in repo.history()][:2] == [pushed["again"][0], pushed["before"][0]]
    assert len(repo.history()) == 4  # with the processor's, and the first, empty one
    assert loaded["someone/interrupted main"][0] == pushed["again"][1] != pushed["before"][1]
    before, again = repo.files(pushed["before"][0]), repo.files(pushed["again"][0])
    assert before.keys() == again.keys()
    assert {name for name in before if before[name] != again[name]} == {"model.safetensors"}
    # Two models, one of them in two tries; the push after the lost commit found it there.
    assert hub.count("PUT", "/storage/someone/interrupted/") == 3
    assert hub.count("POST", "/someone/interrupted/commit/") == 4


@pytest.mark.slow
def test_an_interrupted_upload_of_a_folder_is_made_good_by_the_next(hub, pushed, loaded, checkpoint):
    assert pushed["dropped folder"][0] == "RemoteProtocolError"
    repo = hub.repos["someone/folder"]
    assert [commit.sha for commit in repo.history()][:1] == [pushed["folder"]] and len(repo.history()) == 2
    local = {path.name: path.read_bytes() for path in Path(checkpoint).iterdir() if path.is_file()}
    assert {name: content for name, content in repo.files().items() if name in local} == local
    assert hub.count("PUT", "/storage/someone/folder/") == 1


@pytest.mark.slow
def test_who_may_not_push_is_told_why(pushed):
    kind, message = pushed["wrong token"]
    assert kind == "HfHubHTTPError" and "401" in message and "Invalid credentials in Authorization header" in message
    assert pushed["whoami"][0] == "someone" and "Invalid user token" in pushed["whoami"][1][1]
    kind, message = pushed["not mine"]
    assert kind == "HfHubHTTPError" and "403 Forbidden" in message and "another/echo" in message


def test_a_wrong_token_ends_a_run_before_it_trains(tmp_path, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import close_session

    from echo_hf.training import DataArguments, train
    from tiny_training import model_arguments, trainer_arguments

    soundfile.write(tmp_path / "one.wav", voice(0.4), RATE)
    (tmp_path / "one.txt").write_text("one")
    data = DataArguments(train_data=[str(tmp_path)], cache_dir=str(tmp_path / "cache"))
    with Hub({TOKEN: "someone"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        close_session()
        arguments = trainer_arguments(tmp_path / "run", push_to_hub=True, hub_token="hf_wrong")
        with pytest.raises(HfHubHTTPError, match="(?s)401.*Invalid credentials"):
            train(model_arguments(), data, arguments)
        assert not server.repos
    close_session()
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.slow
def test_what_is_not_there_is_named(pushed):
    assert pushed["no model"][0] == "OSError" and "someone/nothing" in pushed["no model"][1]
    assert pushed["no revision"][0] == "OSError" and "v9" in pushed["no revision"][1]


@pytest.mark.slow
def test_the_package_loads_by_name_and_no_pickle(hub, pushed):
    assert pushed["by name"] == pushed["second"][1]
    kind, message = pushed["pickled"]
    assert kind == "CheckpointError" and "someone/pickled" in message and "pytorch_model.bin only, a pickle" in message
    assert hub.count("GET", "/storage/someone/pickled/") == 0
    assert pushed["nothing"][0] == "CheckpointError" and "someone/nothing" in pushed["nothing"][1]


@pytest.mark.slow
def test_a_run_pushes_its_card_and_its_weights(hub, trained):
    repo = hub.repos["someone/trained"]
    files = repo.files()
    for name in ("model.safetensors", "config.json", "README.md", "run_summary.json", "pipeline_echo.py"):
        assert files[name] == (trained / name).read_bytes()
    summary = json.loads(files["run_summary.json"])
    assert 'model="someone/trained", trust_remote_code=True' in files["README.md"].decode()
    card = metadata_of(files["README.md"].decode())
    assert (card["license"], card["language"]) == ("cc-by-4.0", ["en", "ga"])
    assert card["pipeline_tag"] == "automatic-speech-recognition"
    result = card["model-index"][0]["results"][0]
    assert result["dataset"]["name"] == "six tones"
    assert result["metrics"][0]["value"] == round(100 * summary["metrics"]["wer"], 2)
    # Pushed after two steps, too, as it was then.
    titles = [commit.title for commit in repo.history()]
    assert titles[0] == "End of training" and "Training in progress, step 2" in titles


@pytest.mark.slow
def test_neither_pickles_nor_tokens_are_pushed(hub, pushed, trained):
    for repo in hub.repos.values():
        for commit in repo.history():
            if repo is not hub.repos["someone/pickled"]:
                assert not [path for path in commit.files if path.endswith(PICKLES)]
            assert not [path for path, blob in commit.files.items() if TOKEN.encode() in blob.content]
            assert not [path for path in commit.files if path.startswith("checkpoint-")]
    assert not [path for path in trained.iterdir() if path.suffix in PICKLES]
    # What only resuming needs is pickled by PyTorch, in the folders of the checkpoints.
    pickled = {path.name for path in trained.glob("checkpoint-*/*") if path.suffix in PICKLES}
    assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


WHISPER_STRANGER = (
    STRANGER[: STRANGER.index("import numpy as np")]
    + """
import numpy as np
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

trust, audio = {"trust_remote_code": True}, np.load(sys.argv[1])
recognizer = pipeline(model="someone/whisper", **trust)  # the task is in the card
processor = AutoProcessor.from_pretrained("someone/whisper", **trust)
inputs = processor(audio, sampling_rate=16000, return_tensors="pt")
tokens = AutoModelForSpeechSeq2Seq.from_pretrained("someone/whisper", **trust).generate(**inputs)
print(json.dumps([type(recognizer).__name__, recognizer(np.tile(audio, 3), return_timestamps=True), tokens.tolist()]))
"""
)


@pytest.mark.slow
def test_a_whisper_is_uploaded_by_command_and_loads_by_name(hub, tmp_path):
    folder, home = tmp_path / "model", tmp_path / "home"
    model, processor = add_pitch(make_whisper(), make_processor())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_model_card(folder)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"left out")
    command = ["-m", "huggingface_hub.cli.hf", "upload", "someone/whisper", folder, ".", "--exclude", "checkpoint-*"]
    done = run(hub, home, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    np.save(tmp_path / "audio.npy", voice(0.9))
    soundfile.write(tmp_path / "long.wav", voice(2.5), RATE)
    done = run(hub, home, "-c", WHISPER_STRANGER, tmp_path / "audio.npy", package=False)
    assert done.returncode == 0, done.stderr[-3000:]
    name, result, tokens = json.loads(done.stdout.splitlines()[-1])
    inputs = processor(voice(0.9), sampling_rate=RATE, return_tensors="pt")
    assert tokens == model.generate(**inputs).tolist()
    assert name == "EchoWhisperPipeline" and 1 < result["chunks"][-1]["timestamp"][1] <= 3
    options = ["--checkpoint", "someone/whisper", "--device", "cpu", "--format", "srt"]
    done = run(hub, home, "-m", "echo_hf.cli", "transcribe", tmp_path / "long.wav", *options)
    assert done.returncode == 0 and " --> " in done.stdout, done.stderr[-3000:]

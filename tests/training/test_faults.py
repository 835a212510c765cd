"""Training that is killed, or finds the disk full or a file damaged, loses nothing but the steps since it saved."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import soundfile

import echo_hf
from conftest import voice
from echo_hf import EchoFeatureExtractor, EchoProcessor, EchoTokenizer
from echo_hf.data import EchoDataCollator
from echo_hf.inference import load_checkpoint
from echo_hf.training import DataArguments, EchoTrainer, build_model_and_processor, find_last_checkpoint, train
from echo_hf.training import trainer as trainer_module
from tiny_training import model_arguments, trainer_arguments

# One interpreter, since imports take longer than the runs; each run is a child of it, with a fault of its own.
RUNS = """
import json, os, resource, shutil, signal, sys, traceback
from pathlib import Path

sys.path[:0] = json.loads(sys.argv[2])
import torch
import transformers
from transformers import TrainerCallback, trainer, trainer_callback, trainer_utils
from echo_hf.training import DataArguments, find_last_checkpoint, train
from tiny_training import model_arguments, trainer_arguments

torch.set_num_threads(1)
folder = Path(sys.argv[1])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def after(calls, function, fault):
    '''The function, but at its nth call the fault in its place.'''
    count = 0
    def call(*arguments, **options):
        nonlocal count
        count += 1
        return fault(*arguments, **options) if count == calls else function(*arguments, **options)
    return call

def half_of_the_weights(tensors, path, **options):
    Path(path).write_bytes(b"\\x10" * 500)
    die()

def patch_weights(calls):
    transformers.modeling_utils.safe_save_file = after(
        calls, transformers.modeling_utils.safe_save_file, half_of_the_weights
    )

def patch_torch_save(ending):
    save = torch.save
    def cut(value, path, *arguments, **options):
        save(value, path, *arguments, **options)
        if str(path).endswith(f"checkpoint-4/{ending}"):
            os.truncate(path, 100)
            die()
    torch.save = cut

def patch_state():
    save = trainer_callback.TrainerState.save_to_json
    def cut(self, path):
        save(self, path)
        if "checkpoint-4" in str(path):
            os.truncate(path, 100)
            die()
    trainer_callback.TrainerState.save_to_json = cut

def patch_rotation():
    def half(path, **options):
        next(Path(path).glob("*.safetensors")).unlink()
        die()
    trainer_utils.shutil.rmtree = half

class Step(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()

def limit(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def run(output_dir, resume=False, fault=lambda: None, callbacks=()):
    '''Trains in a process of its own; its exit status, and the error if there was one.'''
    error_file = output_dir.parent / f"{output_dir.name}.error"
    error_file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        status = 0
        try:
            fault()
            data = DataArguments(train_data=[str(folder / "tones.jsonl")], cache_dir=str(folder / "cache"))
            arguments = trainer_arguments(
                output_dir, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1, learning_rate=1e-2
            )
            train(model_arguments(preset="all", size="2m"), data, arguments, resume=resume, callbacks=list(callbacks))
        except Exception as error:
            error_file.write_text(f"{type(error).__name__}: {error}")
            status = 3
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), error_file.read_text() if error_file.is_file() else None

def weights(output_dir):
    return (output_dir / "model.safetensors").read_bytes()

report = {"straight": run(folder / "straight")}
expected = weights(folder / "straight")
size = len(expected)
faults = {
    "between saves": (None, [Step(3, die)]),
    "weights": (lambda: patch_weights(2), []),
    "optimizer": (lambda: patch_torch_save("optimizer.pt"), []),
    "rng": (lambda: patch_torch_save("rng_state.pth"), []),
    "state": (patch_state, []),
    "rotation": (patch_rotation, []),
    "final weights": (lambda: patch_weights(4), []),
    "disk full at the weights": (None, [Step(3, limit(size - 1000))]),
    "disk full at the optimizer": (None, [Step(3, limit(size + 10_000))]),
    "disk full at the end": (None, [Step(6, lambda: patch_full())]),
}

def patch_full():
    save = transformers.modeling_utils.safe_save_file
    def full(tensors, path, **options):
        if "checkpoint" not in str(path):
            limit(size // 2)()
        save(tensors, path, **options)
    transformers.modeling_utils.safe_save_file = full

for name in faults:
    fault, callbacks = faults[name]
    output_dir = folder / name.replace(" ", "_")
    killed = run(output_dir, False, fault or (lambda: None), callbacks)
    last = find_last_checkpoint(output_dir)
    left = sorted(path.name for path in output_dir.glob("checkpoint-*"))
    resumed = run(output_dir, True)
    equal = (output_dir / "model.safetensors").is_file() and weights(output_dir) == expected
    report[name] = [killed, last and last.name, left, resumed, equal]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", voice(0.3 + 0.05 * number, (120, 240)[number % 2]), 16000)
    rows = [{"audio": f"{number}.wav", "text": ("low", "high")[number % 2]} for number in range(6)]
    (folder / "tones.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def runs(tones):
    paths = json.dumps([str(Path(__file__).parents[1]), str(Path(echo_hf.__file__).parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(tones), paths], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.pop("straight") == [0, None]
    return report


KILLED = {
    "between saves": "checkpoint-2",
    "weights": "checkpoint-2",
    "optimizer": "checkpoint-2",
    "rng": "checkpoint-2",
    "state": "checkpoint-2",
    "rotation": "checkpoint-4",
    "final weights": "checkpoint-6",
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(moment, runs):
    """SIGKILL at each moment of a save, with half a file written; to the bit, with chance where it was."""
    (status, _), last, _, resumed, equal = runs[moment]
    assert status == -9
    assert last == KILLED[moment]
    assert resumed == [0, None]
    assert equal


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["at the weights", "at the optimizer", "at the end"])
def test_a_full_disk_is_named_and_the_checkpoint_before_is_whole(moment, runs):
    (status, error), last, left, resumed, equal = runs[f"disk full {moment}"]
    kept = "checkpoint-6" if moment == "at the end" else "checkpoint-2"
    assert status == 3 and error.startswith("OSError: ")
    assert "could not be saved: " in error and f"Make room, then use --resume; {kept} is whole." in error
    assert ("checkpoint-4 could not" in error) == (moment != "at the end")
    assert last == kept and left == [kept]
    assert resumed == [0, None] and equal


DAMAGES = {
    "model.safetensors": "model.safetensors is cut off or damaged",
    "optimizer.pt": "optimizer.pt is cut off or damaged",
    "rng_state.pth": "rng_state.pth is cut off or damaged",
    "tokenizer.json": "tokenizer.json is cut off or damaged",
}


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(tones, tmp_path):
    output_dir = tmp_path / "run"
    data = DataArguments(train_data=[str(tones / "tones.jsonl")], cache_dir=str(tones / "cache"))
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    train(model_arguments(), data, trainer_arguments(output_dir, **settings))
    expected = (output_dir / "model.safetensors").read_bytes()
    last = find_last_checkpoint(output_dir)
    before = {path.name: path.read_bytes() for path in (output_dir / "checkpoint-2").iterdir()}
    for name, message in DAMAGES.items():
        whole = (last / name).read_bytes()
        (last / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{message}.* delete {last} and resume again") as caught:
            train(model_arguments(), data, trainer_arguments(output_dir, **settings), resume=True)
        assert str(last / name) in str(caught.value)
        (last / name).write_bytes(whole)
    (last / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"has no optimizer.pt, .*--model_name_or_path"):
        train(model_arguments(), data, trainer_arguments(output_dir, **settings), resume=True)
    assert before == {path.name: path.read_bytes() for path in (output_dir / "checkpoint-2").iterdir()}
    # The remedy that the message gives.
    shutil.rmtree(last)
    summary = train(model_arguments(), data, trainer_arguments(output_dir, **settings), resume=True)
    assert summary["resumed_from"] == "checkpoint-2"
    assert (output_dir / "model.safetensors").read_bytes() == expected


def test_a_run_that_cannot_be_pushed_is_saved_and_says_how_to(tones, tmp_path, monkeypatch):
    def connection_lost(self, **options):
        raise RuntimeError("Server disconnected")

    monkeypatch.setattr(EchoTrainer, "init_hf_repo", lambda self: setattr(self, "hub_model_id", "someone/tones"))
    monkeypatch.setattr(EchoTrainer, "push_to_hub", connection_lost)
    data = DataArguments(train_data=[str(tones / "tones.jsonl")], cache_dir=str(tones / "cache"))
    arguments = trainer_arguments(tmp_path / "run", max_steps=1, push_to_hub=True)
    with pytest.raises(OSError, match="could not be pushed: Server disconnected") as caught:
        train(model_arguments(), data, arguments)
    assert f"hf upload someone/tones {tmp_path / 'run'} . --exclude 'checkpoint-*'" in str(caught.value)
    assert load_checkpoint(tmp_path / "run")
    assert (tmp_path / "run" / "README.md").is_file() and (tmp_path / "run" / "run_summary.json").is_file()


def test_a_push_that_fails_while_training_goes_on_is_a_warning(tones, tmp_path, monkeypatch):
    given, messages = [], []

    class Hub:
        def upload_folder(self, **options):
            given.append(options)
            failed = Future()
            failed.set_exception(RuntimeError("Server disconnected"))
            return failed

    monkeypatch.setattr(EchoTrainer, "init_hf_repo", lambda self: setattr(self, "hub_model_id", "someone/tones"))
    monkeypatch.setattr(EchoTrainer, "push_to_hub", lambda self: None)
    monkeypatch.setattr(trainer_module, "hf_api", Hub)
    monkeypatch.setattr(trainer_module.logger, "warning", messages.append)
    data = DataArguments(train_data=[str(tones / "tones.jsonl")], cache_dir=str(tones / "cache"))
    arguments = trainer_arguments(tmp_path / "run", push_to_hub=True, save_strategy="steps", save_steps=2)
    assert train(model_arguments(), data, arguments)["steps"] == 4
    assert [options["commit_message"][-6:] for options in given] == ["step 2", "step 4"]
    assert messages == ["The model could not be pushed while it trained: Server disconnected"] * 2
    # What lies in a checkpoint's folder and is left out: all that is pickled.
    patterns = given[0]["ignore_patterns"]
    kept = [
        path.name
        for path in (tmp_path / "run" / "checkpoint-2").iterdir()
        if not any(path.match(pattern) for pattern in patterns)
    ]
    assert "model.safetensors" in kept and {Path(name).suffix for name in kept} <= {".safetensors", ".json", ".py"}


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_pushing_the_optimizers_pickle_is_refused_early(strategy, tmp_path):
    arguments = trainer_arguments(tmp_path, push_to_hub=True, hub_strategy=strategy)
    with pytest.raises(ValueError, match=f"'{strategy}' pushes the state of the optimizer, which is a pickle"):
        train(model_arguments(), DataArguments(train_data=["nowhere"]), arguments)


def test_the_trainer_refuses_the_processor_of_another_model(tmp_path):
    model, processor = build_model_and_processor(model_arguments(), ["low"])
    more_tokens = EchoTokenizer().train_new_from_iterator(["aaaa bbbb cccc dddd"] * 9, 265)
    for name, wrong in (
        ("vocab_size", EchoProcessor(processor.feature_extractor, more_tokens)),
        ("feature_groups", EchoProcessor(EchoFeatureExtractor(), processor.tokenizer)),
    ):
        with pytest.raises(ValueError, match=f"{name}: the .* has .* the model"):
            EchoTrainer(model=model, args=trainer_arguments(tmp_path), processing_class=wrong)
        with pytest.raises(ValueError, match=f"{name}: the .* has .* the model"):
            EchoTrainer(model, trainer_arguments(tmp_path), None, None, None, wrong)
    collator = EchoDataCollator(processor)
    trainer = EchoTrainer(
        model=model, args=trainer_arguments(tmp_path), processing_class=processor, data_collator=collator
    )
    assert trainer.train_collator is collator

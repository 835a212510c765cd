"""Two processes train as one does with batches twice as large, and hear every utterance once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Seq2SeqTrainingArguments

from echo_hf.cli import main
from echo_hf.data import EchoDataCollator
from echo_hf.training import TRAINING_DEFAULTS, EchoTrainer, ModelArguments, build_model_and_processor

SOURCE = Path(__file__).parents[2] / "src"
FEATURES = '{"spectrogram": 20, "pitch": 1}'
TINY = "encoder_hidden_size=16,encoder_num_hidden_layers=1,decoder_hidden_size=16,encoder_num_attention_heads=2," + (
    "decoder_num_attention_heads=2,encoder_intermediate_size=16,decoder_intermediate_size=16,max_target_positions=12"
)


def write_tones(folder: Path, name: str, count: int) -> Path:
    """Tones of 0.3 s and longer, each with a text of its own length."""
    lines = []
    for number in range(count):
        times = np.arange(4800 + 800 * number) / 16000
        soundfile.write(folder / f"{name}{number}.wav", 0.3 * np.sin(2 * np.pi * (120 + 15 * number) * times), 16000)
        lines.append(json.dumps({"audio": f"{name}{number}.wav", "text": "ab cd ef gh"[: 2 + number]}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`echo-hf train` on 8 utterances, 4 a step by default, 5 to evaluate on; what is added to it wins."""
    folder = tmp_path_factory.mktemp("data")
    options = {
        "train_data": write_tones(folder, "train", 8),
        "eval_data": write_tones(folder, "eval", 5),
        "cache_dir": folder / "cache",
        "config_overrides": TINY,
        "feature_groups": FEATURES,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 5,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "logging_nan_inf_filter": "false",
        "report_to": "none",
        "disable_tqdm": "true",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
    }
    return ["train", "--use_cpu", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """Folder of the run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main([*command, "--output_dir", str(folder)]) == 0
    return folder


def launch(launcher: str, *arguments, program: tuple = ("-m", "echo_hf.cli")) -> subprocess.CompletedProcess:
    """`echo-hf` in two processes on this machine, which talk by gloo."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
    }[launcher]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(port), *map(str, program), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_the_order_of_an_epoch_hangs_on_nothing_but_seed_and_epoch(tmp_path):
    """What dropout drew before must not matter: it differs from process to process, and the order must not."""
    model, processor = build_model_and_processor(ModelArguments(config_overrides=TINY, feature_groups=FEATURES), ["a"])
    rows = {"input_features": [[[0.0] * 21]] * 12, "labels": [[5]] * 12, "length": list(range(12))}
    orders = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", **{**TRAINING_DEFAULTS, **settings}
        )
        trainer = EchoTrainer(
            model=model,
            args=arguments,
            data_collator=EchoDataCollator(processor),
            train_dataset=Dataset.from_dict(rows),
            processing_class=processor,
        )
        sampler = trainer._get_train_sampler()
        for epoch in (0, 1, 0):
            torch.rand(batch_size)
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
    first, second = orders[:2]
    assert orders == [first, second, first] * 2 and first != second
    for order in (first, second):
        assert sorted(order) == list(range(12))


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same_run(folder: Path, other: Path):
    assert len(losses(folder)) == len(losses(other)) == 5
    assert losses(folder)[0] > losses(folder)[-1]
    np.testing.assert_allclose(losses(folder), losses(other), rtol=2e-4)
    weights, others = (load_file(path / "model.safetensors") for path in (folder, other))
    assert weights.keys() == others.keys()
    for name, values in weights.items():
        torch.testing.assert_close(values, others[name], rtol=2e-3, atol=2e-3, msg=lambda text, name=name: name + text)
    metrics, other_metrics = (
        json.loads((path / "run_summary.json").read_text())["metrics"] for path in (folder, other)
    )
    for name in ("utterances", "reference_words", "word_errors", "reference_characters", "character_errors"):
        assert metrics[name] == other_metrics[name], name
    assert metrics["utterances"] == 5
    assert metrics["loss"] == pytest.approx(other_metrics["loss"], rel=0.05)


@pytest.mark.slow
def test_two_processes_train_resume_and_evaluate_as_one(command, alone, tmp_path):
    command = [*command, "--output_dir", tmp_path / "run", "--ddp_backend", "gloo", "--per_device_train_batch_size", 2]
    first = launch("torchrun", *command, "--max_steps", 3)
    assert first.stdout.count("Saved in") == 1, "one report, of the main process"
    # Three of the two steps of an epoch: within the second epoch.
    launch("accelerate", *command, "--resume")
    assert_same_run(tmp_path / "run", alone)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {path.name for path in alone.iterdir()}


# accelerate shards models on accelerators only; told that there are some, it does so here.
SHARDED_PROGRAM = """
import sys
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from echo_hf.cli import main

start = PartialState.__init__

def start_as_on_accelerators(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = start_as_on_accelerators
code = main()
assert not torch.distributed.is_initialized(), "threads of the process group are left for the interpreter's end"
sys.exit(code)
"""


@pytest.mark.slow
def test_a_sharded_model_trains_resumes_and_is_saved_as_one(command, alone, tmp_path):
    program, settings = tmp_path / "sharded.py", tmp_path / "fsdp.json"
    program.write_text(SHARDED_PROGRAM)
    settings.write_text(
        json.dumps({"version": 2, "transformer_layer_cls_to_wrap": ["EchoEncoderLayer", "EchoDecoderLayer"]})
    )
    command = [*command, "--output_dir", tmp_path / "run", "--ddp_backend", "gloo", "--per_device_train_batch_size", 2]
    command += ["--fsdp", "--fsdp_config", settings]
    launch("torchrun", *command, "--max_steps", 3, program=[program])
    assert (tmp_path / "run" / "checkpoint-3" / "pytorch_model_fsdp.bin").is_file()
    launch("torchrun", *command, "--resume", program=[program])
    assert_same_run(tmp_path / "run", alone)
    # The model's own code is beside the weights, and none of PyTorch's.
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "run", alone)]
    assert configs[0] == configs[1]

"""Runs on a stream go on where they were; caches are whole whoever else writes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import Seq2SeqTrainingArguments

from echo_hf.data import EchoDataCollator
from echo_hf.training import TRAINING_DEFAULTS, EchoTrainer, ModelArguments, build_model_and_processor

TEXTS = ["a", "b", "c", "d", "e", "f", "g", "h"]


@pytest.fixture
def manifest(tmp_path):
    """Eight tones of 0.2 to 0.55 s, and a letter for each."""
    lines = []
    for number, text in enumerate(TEXTS):
        times = np.arange(3200 + 800 * number) / 16000
        soundfile.write(tmp_path / f"{text}.wav", 0.3 * np.sin(2 * np.pi * (120 + 20 * number) * times), 16000)
        lines.append(json.dumps({"audio": str(tmp_path / f"{text}.wav"), "text": text}))
    path = tmp_path / "tones.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def model_and_processor():
    torch.manual_seed(0)
    names = ("hidden_size=16", "num_hidden_layers=1", "intermediate_size=16", "num_attention_heads=2")
    sides = [f"{side}_{name}" for side in ("encoder", "decoder") for name in names]
    arguments = ModelArguments(
        config_overrides=",".join([*sides, "max_target_positions=12"]), feature_groups='{"spectrogram": 20, "pitch": 1}'
    )
    return build_model_and_processor(arguments, TEXTS)


def texts_of(rows, processor) -> list[str]:
    return [processor.tokenizer.decode(row["labels"], skip_special_tokens=True) for row in rows]


def test_the_trainer_learns_from_a_stream_and_resumes_where_it_was(manifest, model_and_processor, tmp_path):
    model, processor = model_and_processor
    start = {name: values.clone() for name, values in model.state_dict().items()}
    table = datasets.load_dataset("json", data_files=str(manifest), split="train", streaming=True)
    ends, heard = [], []

    def prepare(row):
        features = processor.feature_extractor(row["audio"], resample=True)
        return {"input_features": features.input_features[0], "labels": processor.tokenizer(row["text"]).input_ids}

    def collate(rows):
        heard.extend(texts_of(rows, processor))
        return EchoDataCollator(processor)(rows)

    for folder, steps, resume in (("straight", 7, None), ("broken", 6, None), ("broken", 7, True)):
        heard.clear()
        model.load_state_dict(start)
        settings = {"max_steps": steps, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
        settings |= {"warmup_steps": 0, "save_strategy": "steps", "save_steps": 3, "report_to": "none"}
        trainer = EchoTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(
                output_dir=str(tmp_path / folder), use_cpu=True, disable_tqdm=True, **{**TRAINING_DEFAULTS, **settings}
            ),
            data_collator=collate,
            # Without an end: the Trainer cannot tell in which pass it was to resume in.
            train_dataset=table.map(prepare, remove_columns=["audio", "text"]).repeat(None),
            processing_class=processor,
        )
        trainer.train(resume_from_checkpoint=resume)
        if folder == "straight":
            assert heard[:14] == TEXTS + TEXTS[:6]
        ends.append({name: values.clone() for name, values in model.state_dict().items()})
    assert not all(torch.equal(start[name], values) for name, values in ends[0].items())
    for name, values in ends[0].items():
        torch.testing.assert_close(ends[2][name], values, msg=name)


PREPARE = """
import sys, time
from echo_hf import EchoFeatureExtractor, EchoProcessor, EchoTokenizer
from echo_hf.data import features, load_sources, prepare_dataset
extract = features._extract
def count(*args, **kwargs):
    print("computed", flush=True)
    time.sleep(1)  # the other process comes meanwhile
    return extract(*args, **kwargs)
features._extract = count
processor = EchoProcessor(EchoFeatureExtractor(), EchoTokenizer())
rows = prepare_dataset(load_sources(sys.argv[1]), processor, cache_dir=sys.argv[2]).dataset
print(len(rows), float(sum(row["input_features"].sum() for row in rows)))
"""


@pytest.mark.slow
def test_two_processes_share_a_cache(manifest, tmp_path):
    command = [sys.executable, "-c", PREPARE, str(manifest), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1] and outputs[0][-1].startswith("8 ")
    assert sum(output.count("computed") for output in outputs) == 1, "the second waits, and finds the first's"
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == [".arrow"]

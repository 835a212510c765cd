"""Fine-tuning as people do it with Whisper: stock Trainer, a collator written by hand, adapters. None of Echo's own
training code is used here, so that scripts made for other speech models run unchanged."""

import json
import logging
import re
import shutil
import warnings
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import echo_hf
from conftest import voice

TEXTS = ("low", "high")
TINY = {
    "encoder_hidden_size": 32,
    "encoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 2,
    "encoder_intermediate_size": 32,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "max_target_positions": 12,
    "feature_groups": {"spectrogram": 20, "pitch": 1},
}


class PaddingCollator:
    """Pads features and labels apart, -100 for what the loss shall not see, and drops a begin of sequence that stands
    before all labels: what tutorials for speech models tell people to write."""

    def __init__(self, processor, decoder_start_token_id):
        self.processor = processor
        self.decoder_start_token_id = decoder_start_token_id

    def __call__(self, rows):
        features = [{"input_features": row["input_features"]} for row in rows]
        batch = self.processor.feature_extractor.pad(features, return_tensors="pt")
        tokens = self.processor.tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"].ne(1), -100)
        if (labels[:, 0] == self.decoder_start_token_id).all():
            labels = labels[:, 1:]
        batch["labels"] = labels
        return batch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of an untrained checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    echo_hf.EchoForConditionalGeneration(echo_hf.EchoConfig.from_preset("all", **TINY)).save_pretrained(folder)
    extractor = echo_hf.EchoFeatureExtractor(feature_groups=TINY["feature_groups"])
    echo_hf.EchoProcessor(extractor, echo_hf.EchoTokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def speech(tiny):
    """Eight hums of 0.4 to 0.75 s that are called by their pitch, as features and labels."""
    processor = AutoProcessor.from_pretrained(tiny)
    rows = [
        {"audio": {"array": voice(0.4 + 0.05 * i, (120, 240)[i % 2]), "sampling_rate": 16000}, "sentence": TEXTS[i % 2]}
        for i in range(8)
    ]

    def prepare(row):
        audio = row["audio"]
        inputs = processor.feature_extractor(np.float32(audio["array"]), sampling_rate=audio["sampling_rate"])
        return {
            "input_features": inputs.input_features[0],
            "input_length": len(audio["array"]),
            "labels": processor.tokenizer(row["sentence"]).input_ids,
        }

    dataset = Dataset.from_list(rows)
    return dataset.map(prepare, remove_columns=dataset.column_names)


def make_trainer(folder, speech, output_dir, model=None, callbacks=None, **settings):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder) if model is None else model

    def compute_metrics(prediction):
        pad = processor.tokenizer.pad_token_id
        labels = np.where(prediction.label_ids == -100, pad, prediction.label_ids)
        expected = processor.batch_decode(labels, skip_special_tokens=True)
        assert set(expected) == set(TEXTS)
        return {"wer": jiwer.wer(expected, processor.batch_decode(prediction.predictions, skip_special_tokens=True))}

    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(output_dir=str(output_dir), **{**defaults, **settings}),
        train_dataset=speech,
        eval_dataset=speech,
        data_collator=PaddingCollator(processor, model.config.decoder_start_token_id),
        compute_metrics=compute_metrics,
        processing_class=processor.feature_extractor,
        callbacks=callbacks,
    )


class Collect(logging.Handler):
    """What is logged as a warning or worse."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


# Known, and the same with the library's own models with tied embeddings, and on any file system without fine times.
HARMLESS = ("There were missing keys in the checkpoint model loaded: ['proj_out.weight']", "mtime may not be reliable")


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_the_tutorial_for_speech_models_runs_unchanged(bf16, tiny, speech, tmp_path):
    collect = Collect()
    loggers = [logging.getLogger(name) for name in ("transformers", "echo_hf", "accelerate", "datasets", "torch")]
    for logger in loggers:
        logger.addHandler(collect)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = make_trainer(
                tiny,
                speech,
                tmp_path,
                max_steps=120,
                gradient_accumulation_steps=2,
                activation_checkpointing=True,
                bf16=bf16,
                train_sampling_strategy="group_by_length",
                length_column_name="input_length",
                eval_strategy="steps",
                eval_steps=10,
                save_strategy="steps",
                save_steps=10,
                save_total_limit=2,
                logging_steps=10,
                load_best_model_at_end=True,
                metric_for_best_model="wer",
                greater_is_better=False,
                predict_with_generate=True,
                generation_max_length=12,
                report_to="tensorboard",
                callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
            )
            trainer.train()
    finally:
        for logger in loggers:
            logger.removeHandler(collect)

    # It learns from the voice what to write, and stops two evaluations after nothing is left to be gained.
    state = trainer.state
    rates = {row["step"]: row["eval_wer"] for row in state.log_history if "eval_wer" in row}
    losses = [row["loss"] for row in state.log_history if "loss" in row]
    assert losses[-1] < 0.2 * losses[0]
    assert state.best_metric == 0.0 and rates[state.best_global_step] == 0.0
    assert state.global_step == state.best_global_step + 20 < 120

    # The weights at the end are the best checkpoint's, not the last one's.
    last = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / f"checkpoint-{state.global_step}").state_dict()
    best = AutoModelForSpeechSeq2Seq.from_pretrained(state.best_model_checkpoint).state_dict()
    kept = trainer.model.state_dict()
    assert all(torch.equal(kept[name], values) for name, values in best.items())
    assert not torch.equal(best["proj_out.weight"], last["proj_out.weight"])
    assert kept["proj_out.weight"].dtype == torch.float32  # bfloat16 is for computing, not for keeping
    assert list(tmp_path.glob("runs/*/events.out.tfevents*"))

    messages = collect.messages + [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
    assert [message for message in messages if not message.startswith(HARMLESS)] == []


def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, speech, tmp_path):
    """Both parts of the loss are divided by the tokens of all parts of a batch, as the Trainer counts them."""
    after = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tiny,
            speech,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            logging_steps=1,
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        change = {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}
        after.append((trainer.state.log_history[0]["loss"], change))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-4)
    assert any(change.abs().max() > 1e-2 for change in after[0][1].values())
    for name, change in after[0][1].items():
        torch.testing.assert_close(after[1][1][name], change, atol=1e-5, rtol=1e-3, msg=name)


# Adapters ------------------------------------------------------------------------------------------------------------


def make_adapter(folder, **settings):
    peft = pytest.importorskip("peft")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    if settings:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))


def make_batch(folder, speech):
    return PaddingCollator(AutoProcessor.from_pretrained(folder), 1)(list(speech))


def test_adapter_learns_and_is_saved_loaded_and_merged(tiny, speech, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = make_adapter(tiny), make_batch(tiny, speech)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    for part in ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"):
        assert any(part in name for name in trained)

    base = AutoModelForSpeechSeq2Seq.from_pretrained(tiny).eval()
    trainer = make_trainer(
        tiny,
        speech,
        tmp_path / "run",
        model=model,
        max_steps=20,
        logging_steps=5,
        predict_with_generate=True,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    assert "eval_wer" in trainer.evaluate()

    model.eval()
    with torch.no_grad():
        adapted, plain = model(**batch).logits, base(**batch).logits
        assert (adapted - plain).abs().max() > 0.1
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, plain)
        inputs = {name: batch[name] for name in ("input_features", "attention_mask")}
        tokens = model.generate(**inputs)
        assert tokens.shape[0] == 8

        model.save_pretrained(tmp_path / "adapter")
        assert {path.suffix for path in (tmp_path / "adapter").iterdir()} <= {".safetensors", ".json", ".md"}
        loaded = peft.PeftModel.from_pretrained(AutoModelForSpeechSeq2Seq.from_pretrained(tiny), tmp_path / "adapter")
        assert torch.equal(loaded.eval()(**batch).logits, adapted)
        assert torch.equal(loaded.generate(**inputs), tokens)

        merged = loaded.merge_and_unload()
        assert type(merged).__name__ == "EchoForConditionalGeneration"
        torch.testing.assert_close(merged(**batch).logits, adapted, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(again(**batch).logits, merged(**batch).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapter_gets_its_gradients_through_checkpointing(reentrant, tiny, speech):
    """No frozen stem and no frozen embedding keeps gradients from an adapter, in either kind of checkpointing."""
    batch = make_batch(tiny, speech)
    gradients = []
    for settings in ({}, {"use_reentrant": reentrant}):
        model = make_adapter(tiny, **settings).train()
        torch.manual_seed(0)
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradients[1][name] is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert all(gradient.any() for name, gradient in gradients[0].items() if "lora_B" in name)


# The page ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_and_adapters_of_the_page_run(tiny, tmp_path, monkeypatch):
    """As they are written there; test_export.py has what comes after, in its own words."""
    pytest.importorskip("peft")
    page = (Path(__file__).parents[2] / "docs" / "fine_tuning.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Trainer" in block]
    assert len(blocks) == 2

    shutil.copytree(tiny, tmp_path / "my-model")
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", voice(0.4 + 0.1 * i, (120, 240)[i % 2]), 16000)
    lines = [json.dumps({"audio": f"{i}.wav", "text": TEXTS[i % 2]}) for i in range(4)] * 8  # an epoch of two steps
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = {}
    for block in blocks:
        exec(block, names)  # the page is ours

    inputs = names["processor"]([str(tmp_path / "0.wav")], return_tensors="pt")
    before = AutoModelForSpeechSeq2Seq.from_pretrained("my-model").state_dict()
    for folder in ("my-finetuned", "my-merged"):
        model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
        name = "model.encoder.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(model.state_dict()[name], before[name])
        AutoProcessor.from_pretrained(folder).batch_decode(model.generate(**inputs))

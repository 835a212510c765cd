"""What is compared differs in the architecture alone: size, batches, loss and scoring are the same."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from echo_hf.data import load_sources
from echo_hf.data import prepare_dataset
from echo_hf.metrics import decode_ids
from echo_hf.metrics import score
from echo_hf.training import EchoTrainer
from echo_hf.training import ModelArguments

RECIPES = Path(__file__).parents[1] / "recipes"
spec = importlib.util.spec_from_file_location("peers", RECIPES / "peers.py")
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)

TEXTS = ["low", "high", "żółć"]
TINY = {
    "encoder_hidden_size": 48,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 48,
    "encoder_intermediate_size": 64,
    "decoder_intermediate_size": 64,
    "max_target_positions": 12,
}
SECONDS = 0.6


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Six tones of 0.3 to 0.55 s that are called by their pitch."""
    folder, lines = tmp_path_factory.mktemp("tones"), []
    for number in range(6):
        frequency, times = (120, 240)[number % 2], np.arange(4800 + 800 * number) / 16000
        soundfile.write(folder / f"{number}.wav", 0.3 * np.sin(2 * np.pi * frequency * times), 16000)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": TEXTS[number % 2]}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines))
    return path


def build_tiny(name):
    arguments = ModelArguments(size="2m", config_overrides=json.dumps(TINY))
    model, collator = peers.build(name, arguments, TEXTS, seed=1, max_seconds=SECONDS)
    return model.eval(), collator


@pytest.fixture(scope="module")
def tiny():
    return {name: build_tiny(name) for name in peers.MODELS}


@pytest.fixture(scope="module")
def dataset(tiny, manifest, tmp_path_factory):
    processor = tiny["Echo, all"][1].processor
    return prepare_dataset(load_sources(manifest), processor, cache_dir=tmp_path_factory.mktemp("cache")).dataset


def settings(folder, **changes):
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "max_seconds": SECONDS, "use_cpu": True, "seed": 1}
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(options | {"size": "2m", "config_overrides": TINY, "save_strategy": "no"} | changes))
    return recipe


@pytest.mark.parametrize("size", ["2m", "5m"])
def test_all_are_as_large_as_echo(size):
    arguments = ModelArguments(size=size)
    texts = ["".join(map(chr, range(0x4E00, 0x4E30)))]  # about 300 tokens
    counts = {name: peers.build(name, arguments, texts, 1, 4.0)[0].num_parameters() for name in peers.MODELS}
    assert all(abs(count / counts["Echo, all"] - 1) <= peers.TOLERANCE for count in counts.values()), counts
    assert all(abs(counts[name] / counts["Echo, all"] - 1) < 0.01 for name in peers.PEERS), counts


def test_embeddings_count_in_the_size():
    echo = build_tiny("Echo, all")[0].config
    many = type(echo)(**{**echo.to_dict(), "vocab_size": 2000})
    for name in peers.PEERS:
        few, more = (peers.peer_model(name, config, 400_000, 60) for config in (echo, many))
        assert few.num_parameters() == pytest.approx(more.num_parameters(), rel=peers.TOLERANCE)
        with pytest.raises(ValueError, match=f"{name} cannot have 900 parameters"):
            peers.peer_model(name, echo, 900, 60)
    with pytest.raises(ValueError, match="choose from Moonshine, Whisper"):
        peers.peer_model("Wav2Vec2", echo, 400_000, 60)


@pytest.mark.parametrize("name", peers.MODELS)
def test_labels_are_shifted_once(name, tiny, dataset):
    model, collator = tiny[name]
    batch = collator([dataset[0], dataset[1]])
    labels = batch.pop("labels")
    assert labels.tolist()[0][-2:] == [2, -100]  # "low" is shorter than "high" and ends once
    before = torch.cat([torch.ones(2, 1, dtype=torch.long), labels[:, :-1].clamp(min=0)], dim=1)
    with torch.no_grad():
        output = model(**batch, labels=labels)
        logits = model(**batch, decoder_input_ids=before).logits
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = output.ce_loss if getattr(model.config, "ctc_loss_weight", 0) else output.loss
    torch.testing.assert_close(loss, by_hand)


def test_echo_without_ctc_has_cross_entropy_alone(tiny):
    assert tiny["Echo, baseline, no CTC"][0].ctc_head is None
    assert tiny["Echo, baseline"][0].config.ctc_loss_weight > 0


def test_peers_hear_the_same_recordings(tiny, dataset, manifest):
    rows = [dataset[0], dataset[5]]
    echo, moonshine, whisper = (tiny[name][1](rows) for name in ("Echo, all", "Moonshine", "Whisper"))
    assert torch.equal(echo["labels"], moonshine["labels"]) and torch.equal(echo["labels"], whisper["labels"])
    frames = echo["input_features"].shape[1]
    assert whisper["input_features"].shape == (2, 80, 2 * tiny["Whisper"][0].config.max_source_positions)
    assert torch.equal(whisper["input_features"][..., :frames], echo["input_features"][..., :80].transpose(1, 2))
    assert not whisper["input_features"][..., frames:].any() and whisper["input_features"].shape[-1] > frames
    for row, number in enumerate((0, 5)):
        samples, _ = soundfile.read(manifest.parent / f"{number}.wav", dtype="float32")
        assert moonshine["attention_mask"][row].sum() == len(samples)
        np.testing.assert_allclose(moonshine["input_values"][row, : len(samples)], samples, atol=1e-6)
        assert not moonshine["input_values"][row, len(samples) :].any()


def test_batches_are_the_same(tiny, dataset, tmp_path):
    _, _, arguments = peers.read_recipe(settings(tmp_path), tmp_path, ["x"])
    seen = {
        name: [batch["labels"].tolist() for batch in trainer.get_train_dataloader()]
        for name, (model, collator) in tiny.items()
        for trainer in [peers.make_trainer(model, collator, dataset, arguments)]
    }
    assert len(seen["Whisper"]) == 3
    assert all(batches == seen["Whisper"] for batches in seen.values())


@pytest.mark.parametrize("name", ["Echo, baseline", "Moonshine", "Whisper"])
def test_scores_are_of_greedy_writing(name, tiny, dataset, tmp_path):
    model, collator = tiny[name]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)  # so that texts differ
    batch = collator([dataset[row] for row in range(len(dataset))])
    labels = batch.pop("labels")
    written = torch.ones(len(dataset), 1, dtype=torch.long)
    while written.shape[1] < TINY["max_target_positions"]:
        with torch.no_grad():
            best = model(**batch, decoder_input_ids=written).logits[:, -1].argmax(-1)
        best[(written == 2).any(-1)] = 0
        written = torch.cat([written, best[:, None]], dim=1)
    tokenizer = collator.processor.tokenizer
    expected = score(decode_ids(tokenizer, labels), decode_ids(tokenizer, written)).to_dict()

    _, _, arguments = peers.read_recipe(settings(tmp_path), tmp_path, ["x"])
    trainer = peers.make_trainer(model, collator, dataset, arguments)
    found = peers.error_rates(trainer, dataset, **({"ctc_weight": 0.0} if name in peers.ECHO else {}))
    assert {key: found[key] for key in expected} == expected and found["character_errors"] > 0


def test_what_is_there_is_scored_and_not_trained_again(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROUNDS", 1)
    common = {"recipe": settings(tmp_path), "train_data": [str(manifest)], "eval_data": [str(manifest)]}
    common |= {"models": ("Echo, baseline", "Whisper"), "cache_dir": str(tmp_path / "cache")}
    first = peers.compare(output_dir=tmp_path / "run", **common)
    monkeypatch.setattr(EchoTrainer, "train", lambda self: pytest.fail("trained again"))
    again = peers.compare(output_dir=tmp_path / "run", **common)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == again
    for name, result in first.items():
        errors = result["scores"][str(manifest)]["character_errors"]
        assert errors == again[name]["scores"][str(manifest)]["character_errors"]
        assert result["seconds"] > 0 and result["parameters"] == again[name]["parameters"]
    assert "joint_scores" in first["Echo, baseline"] and "joint_scores" not in first["Whisper"]
    assert [row["model"] for row in peers.table_rows(first)] == [
        "Echo, baseline",
        "Echo, baseline, joint decoding",
        "Whisper",
    ]


@pytest.mark.parametrize("option", ["voice_perturbation", "preset"])
def test_a_recipe_of_what_is_not_for_all_is_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"{option} cannot be applied to all"):
        peers.read_recipe(settings(tmp_path, **{option: 0.1}), tmp_path, ["x"])


def test_the_command_compares_what_it_is_told_and_prints_the_table(monkeypatch, capsys):
    seen = {}
    result = {"parameters": 2_000_000, "seconds": 0.5, "memory": None, "scores": {}}
    monkeypatch.setattr(peers, "compare", lambda **given: seen.update(given) or {"echo": result})
    options = ["--recipe", "peers.json", "--train_data", "a", "b", "--eval_data", "c", "--output_dir", "out"]
    peers.main(options)
    assert (seen["train_data"], seen["eval_data"], seen["test_data"]) == (["a", "b"], ["c"], [])
    assert "| 2.00 |" in capsys.readouterr().out

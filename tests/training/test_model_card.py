"""A card says what was measured, and that the rest was not; the Hub takes its metadata; nobody's words are lost."""

import json
import re
import shlex
import shutil

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session

from echo_hf import EchoConfig
from echo_hf.cli.train import _without_token
from echo_hf.training import DataArguments, EchoTrainer, train
from echo_hf.training.model_card import (
    COMMAND_FILE,
    MARK,
    CardArguments,
    active_mechanisms,
    build_model_card,
    name_mechanisms,
    write_model_card,
)
from hub_server import Hub
from tiny_training import model_arguments, trainer_arguments, write_six_tones


@pytest.fixture
def manifest(tmp_path):
    return write_six_tones(tmp_path)


METRICS = {
    "wer": 0.3204,
    "word_errors": 1602,
    "reference_words": 5000,
    "cer": 0.1,
    "character_errors": 2500,
    "reference_characters": 25000,
    "loss": 1.25,
}
SUMMARY = {
    "parameters": 2_200_000,
    "steps": 6110,
    "epochs": 13.0,
    "resumed_from": None,
    "base_model": None,
    "best_checkpoint": None,
    "seconds": 660.0,
    "train": {
        "sources": ["/home/jane/digits/train.jsonl", "jane/prompts"],
        "from_hub": ["jane/prompts"],
        "utterances": 3753,
        "hours": 1.2,
        "skipped": 4,
    },
    "eval": {"sources": ["/data/dev.jsonl"], "from_hub": [], "utterances": 500, "hours": 0.5, "skipped": 0},
    "train_loss": 0.5,
    "metrics": METRICS,
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}
GIVEN = CardArguments(
    card_license="cc-by-sa-4.0",
    card_language=["en", "ga"],
    card_eval_name="digits, test",
    card_tags=["digits"],
)


@pytest.fixture
def finished(checkpoint, tmp_path):
    """A run's folder with known numbers; called by keyword with what is different."""

    def make(command=("--seed", "1"), **changes):
        folder = tmp_path / "digits"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint, folder)
        (folder / "run_summary.json").write_text(json.dumps({**SUMMARY, **changes}))
        (folder / "training_args.json").write_text(json.dumps({"seed": 7, "learning_rate": 1e-3, "bf16": False}))
        (folder / COMMAND_FILE).write_text(json.dumps(list(command)))
        return folder

    return make


@pytest.fixture
def hub(monkeypatch):
    with Hub({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()  # the one there may be refuses, as the tests are offline
        yield server
    close_session()


def test_metadata_is_what_the_hub_asks_for_and_survives_a_round_trip(finished, tmp_path, hub):
    card = build_model_card(finished(), GIVEN)
    card.validate()
    card.save(tmp_path / "README.md")
    again = ModelCard.load(tmp_path / "README.md")
    again.validate()
    assert hub.count("POST", "/api/validate-yaml") == 2
    assert again.content == card.content
    data = again.data
    assert data.to_dict() == card.data.to_dict()
    assert (data.license, data.language, data.datasets) == ("cc-by-sa-4.0", ["en", "ga"], ["jane/prompts"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "automatic-speech-recognition")
    assert data.tags == ["echo", "speech", "pitch", "f0", "digits"] and data.metrics == ["wer", "cer"]
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"wer": 32.04, "cer": 10.0}
    assert results["wer"].dataset_name == "digits, test" and data.model_name == "digits"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (CardArguments(card_license="mine"), '"license" must be one of'),
        (CardArguments(card_language=["English"]), "codes of ISO 639, got 'English'"),
        (CardArguments(card_datasets=["two words"]), "must be names on the Hub, got 'two words'"),
    ],
)
def test_what_the_hub_refuses_is_found_by_validating(arguments, message, finished, hub):
    with pytest.raises(ValueError, match=message):
        build_model_card(finished(), arguments).validate()


def test_every_number_is_from_the_run(finished):
    text = build_model_card(finished(), GIVEN).text
    for piece in (
        "2.2M parameters",
        "3,753 utterances, 1.20 hours, from `train.jsonl`, `jane/prompts`. 4 more were left out.",
        "6,110 steps (13 epochs) in 11.0 minutes. Mean training loss 0.5000.",
        "Seed 7.",
        "| `learning_rate` | 0.001 |",
        "On digits, test (500 utterances, 0.50 hours)",
        "| Word error rate (%) | 32.04 | 1,602 in 5,000 words |",
        "| Character error rate (%) | 10.00 | 2,500 in 25,000 characters |",
        "Versions: torch 2.13.0, transformers 5.23.0.",
    ):
        assert piece in text
    assert "chose the best" not in text and "bf16" not in text
    assert "Tone error rate" not in text
    tones = {"tone_error_rate": 0.1, "tone_errors": 3, "reference_tones": 30}
    toned = build_model_card(finished(metrics=METRICS | tones))
    assert "| Tone error rate (%) | 10.00 | 3 in 30 tones |" in toned.text
    assert "jane/digits" not in text and "/data" not in text, "where files lie is nobody's business"
    elsewhere = {"sources": [r"C:\Users\jane\dev.jsonl"], "utterances": 1, "hours": 1.0, "skipped": 0}
    assert "Users" not in build_model_card(finished(eval=elsewhere)).text
    again = {"sources": ["/a/en/train.jsonl", "/a/fr/train.jsonl", "/a/en/train.jsonl"], "without_speech": 5}
    assert (
        "3,753 utterances an epoch, 1.20 hours, from `en/train.jsonl` (2 times), `fr/train.jsonl`."
        " 5 of them are clips without speech. 4 more were left out."
    ) in build_model_card(finished(train=SUMMARY["train"] | again)).text
    resumed = build_model_card(finished(resumed_from="checkpoint-9")).text
    assert "those since `checkpoint-9` in 11.0 minutes." in resumed and "loss" not in resumed
    assert "chose the best of the run's checkpoints" in build_model_card(finished(best_checkpoint="checkpoint-9")).text


def test_what_was_not_measured_is_said_and_no_number_is_given(finished):
    card = build_model_card(finished(metrics={}, eval=None))
    assert "No error rate was measured in this run" in card.text and "rate (%)" not in card.text
    assert card.data.eval_results is None and card.data.metrics is None
    assert "model-index" not in card.content and "model_name" not in card.content
    # Without generated text there is a loss, and no rate.
    card = build_model_card(finished(metrics={"loss": 1.25}))
    assert "No error rate was measured" in card.text and "loss on dev.jsonl is 1.2500" in card.text
    # A reference without words has no rate.
    assert build_model_card(finished(metrics={**METRICS, "wer": float("nan")})).data.metrics == ["cer"]
    folder = finished()
    for name in ("run_summary.json", "training_args.json", COMMAND_FILE):
        (folder / name).unlink()
    text = build_model_card(folder).text
    assert text.count("Not recorded.") == 2 and "No error rate was measured" in text
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json: it is not the folder of a trained model"):
        build_model_card(folder)


def test_the_command_can_be_pasted_and_holds_no_secret(finished, monkeypatch):

    monkeypatch.setenv("HOME", "/home/jane")
    command = ["--train_data", "/home/jane/my speech/a.jsonl", "--config_overrides", '{"dropout": 0.1}']
    text = build_model_card(finished(command)).text
    line = re.search("```bash\n(echo-hf .*)\n```", text)[1]
    assert "/home/jane" not in line
    words = [word.replace("~", "/home/jane") for word in shlex.split(line)]
    assert words == ["echo-hf", "train", *command]
    assert "--output_dir ~/run" in build_model_card(finished(["--output_dir=/home/jane/run"])).text
    given = ["--seed", "1", "--hub_token", "hf_secret", "--hub-token=hf_secret", "--push_to_hub"]
    assert _without_token(given) == ["--seed", "1", "--push_to_hub"]
    assert _without_token(["--hub_token=hf_secret", "--seed", "1"]) == ["--seed", "1"]


def test_a_card_written_by_hand_is_left_alone(finished):
    folder = finished()
    assert write_model_card(folder)
    assert write_model_card(folder, GIVEN) and "digits, test" in (folder / "README.md").read_text()
    (folder / "README.md").write_text(
        (folder / "README.md").read_text().replace(MARK, "").replace("# digits", "# Mine")
    )
    assert not write_model_card(folder)
    assert "# Mine" in (folder / "README.md").read_text()
    (folder / "README.md").write_bytes("# Écrit à la main".encode("latin-1"))
    assert not write_model_card(folder)


def test_a_run_leaves_its_card(manifest, tmp_path):  # noqa: F811
    data = DataArguments(train_data=[str(manifest)], eval_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    arguments = trainer_arguments(tmp_path / "run", max_steps=1, seed=11)
    summary = train(model_arguments(), data, arguments, card_arguments=CardArguments(card_license="mit"))
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "mit" and "Seed 11." in card.text
    assert card.data.eval_results[0].metric_value == round(100 * summary["metrics"]["wer"], 2)
    assert card.data.eval_results[0].dataset_name == "tones.jsonl"
    settings = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert settings["seed"] == 11 and not (tmp_path / "run" / "training_args.bin").exists()
    assert "| `max_steps` | 1 |" in card.text and "num_train_epochs" not in card.text


def test_the_trainer_takes_what_the_librarys_trainer_takes(finished):
    class Stub(EchoTrainer):
        def __init__(self, folder):
            self.args = trainer_arguments(folder)
            self.card_arguments = CardArguments(card_license="mit", card_language=["en"])
            self.hub_model_id = "jane/digits-small"

        def is_world_process_zero(self):
            return True

    folder = finished()
    Stub(folder).create_model_card(
        language="ga",
        tags="mine",
        model_name="Digits",
        finetuned_from="jane/echo",
        tasks="automatic-speech-recognition",
        dataset_tags="jane/digits",
        dataset="Digits of Jane",
    )
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", ["ga"], "jane/echo")
    assert card.data.datasets == ["jane/digits"] and "mine" in card.data.tags
    assert card.data.eval_results[0].dataset_name == "Digits of Jane" and card.text.lstrip().startswith(MARK)
    assert "# Digits\n" in card.text and 'model="jane/digits-small", trust_remote_code=True' in card.text


def test_all_mechanisms_that_are_on_are_named():
    assert active_mechanisms(EchoConfig.from_preset("baseline")) == {}
    assert name_mechanisms(EchoConfig.from_preset("baseline")) == "none"
    assert name_mechanisms(EchoConfig.from_preset("silence")) == "silence_scaling=True"
    everything = active_mechanisms(EchoConfig.from_preset("all"))
    assert {*EchoConfig.from_preset("all").pitch_mechanisms, "silence_scaling"} == set(everything)

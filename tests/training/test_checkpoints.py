"""The newest whole checkpoint is found, and the last ones are averaged, whatever interrupted the run."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from echo_hf import EchoForConditionalGeneration
from echo_hf.training import (
    DataArguments,
    RunArguments,
    build_model_and_processor,
    checkpoints,
    find_last_checkpoint,
    train,
)
from echo_hf.training.checkpoints import CheckpointAveraging
from tiny_training import Interrupt, model_arguments, trainer_arguments, write_six_tones


@pytest.fixture
def manifest(tmp_path):
    return write_six_tones(tmp_path)


def test_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert find_last_checkpoint(tmp_path / "nowhere") is None
    for step in (900, 1000, 1100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert find_last_checkpoint(tmp_path) is None
    for step in (900, 1000):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert find_last_checkpoint(tmp_path).name == "checkpoint-1000"


def test_weights_are_averaged_over_the_last_checkpoints_also_after_an_interruption(manifest, tmp_path):
    """Not those before, and what was saved before an interruption counts as what was saved after it."""
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    averaging = {"run_arguments": RunArguments(average_checkpoints=3)}
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 4}
    with pytest.raises(KeyboardInterrupt):
        train(
            model_arguments(),
            data,
            trainer_arguments(tmp_path / "run", **settings),
            callbacks=[Interrupt()],
            **averaging,
        )
    train(model_arguments(), data, trainer_arguments(tmp_path / "run", **settings), resume=True, **averaging)
    folders = [tmp_path / "run" / f"checkpoint-{step}" for step in (3, 4, 5)]
    weights = [EchoForConditionalGeneration.from_pretrained(folder).state_dict() for folder in folders]
    averaged = EchoForConditionalGeneration.from_pretrained(tmp_path / "run").state_dict()
    assert averaged.keys() == weights[0].keys()
    moved = 0
    for name, value in averaged.items():
        mean = (weights[0][name] + weights[1][name] + weights[2][name]) / 3
        torch.testing.assert_close(value, mean, msg=name)
        moved += not torch.equal(value, weights[2][name])
    assert moved > len(averaged) / 2


def test_too_few_checkpoints_to_average_leave_the_last_weights(manifest, tmp_path, monkeypatch):
    data = DataArguments(train_data=[str(manifest)], cache_dir=str(tmp_path / "cache"))
    averaging = {"run_arguments": RunArguments(average_checkpoints=3)}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    warnings = []
    monkeypatch.setattr(checkpoints.logger, "warning", warnings.append)
    train(model_arguments(), data, trainer_arguments(tmp_path / "run", **settings), **averaging)
    assert any("only 2 checkpoints were saved" in warning for warning in warnings)
    last = (tmp_path / "run" / "checkpoint-4" / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == last


def test_averaging_waits_for_the_process_that_writes_checkpoints(tmp_path):
    model, _ = build_model_and_processor(model_arguments(), ["low"])

    def write(step, value):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")

    @contextmanager
    def main_process_first(local, desc):
        assert not local
        write(3, 4.0)  # the last one, as seen by a process that did wait
        yield

    write(1, 1.0)
    write(2, 2.0)
    arguments = SimpleNamespace(output_dir=str(tmp_path), main_process_first=main_process_first)
    CheckpointAveraging(2).on_train_end(arguments, None, None, model=model)
    assert all((parameter == 3.0).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (1, {}, "average_checkpoints must be 0, or at least 2, got 1"),
        (3, {"save_total_limit": 2}, "save_total_limit keeps 2; raise it"),
        (
            3,
            {"save_total_limit": 3, "eval_strategy": "steps"},
            "the best, which may be old; raise it to 4",
        ),
        (2, {"load_best_model_at_end": True, "eval_strategy": "steps"}, "leave one of them out"),
        (2, {"save_strategy": "no"}, "none are saved; set save_strategy"),
    ],
)
def test_averaging_that_cannot_be_is_an_error(manifest, tmp_path, count, settings, message):
    data = DataArguments(
        train_data=[str(manifest)],
        eval_data=[str(manifest)],
        cache_dir=str(tmp_path / "cache"),
    )
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1, **settings}
    with pytest.raises(ValueError, match=message):
        train(
            model_arguments(), data, trainer_arguments(tmp_path / "run", **settings), run_arguments=RunArguments(count)
        )

"""Small runs for tests of training: tones that are called by their pitch, and a model that trains in a second."""

import json
from pathlib import Path

import numpy as np
import soundfile
from transformers import Seq2SeqTrainingArguments, TrainerCallback

from echo_hf.training import TRAINING_DEFAULTS, ModelArguments

TINY = "encoder_hidden_size=16,encoder_num_hidden_layers=1,decoder_hidden_size=16,encoder_num_attention_heads=2," + (
    "decoder_num_attention_heads=2,encoder_intermediate_size=16,decoder_intermediate_size=16,max_target_positions=12"
)
TINY_FEATURES = '{"spectrogram": 20, "pitch": 1}'


def write_six_tones(folder: Path) -> Path:
    """The manifest of six tones of 0.3 to 0.55 s that are called by their pitch."""
    lines = []
    for number in range(6):
        frequency, times = (120, 240)[number % 2], np.arange(4800 + 800 * number) / 16000
        soundfile.write(folder / f"{number}.wav", 0.3 * np.sin(2 * np.pi * frequency * times), 16000)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": ("low", "high")[number % 2]}))
    path = folder / "tones.jsonl"
    path.write_text("\n".join(lines))
    return path


def trainer_arguments(output_dir, **changes) -> Seq2SeqTrainingArguments:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none"}
    settings |= {"disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return Seq2SeqTrainingArguments(output_dir=str(output_dir), **{**TRAINING_DEFAULTS, **settings, **changes})


def model_arguments(**changes) -> ModelArguments:
    return ModelArguments(**{"config_overrides": TINY, "feature_groups": TINY_FEATURES, **changes})


class Interrupt(TrainerCallback):
    """The user's Ctrl+C in the middle of the second epoch."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt

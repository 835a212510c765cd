"""The arguments of a training run, as `echo-hf train` and [`~echo_hf.training.train`] take them."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..configuration_echo import PRESETS, SIZES

BYTE_VOCABULARY = 259  # 3 special tokens and 256 bytes
TOKEN_UNITS = ("byte", "character", "subword")

# What `echo-hf train` sets where the Trainer's own default is meant for fine-tuning a large language model.
TRAINING_DEFAULTS = {
    "num_train_epochs": 30.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of all steps, since it is below 1
    "weight_decay": 0.01,
    "logging_steps": 25,
    "save_total_limit": 2,
    "metric_for_best_model": "wer",
    "greater_is_better": False,
    "predict_with_generate": True,
    "train_sampling_strategy": "group_by_length",
    "use_cache": True,  # the Trainer writes it into the config; in training the model keeps no cache, whatever it says
    "remove_unused_columns": False,  # the collator picks; removed, `length` would be measured by reading all features
}

# For a Whisper, which knows much already; beyond 1e-4 it forgets what it knows.
WHISPER_LEARNING_RATE = 1e-5


@dataclass
class ModelArguments:
    """What is trained."""

    _argument_group_name = "model"

    model_name_or_path: str | None = HfArg(
        default=None,
        help="Echo checkpoint to start from, or a Whisper, which gets pitch: a folder, or a name on the Hub."
        " From scratch if not given.",
    )
    preset: str | None = HfArg(
        default=None,
        help=f"Pitch mechanisms that are on, from scratch: {', '.join(PRESETS)}. EchoConfig's own if not given.",
        metadata={"choices": list(PRESETS)},
    )
    size: str | None = HfArg(
        default=None,
        help=f"Number of parameters, from scratch: {', '.join(SIZES)}. 10m if not given.",
        metadata={"choices": list(SIZES)},
    )
    token_unit: str | None = HfArg(
        default=None,
        help="What a token is, from scratch: a character of the training text (the default), a byte, or a"
        " subword, for which vocab_size is needed. CTC learns larger units later, and takes at most one a frame.",
        metadata={"choices": list(TOKEN_UNITS)},
    )
    vocab_size: int | None = HfArg(
        default=None, help="Most tokens there may be, from scratch: at least 259 (bytes and special tokens)."
    )
    feature_groups: str | None = HfArg(
        default=None, help='Channels of the features, from scratch, as JSON, e.g. \'{"spectrogram": 80, "pitch": 1}\'.'
    )
    f0_method: str | None = HfArg(default=None, help="Tracker of F0, from scratch: dio_fast if not given.")
    attn_implementation: str | None = HfArg(
        default=None,
        help="Attention to train with, e.g. sdpa (the default) or eager, which is faster on a CPU in bfloat16."
        " The checkpoint does not remember it.",
    )
    config_overrides: str | None = HfArg(
        default=None,
        help="Any other fields of EchoConfig, or of EchoWhisperConfig: key=value,key=value, or a JSON object,"
        " e.g. dropout=0.1,apply_spec_augment=true.",
    )
    language: str | None = HfArg(
        default=None, help="Language of the texts, e.g. en. A multilingual Whisper has to be told once."
    )
    window: int | None = HfArg(
        default=None, help="Seconds of audio that a Whisper which gets pitch hears at a time. 30 if not given."
    )


@dataclass
class DataArguments:
    """What it is trained and evaluated on."""

    _argument_group_name = "data"

    train_data: list[str] = HfArg(
        help="Training speech, one source or more: manifests (JSON lines with audio and text), folders (audio"
        " files with .txt beside them, or a metadata.jsonl), datasets on disk or on the Hub."
    )
    eval_data: list[str] | None = HfArg(
        default=None, help="Speech to measure the word error rate on, of voices not in train_data."
    )
    train_split: str = HfArg(default="train", help="Split of a Hub or on-disk dataset to train on.")
    eval_split: str = HfArg(default="validation", help="Split of such a dataset to evaluate on.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of a dataset on the Hub.")
    audio_column: str | None = HfArg(default=None, help="Column with the audio, if not `audio`.")
    text_column: str | None = HfArg(default=None, help="Column with the transcript, if not `text`.")
    min_seconds: float | None = HfArg(default=None, help="Training audio shorter than this is left out.")
    max_seconds: float | None = HfArg(
        default=30.0, help="Training audio longer than this is left out, as it decides the memory used."
    )
    skip_broken: bool = HfArg(default=False, help="Report and leave out what cannot be used, instead of stopping.")
    normalize_text: bool = HfArg(
        default=False,
        help="Train on text as it is scored, lower case without punctuation: easier to learn from little speech.",
    )
    num_proc: int | None = HfArg(default=None, help="Processes that compute features.")
    cache_dir: str | None = HfArg(
        default=None, help="Folder for computed features; in the cache of `datasets` if not given."
    )


@dataclass
class AugmentationArguments:
    """What is changed in training speech, and added to it, so that a model learns from more than was recorded."""

    _argument_group_name = "augmentation"

    tempo_perturbation: float = HfArg(
        default=0.0, help="Training speech is made faster or slower by a random factor up to exp of this; try 0.15."
    )
    voice_perturbation: float = HfArg(
        default=0.0, help="Its formants and F0 are moved by a random factor up to exp of this, as of another speaker."
    )
    channel_perturbation: float = HfArg(
        default=0.0, help="Its spectrum is tilted and its noise floor raised at random; 0.25 is 10 dB at the edges."
    )
    f0_drop: float = HfArg(default=0.0, help="With this probability all of an utterance's F0 is hidden, as unvoiced.")
    pause: float = HfArg(
        default=0.0,
        help="With this probability the utterances of a batch have silence, or their room's noise, before or"
        " behind: up to 10 s, mostly less than 2.",
    )
    non_speech_share: float = HfArg(
        default=0.0,
        help="Clips without speech (silence, noise, hum, tones) that are added to train on with an empty text,"
        " as a share of the utterances; try 0.05.",
    )
    join: float = HfArg(
        default=0.0,
        help="With this probability the utterances of a batch are joined, several of a language one behind the"
        " other, up to 20 s or max_seconds, so that long speech is trained where most recordings are short.",
    )


__all__ = [
    "TRAINING_DEFAULTS",
    "WHISPER_LEARNING_RATE",
    "AugmentationArguments",
    "DataArguments",
    "ModelArguments",
]

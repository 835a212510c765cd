"""Loading a checkpoint, with one clear error that names the file and the remedy.

Transformers replaces a missing tokenizer, missing weights and a damaged generation config by defaults, and ignores
unknown fields of a config. Such a model writes nonsense. Here all of this is an error, and so are weights that are NaN
or pickled; a pickle can run code.
"""

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file, has_file, logging

from .configuration_echo import REMOVED_FIELDS, EchoConfig
from .conversion import check_extractor
from .modeling_echo import EchoForConditionalGeneration, EchoForCTC
from .processing_echo import EchoProcessor
from .whisper_echo import (
    EchoWhisperConfig,
    EchoWhisperFeatureExtractor,
    EchoWhisperForConditionalGeneration,
    EchoWhisperProcessor,
)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"  # either holds the feature extractor
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
JSON_FILES = (CONFIG, GENERATION_CONFIG, PROCESSOR, PREPROCESSOR, TOKENIZER, TOKENIZER_CONFIG)

# Fields of the config of any model.
LIBRARY_FIELDS = ("architectures", "dtype", "torch_dtype", "quantization_config", "_name_or_path")
TOKEN_IDS = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
)

NEWER = (
    "If a newer version of echo_hf saved it: update the package (git pull, pip install . in the clone), or load the"
    " model with its own code: AutoModelForSpeechSeq2Seq.from_pretrained(..., trust_remote_code=True)."
)
SAVE_PROCESSOR = "from where the model was trained, or save it again: processor.save_pretrained(folder)."


class CheckpointError(ValueError):
    """What is wrong with a checkpoint: the file and the remedy, in one line."""


def load_model_and_processor(checkpoint: str | Path, model_class=None, **overrides):
    """
    The model and the processor of a checkpoint, which are complete and fit each other.

    Args:
        checkpoint (`str` or `Path`): folder, or name on the Hub.
        model_class (*optional*): [`EchoForConditionalGeneration`] or [`EchoForCTC`]; weights that the file lacks start
            at random. Without it, the class that was saved, with all of its weights.
        overrides: fields of the config to change. A mechanism can be switched off, but not on, since its weights are
            missing, unless `model_class` is given.

    Returns:
        The model, in float32 and on the CPU, and [`EchoProcessor`].

    Raises:
        `CheckpointError`, a `ValueError`: there is no such checkpoint; a file of it is missing, cut off, damaged, of
            another or a newer model; or its files do not fit each other.
    """
    with _explained(f"No checkpoint could be loaded from {checkpoint}"):
        paths = {name: _find(checkpoint, name) for name in JSON_FILES}
        contents = {name: read_object(path) for name, path in paths.items() if path is not None}
        if CONFIG not in contents:
            raise OSError(f"it has no {CONFIG}{'. Is it the folder of a model' if Path(checkpoint).is_dir() else ''}")
        config = _load_config(checkpoint, paths[CONFIG], contents[CONFIG], overrides)
        for path in _find_weights(checkpoint):
            check_safetensors(path)
    processor_file = _find_processor(checkpoint)
    what = f"{processor_file} and {TOKENIZER} are not those of the model in {CONFIG}"
    with _explained(what, f"Copy both {SAVE_PROCESSOR}"):
        processor = EchoProcessor.from_pretrained(checkpoint)
        check_fit(processor, config)
    if GENERATION_CONFIG in contents:
        _check_token_ids(paths[GENERATION_CONFIG], contents[GENERATION_CONFIG], config.vocab_size)
    saved_class = EchoForCTC if (config.architectures or [""])[0] == "EchoForCTC" else EchoForConditionalGeneration
    model = _load_model(checkpoint, config, model_class or saved_class, overrides, may_lack=model_class is not None)
    return model, processor


def load_whisper_and_processor(checkpoint: str | Path, may_lack: bool = False, **overrides):
    """
    The same of a Whisper with pitch.

    Args:
        checkpoint (`str` or `Path`): folder, or name on the Hub.
        may_lack (`bool`, defaults to `False`): whether a mechanism can be switched on, whose weights start at 0.
        overrides: fields of the config to change.

    Returns:
        [`EchoWhisperForConditionalGeneration`], in float32 and on the CPU, and [`EchoWhisperProcessor`].

    Raises:
        `CheckpointError`, a `ValueError`: as [`load_model_and_processor`].
    """
    with _explained(f"No checkpoint could be loaded from {checkpoint}"):
        config = EchoWhisperConfig.from_pretrained(checkpoint, **overrides)
        for path in _find_weights(checkpoint):
            check_safetensors(path)
    _find_processor(checkpoint)
    with _explained(f"No processor could be loaded from {checkpoint}", f"Copy it {SAVE_PROCESSOR}"):
        processor = EchoWhisperProcessor.from_pretrained(checkpoint)
    extractor = processor.feature_extractor
    if not isinstance(extractor, EchoWhisperFeatureExtractor):
        raise CheckpointError(
            f"{checkpoint}: the feature extractor is {type(extractor).__name__}, which tracks no F0. Copy {PROCESSOR}"
            f" {SAVE_PROCESSOR}"
        )
    check_extractor(checkpoint, extractor, config)
    return _load_model(checkpoint, config, EchoWhisperForConditionalGeneration, overrides, may_lack), processor


def check_fit(processor: EchoProcessor, config: EchoConfig) -> None:
    """Raises `ValueError` if features, their rate or the tokens differ between the processor and the model."""
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    for name in ("feature_groups", "sampling_rate", "hop_length"):
        if getattr(extractor, name) != getattr(config, name):
            raise ValueError(
                f"{name}: the feature extractor has {getattr(extractor, name)}, the model {getattr(config, name)};"
                " they must be the same."
            )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"vocab_size: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}.")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        several = name == "eos_token_id" and tokenizer.eos_token_id in config.ends_of_sequence
        if not several and getattr(tokenizer, name) != getattr(config, name):
            raise ValueError(
                f"{name}: {getattr(tokenizer, name)} in the tokenizer, {getattr(config, name)} in the model."
            )


def check_safetensors(path: str | Path) -> None:
    """Raises `ValueError` for a file that is cut off or no safetensors, by its header, which has the file's length."""
    with _explained(f"{path} is cut off or damaged", "Copy or download it again."):
        with safe_open(path, framework="pt"):
            pass


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; raises `ValueError` for one that is no JSON, is cut off or nested too deeply."""
    with _explained(f"{path} is cut off or damaged", "Copy or download it again."):
        return json.loads(Path(path).read_bytes())


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; raises `ValueError` as [`read_json`], and for another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object. Copy or download it again.")
    return value


def parse_overrides(text: str | None, config_class: type | None = EchoConfig) -> dict[str, Any]:
    """
    Fields of a config from one string.

    Args:
        text (`str`, *optional*): `"dropout=0.1,theta_mode=none"`, values read as JSON where they are and as text where
            not; or a JSON object, which can also hold lists.
        config_class (`type`, *optional*): whose fields there may be; [`EchoConfig`] if not given, and any if None.

    Returns:
        `dict[str, Any]`: value of each field; empty without text.

    Raises:
        `ValueError`: not of that form, or no field of the config is called so; the message names the closest.
    """
    if not text or not text.strip():
        return {}
    if text.lstrip().startswith("{"):
        overrides = parse_object(text, "config_overrides")
    else:
        overrides = {}
        for item in text.split(","):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not key or not equals:
                raise ValueError(f"config_overrides: {item!r} is not key=value; write key=value,... or a JSON object.")
            try:
                overrides[key] = json.loads(value)
            except (json.JSONDecodeError, RecursionError):
                overrides[key] = value
    known = set(overrides) if config_class is None else {entry.name for entry in fields(config_class)}
    for key in overrides:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"config_overrides: {config_class.__name__} has no field {key!r}.{hint}")
    return overrides


def parse_object(text: str, name: str) -> dict[str, Any]:
    """The JSON object in the text of an option, which an error calls `name`; raises `ValueError` for other text."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: {text!r} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {text!r} is not a JSON object.")
    return value


@contextmanager
def _explained(what: str, remedy: str = "") -> Iterator[None]:
    """Turns any error of a library into one line: what is wrong, the reason, the remedy."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{what}: {reason.rstrip('.')}. {remedy}".rstrip()) from error


def _find(checkpoint: str | Path, name: str) -> str | None:
    return cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)


def _find_processor(checkpoint: str | Path) -> str:
    """The file with the feature extractor; raises `ValueError` if it is missing, or the tokenizer's."""
    path = _find(checkpoint, PROCESSOR) or _find(checkpoint, PREPROCESSOR)
    for name, found in ((PROCESSOR, path), (TOKENIZER, _find(checkpoint, TOKENIZER))):
        if found is None:
            raise CheckpointError(f"{checkpoint} has no {name}: copy it {SAVE_PROCESSOR}")
    return path


def _find_weights(checkpoint: str | Path) -> list[str]:
    single, index = _find(checkpoint, WEIGHTS), _find(checkpoint, WEIGHTS_INDEX)
    if single is not None:
        return [single]
    if index is None:
        for name in PICKLED_WEIGHTS:
            if has_file(checkpoint, name):
                raise OSError(
                    f"its weights are in {name} only, a pickle, which could run any code. Ask its author for"
                    f" {WEIGHTS}; or, if you trust them, load it with use_safetensors=False and save it again"
                )
        raise OSError(f"it has no weights ({WEIGHTS})")
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} is damaged: it names no files. Copy or download it again.")
    paths = {name: _find(checkpoint, name) for name in sorted(set(shards.values()))}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise OSError(f"{', '.join(missing)} of its weights is missing: copy it from where the model was saved")
    return list(paths.values())


def _load_config(checkpoint: str | Path, path: str, saved: dict[str, Any], overrides: dict[str, Any]) -> EchoConfig:
    if saved.get("model_type") != EchoConfig.model_type:
        remedy = " Give it pitch first: echo-hf add-pitch." if saved.get("model_type") == "whisper" else ""
        raise CheckpointError(
            f"{path} is of a model of type {saved.get('model_type')!r}, not {EchoConfig.model_type!r}.{remedy}"
        )
    default = EchoConfig()
    known = {*default.to_dict(), *LIBRARY_FIELDS, *REMOVED_FIELDS}
    unknown = sorted(name for name in saved if name not in known and not hasattr(default, name))
    if unknown:
        raise CheckpointError(
            f"{path} has fields that this version of echo_hf does not know, and so would ignore: {', '.join(unknown)}."
            f" {NEWER}"
        )
    with _explained(path, NEWER):
        config = EchoConfig.from_pretrained(checkpoint)
    with _explained(f"{path} cannot be changed by {', '.join(f'{key}={value!r}' for key, value in overrides.items())}"):
        return EchoConfig.from_pretrained(checkpoint, **overrides) if overrides else config


def _check_token_ids(path: str, saved: dict[str, Any], vocab_size: int) -> None:
    def flat(value) -> list:
        return [item for part in value for item in flat(part)] if isinstance(value, list) else [value]

    for name in TOKEN_IDS:
        for value in flat(saved.get(name)):
            if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
                raise CheckpointError(
                    f"{path}: {name} has {value!r}, and the model's tokens are 0 to {vocab_size - 1}. Copy the file"
                    " from where the model was saved, or delete it to use the defaults."
                )


def _load_model(checkpoint: str | Path, config, model_class, overrides: dict[str, Any], may_lack: bool):
    with _unreported(), _explained(f"The model of {checkpoint} ({CONFIG} and its weights) cannot be loaded"):
        model, report = model_class.from_pretrained(
            checkpoint, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    mismatched, missing, unexpected = (
        sorted(report[name]) for name in ("mismatched_keys", "missing_keys", "unexpected_keys")
    )
    fault = None
    if mismatched:
        name, in_file, in_config = mismatched[0]
        fault = (
            f"{name} is {tuple(in_file)} in the file and {tuple(in_config)} by the config ({len(mismatched)} in all)"
        )
    elif missing and not may_lack:
        fault = f"The weights lack {missing[0]} and {len(missing) - 1} others that it asks for"
    elif unexpected and not overrides:
        fault = f"The weights have {unexpected[0]} and {len(unexpected) - 1} others that it does not ask for"
    if fault is not None:
        remedy = f", or leave {', '.join(overrides)} as it was saved." if overrides else "."
        raise CheckpointError(
            f"{checkpoint}: {CONFIG} does not describe the weights. {fault}. Copy both from the same model{remedy}"
        )
    for name, values in model.state_dict().items():
        if not torch.isfinite(values).all():
            raise CheckpointError(
                f"{checkpoint}: {name} of its weights has NaN or infinite values. Take a checkpoint from before its"
                " training diverged."
            )
    return model


@contextmanager
def _unreported() -> Iterator[None]:
    """Silences the library's table of keys, the first of which an error here names."""
    reporter = logging.get_logger("transformers.modeling_utils")

    def is_error(record) -> bool:
        return record.levelno >= logging.ERROR

    reporter.addFilter(is_error)  # with a level of its own, the library would report that no layer is sharded
    try:
        yield
    finally:
        reporter.removeFilter(is_error)


__all__ = [
    "CheckpointError",
    "check_fit",
    "check_safetensors",
    "load_model_and_processor",
    "load_whisper_and_processor",
    "parse_object",
    "parse_overrides",
    "read_json",
    "read_object",
]

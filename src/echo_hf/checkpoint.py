"""Loading a checkpoint so that what is wrong with it is said at once, by the name of the file, and with the remedy.

Transformers forgives much: a missing tokenizer becomes the default one, missing weights are drawn at random, fields of
a config that it does not know are kept and ignored, a generation config that is cut off is replaced. Each of these
gives a model that runs and writes nonsense. Here they are errors, and so are pickled weights, which could run code.
"""

import difflib
import json
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HFValidationError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors import safe_open
from transformers.utils import cached_file
from transformers.utils import has_file
from transformers.utils import logging

from .configuration_echo import EchoConfig
from .modeling_echo import EchoForConditionalGeneration
from .modeling_echo import EchoForCTC
from .processing_echo import EchoProcessor

logger = logging.get_logger(__name__)

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"  # either holds the feature extractor
JSON_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", PROCESSOR, PREPROCESSOR)

OF_THE_LIBRARY = ("architectures", "dtype", "torch_dtype", "quantization_config", "_name_or_path")  # in any config


def load_model_and_processor(checkpoint: str | Path, model_class=None, **overrides):
    """
    The model and the processor of a checkpoint, which are complete and fit each other.

    Args:
        checkpoint (`str` or `Path`): folder, or name on the Hub.
        model_class (*optional*): [`EchoForConditionalGeneration`] or [`EchoForCTC`]. The one that was saved if not
            given, and then all of its weights have to be there; another one starts what it lacks at random, as the
            library does.
        overrides: fields of the config to change. The weights have to hold all that the config then asks for, in the
            same shapes: a mechanism can be switched off, not on, unless `model_class` is given.

    Returns:
        The model, in float32 and on the CPU, and [`EchoProcessor`].

    Raises:
        `ValueError`: there is no such checkpoint, a file of it is missing, cut off, of another or a newer model, or its
            files do not fit each other. The message names the file and what to do.
    """
    try:
        files = {name: _find(checkpoint, name) for name in ("config.json", WEIGHTS, *JSON_FILES)}
        config = _load_config(checkpoint, files["config.json"], overrides)
        weights = _find_weights(checkpoint, files[WEIGHTS])
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise ValueError(f"No checkpoint could be loaded from {checkpoint}: {error}") from error
    for path in weights:
        check_safetensors(path)
    for name in JSON_FILES:
        if files[name] is not None:
            read_json(files[name])
    if files[PROCESSOR] is None and files[PREPROCESSOR] is None:
        raise ValueError(f"{checkpoint} has no {PROCESSOR}: {_copy_it('the feature extractor')}")
    if files["tokenizer.json"] is None:
        raise ValueError(f"{checkpoint} has no tokenizer.json: {_copy_it('the tokenizer')}")
    try:
        processor = EchoProcessor.from_pretrained(checkpoint)
    except Exception as error:  # what tokenizers raises is an Exception and no more
        raise ValueError(f"The processor of {checkpoint} cannot be loaded: {error} {_copy_it('it')}") from error
    try:
        check_fit(processor, config)
    except ValueError as error:
        found = PROCESSOR if files[PROCESSOR] is not None else PREPROCESSOR
        raise ValueError(
            f"{checkpoint}: {found} or tokenizer.json is not of the model in config.json. {error}"
            " Save the processor again that the model was trained with: processor.save_pretrained(folder)."
        ) from error
    return _load_model(checkpoint, config, model_class, overrides), processor


def check_fit(processor: EchoProcessor, config: EchoConfig) -> None:
    """
    Checks that the processor makes what the model takes.

    Raises:
        `ValueError`: features, their rate or the tokens differ; the message names what.
    """
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
    """
    Reads the header of a file of weights, which tells how long the file has to be.

    Raises:
        `ValueError`: the file is cut off, or no safetensors.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}): copy or download it again.") from error


def read_json(path: str | Path) -> Any:
    """
    What a JSON file holds.

    Raises:
        `ValueError`: it is no JSON, perhaps because it is cut off.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is cut off or damaged ({error}): copy or download it again.") from error


def parse_overrides(text: str | None, config_class=EchoConfig) -> dict[str, Any]:
    """
    Fields of a config from one string.

    Args:
        text (`str`, *optional*): `"dropout=0.1,theta_mode=none"`, values read as JSON where they are and as text where
            not; or a JSON object, which can also hold lists.
        config_class (*optional*): whose fields there may be; [`EchoConfig`] if not given.

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
            except json.JSONDecodeError:
                overrides[key] = value
    known = {entry.name for entry in fields(config_class)}
    for key in overrides:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"config_overrides: {config_class.__name__} has no field {key!r}.{hint}")
    return overrides


def parse_object(text: str, name: str) -> dict[str, Any]:
    """
    The JSON object that an option holds.

    Args:
        text (`str`): its text.
        name (`str`): what an error calls the option.

    Raises:
        `ValueError`: it is no JSON, or no object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: {text!r} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {text!r} is not a JSON object.")
    return value


def _copy_it(what: str) -> str:
    return f"copy {what} from where the model was trained, or save it again: processor.save_pretrained(folder)."


def _find(checkpoint: str | Path, name: str) -> str | None:
    return cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)


def _load_config(checkpoint: str | Path, path: str | None, overrides: dict[str, Any]) -> EchoConfig:
    if path is None:
        raise OSError(f"it has no config.json. {'Is it the folder of a model?' if Path(checkpoint).is_dir() else ''}")
    saved = read_json(path)
    if saved.get("model_type") != EchoConfig.model_type:
        raise ValueError(f"{path} is of a model of type {saved.get('model_type')!r}, not {EchoConfig.model_type!r}.")
    update = "update the package (git pull, pip install . in the clone), or load the model with its own code instead:"
    update += " AutoModelForSpeechSeq2Seq.from_pretrained(..., trust_remote_code=True)."
    default = EchoConfig()
    known = {*default.to_dict(), *OF_THE_LIBRARY}
    unknown = sorted(name for name in saved if name not in known and not hasattr(default, name))
    if unknown:
        raise ValueError(
            f"{path} has fields that this version of echo_hf does not know, and so would ignore: {', '.join(unknown)}."
            f" If a newer one saved it: {update}"
        )
    version = saved.get("transformers_version") or "0"
    if int(version.partition(".")[0]) > int(transformers.__version__.partition(".")[0]):
        logger.warning(
            f"{path} was saved with Transformers {version}, and {transformers.__version__} is installed. Update it if"
            " the model does not do what it should."
        )
    invalid = (StrictDataclassError, TypeError, ValueError)
    try:
        config = EchoConfig.from_pretrained(checkpoint)
    except invalid as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: {reason}. If a newer version of echo_hf saved it: {update}") from error
    if not overrides:
        return config
    try:
        return EchoConfig.from_pretrained(checkpoint, **overrides)
    except invalid as error:
        changes = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
        raise ValueError(f"{path} cannot be changed by {changes}: {' '.join(str(error).split())}.") from error


def _find_weights(checkpoint: str | Path, single: str | None) -> list[str]:
    """Files of the weights: one, or those that an index names."""
    if single is not None:
        return [single]
    index = _find(checkpoint, WEIGHTS_INDEX)
    if index is None:
        for name in PICKLED_WEIGHTS:
            if has_file(checkpoint, name):
                raise OSError(
                    f"its weights are in {name} only, a pickle, which could run any code. Ask its author for"
                    f" {WEIGHTS}; or, if you trust them, load it with use_safetensors=False and save it again."
                )
        raise OSError(f"it has no weights ({WEIGHTS}).")
    shards = sorted(set(read_json(index)["weight_map"].values()))
    paths = {name: _find(checkpoint, name) for name in shards}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise OSError(f"{', '.join(missing)} of its weights is missing: copy it from where the model was saved.")
    return list(paths.values())


def _load_model(checkpoint: str | Path, config: EchoConfig, model_class, overrides: dict[str, Any]):
    saved = EchoForCTC if (config.architectures or [""])[0] == "EchoForCTC" else EchoForConditionalGeneration
    with _unreported() if overrides and model_class is None else nullcontext():
        model, report = (model_class or saved).from_pretrained(
            checkpoint, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    remedy = "Copy both from the same model"
    remedy += f", or leave {', '.join(overrides)} as it was saved." if overrides else "."
    if report["mismatched_keys"]:
        name, in_file, in_config = sorted(report["mismatched_keys"])[0]
        raise ValueError(
            f"{checkpoint}: config.json does not describe the weights. {name} is {tuple(in_file)} in the file and"
            f" {tuple(in_config)} by the config ({len(report['mismatched_keys'])} such in all). {remedy}"
        )
    if model_class is None and report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{checkpoint}: its weights lack {missing[0]} and {len(missing) - 1} others of what config.json asks for."
            f" {remedy}"
        )
    return model


@contextmanager
def _unreported():
    """Keeps the library from telling that a part which was switched off has weights, as if something were wrong. What
    is wrong, missing or of another shape, is an error all the same."""
    reporter = logging.get_logger("transformers.modeling_utils")

    def is_error(record) -> bool:
        return record.levelno >= logging.ERROR

    reporter.addFilter(is_error)  # a level of its own would make the library tell that no layer is sharded
    try:
        yield
    finally:
        reporter.removeFilter(is_error)


__all__ = ["check_fit", "check_safetensors", "load_model_and_processor", "parse_object", "parse_overrides", "read_json"]

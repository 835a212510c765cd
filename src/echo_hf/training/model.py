"""The model and the processor that a run starts with: new ones that fit each other, or those of a checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from ..checkpoint import check_fit, load_model_and_processor, parse_object, parse_overrides
from ..configuration_echo import BASELINE, EchoConfig
from ..feature_extraction_echo import EchoFeatureExtractor
from ..modeling_echo import EchoForConditionalGeneration
from ..processing_echo import EchoProcessor
from ..tokenization_echo import EchoTokenizer
from .arguments import BYTE_VOCABULARY, TOKEN_UNITS, ModelArguments
from .whisper import build_whisper, is_whisper

logger = logging.get_logger(__name__)


def build_config(arguments: ModelArguments, label_smoothing: float = 0.0) -> EchoConfig:
    """The config of a new model; its `vocab_size` is set once the tokenizer is there."""
    settings: dict[str, Any] = {"label_smoothing": label_smoothing}
    if arguments.feature_groups:
        settings["feature_groups"] = parse_object(arguments.feature_groups, "feature_groups")
    if arguments.preset is None:  # the config's own choice of mechanisms, which no preset names
        default = EchoConfig()
        settings |= {name: getattr(default, name) for name in BASELINE}
    settings |= parse_overrides(arguments.config_overrides)
    if "vocab_size" in settings:
        raise ValueError("config_overrides: vocab_size is an option of its own, as the tokenizer follows from it.")
    return EchoConfig.from_preset(arguments.preset or "baseline", size=arguments.size or "10m", **settings)


def build_tokenizer(
    texts: Sequence[str], token_unit: str | None = None, vocab_size: int | None = None
) -> EchoTokenizer:
    """
    A tokenizer for the training text.

    Args:
        texts (`Sequence[str]`): training transcripts.
        token_unit (`str`, *optional*): of `TOKEN_UNITS`; `"character"` if not given.
        vocab_size (`int`, *optional*): most tokens there may be; needed for subwords, and not for bytes.

    Raises:
        `ValueError`: the unit is not known, or `vocab_size` does not go with it.
    """
    token_unit = token_unit or "character"
    if token_unit not in TOKEN_UNITS:
        raise ValueError(f"token_unit must be one of {', '.join(TOKEN_UNITS)}, got {token_unit!r}.")
    if vocab_size is not None and vocab_size < BYTE_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {BYTE_VOCABULARY} (bytes and special tokens), got {vocab_size}.")
    if token_unit == "byte":
        if vocab_size not in (None, BYTE_VOCABULARY):
            raise ValueError(f"vocab_size is {BYTE_VOCABULARY} with bytes as tokens; leave it out, got {vocab_size}.")
        return EchoTokenizer()
    if token_unit == "character":
        return EchoTokenizer.from_characters(texts, vocab_size)
    if vocab_size is None:
        raise ValueError("token_unit subword needs a vocab_size, e.g. 1000.")
    tokenizer = EchoTokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)
    if len(tokenizer) < vocab_size:
        logger.warning(f"The training text gives {len(tokenizer)} tokens, fewer than the {vocab_size} asked for.")
    return tokenizer


def build_processor(config: EchoConfig, tokenizer: EchoTokenizer, f0_method: str | None = None) -> EchoProcessor:
    """A processor whose features are those that the config expects."""
    extractor = EchoFeatureExtractor(
        feature_groups=config.feature_groups,
        sampling_rate=config.sampling_rate,
        hop_length=config.hop_length,
        n_fft=2 * round(1.25 * config.hop_length),  # 25 ms for a hop of 10 ms
        **({} if f0_method is None else {"f0_method": f0_method}),
    )
    return EchoProcessor(extractor, tokenizer)


def build_model_and_processor(
    arguments: ModelArguments, texts: Sequence[str], label_smoothing: float = 0.0
) -> tuple[EchoForConditionalGeneration, EchoProcessor]:
    """
    A new model with its processor, or those of a checkpoint.

    Args:
        arguments ([`ModelArguments`]): which.
        texts (`Sequence[str]`): training transcripts, of which the tokenizer is made.
        label_smoothing (`float`, defaults to 0.0): goes into the config.

    Raises:
        `ValueError`: settings do not fit each other, or ask a checkpoint to be another.
    """
    if is_whisper(arguments.model_name_or_path):
        return build_whisper(arguments)
    for name in ("language", "window"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{name} is of a Whisper alone: leave it out, or start from one by model_name_or_path.")
    if arguments.model_name_or_path is None:
        config = build_config(arguments, label_smoothing)
        tokenizer = build_tokenizer(texts, arguments.token_unit, arguments.vocab_size)
        config.vocab_size = len(tokenizer)
        processor = build_processor(config, tokenizer, arguments.f0_method)
        model = EchoForConditionalGeneration(config)
    else:
        for name in ("preset", "size", "token_unit", "vocab_size", "feature_groups", "f0_method"):
            if getattr(arguments, name) is not None:
                raise ValueError(
                    f"{name} belongs to a new model, and {arguments.model_name_or_path} is trained further. Leave it"
                    " out; fields that do not change the weights' shapes can be given as config_overrides."
                )
        overrides = {"label_smoothing": label_smoothing, **parse_overrides(arguments.config_overrides)}
        model, processor = load_model_and_processor(
            arguments.model_name_or_path, EchoForConditionalGeneration, **overrides
        )
        if "max_target_positions" in overrides:  # the checkpoint's own way of writing has its old one
            model.generation_config.max_length = model.config.max_target_positions
        zero_new_layers(model, EchoConfig.from_pretrained(arguments.model_name_or_path))
    check_fit(processor, model.config)
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    # Not in the file, since they are tied; else the Trainer warns that they are missing when it loads the best weights.
    model._keys_to_ignore_on_save = set(model.all_tied_weights_keys)
    return model, processor


@torch.no_grad()
def zero_new_layers(model: EchoForConditionalGeneration, before: EchoConfig):
    """
    Sets what the layers beyond those of a checkpoint add to 0, so that the deeper model starts as the checkpoint.

    Args:
        model ([`EchoForConditionalGeneration`]): changed in place.
        before ([`EchoConfig`]): of the checkpoint whose weights it has.
    """
    encoder, decoder = model.model.encoder, model.model.decoder
    new = [*encoder.stem_layers[before.stem_num_layers :], *encoder.layers[before.encoder_num_hidden_layers :]]
    for layer in [*new, *decoder.layers[before.decoder_num_hidden_layers :]]:
        for name, module in layer.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.weight.zero_()


__all__ = ["build_config", "build_model_and_processor", "build_processor", "build_tokenizer"]

"""Conversion of a Whisper to one with pitch, which starts as the Whisper that it was."""

import copy
from pathlib import Path

from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from .whisper_echo import (
    PITCH_MODULES,
    EchoWhisperConfig,
    EchoWhisperFeatureExtractor,
    EchoWhisperForConditionalGeneration,
    EchoWhisperProcessor,
)
from .whisper_generation_echo import FRAMES_PER_POSITION


def add_pitch(
    model: str | Path | WhisperForConditionalGeneration,
    processor: WhisperProcessor | None = None,
    window: int | None = None,
    **switches: bool,
) -> tuple[EchoWhisperForConditionalGeneration, EchoWhisperProcessor]:
    """
    Gives a Whisper pitch. Until it is trained, its outputs are the same.

    Args:
        model (`str`, `Path` or [`WhisperForConditionalGeneration`]):
            Folder of a checkpoint or its name on the Hub, or a model, which stays as it is.
        processor ([`WhisperProcessor`], *optional*): the checkpoint's if not given; needed with a model.
        window (`int`, *optional*):
            Seconds of audio that the encoder hears at a time, up to Whisper's 30; all of it if not given. A shorter
            window keeps the first positions: short utterances cost less, and outputs change.
        switches (`bool`): `pitch_stem`, `pitch_gate`, `pitch_radius`, `pitch_theta`, `pitch_bias`; the defaults of
            [`EchoWhisperConfig`] where not given.

    Returns:
        [`EchoWhisperForConditionalGeneration`] and [`EchoWhisperProcessor`]; save both in one folder.

    Raises:
        `ValueError`: the checkpoint is no Whisper, its feature extractor does not fit the model, the window is not
            possible, or a switch is not known.

    Example:

    ```python
    >>> from echo_hf import add_pitch

    >>> model, processor = add_pitch("openai/whisper-small")  # doctest: +SKIP
    >>> model.save_pretrained("my-model")  # doctest: +SKIP
    >>> processor.save_pretrained("my-model")  # doctest: +SKIP

    ```"""
    checkpoint = None if isinstance(model, nn.Module) else str(model)
    name = checkpoint or type(model).__name__
    config = AutoConfig.from_pretrained(checkpoint) if checkpoint else model.config
    if config.model_type != WhisperConfig.model_type:
        has_pitch = config.model_type == EchoWhisperConfig.model_type
        raise ValueError(
            f"{name} is a model of type {config.model_type!r}"
            + (", which has pitch already: load it as it is." if has_pitch else ", and pitch can be added to Whisper")
            + ("" if has_pitch else " alone. Give a Whisper checkpoint, such as openai/whisper-small.")
        )
    known = list(EchoWhisperConfig.__annotations__)
    if unknown := sorted(set(switches) - set(known)):
        raise ValueError(f"There is no switch {', '.join(unknown)}; there are {', '.join(known)}.")
    if processor is None:
        if checkpoint is None:
            raise ValueError("Give the processor that belongs to the model: add_pitch(model, processor).")
        processor = AutoProcessor.from_pretrained(checkpoint)
    extractor = processor.feature_extractor
    check_extractor(name, extractor, config)
    seconds = extractor.chunk_length if window is None else window
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 1 <= seconds <= extractor.chunk_length:
        raise ValueError(
            f"window must be a whole number of seconds from 1 to {extractor.chunk_length}, got {window!r}."
        )
    if checkpoint is not None:
        model = WhisperForConditionalGeneration.from_pretrained(checkpoint)

    positions = seconds * extractor.sampling_rate // extractor.hop_length // FRAMES_PER_POSITION
    inherited = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    config = EchoWhisperConfig(**{**inherited, "max_source_positions": positions, **switches})
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    weights["model.encoder.embed_positions.weight"] = weights["model.encoder.embed_positions.weight"][:positions]
    with_pitch = EchoWhisperForConditionalGeneration._from_config(config, dtype=model.dtype)
    missing, unexpected = with_pitch.load_state_dict(weights, strict=False)
    if unexpected or any(not any(part in key for part in PITCH_MODULES) for key in missing):
        raise ValueError(f"{name} does not hold the weights of a Whisper: {(unexpected or missing)[0]}.")
    with_pitch.generation_config = copy.deepcopy(model.generation_config)
    settings = {key: value for key, value in extractor.to_dict().items() if not key.endswith("_type")}
    extractor = EchoWhisperFeatureExtractor(**{**settings, "chunk_length": seconds})
    return with_pitch.eval(), EchoWhisperProcessor(extractor, processor.tokenizer)


def check_extractor(name: str, extractor: WhisperFeatureExtractor, config: WhisperConfig) -> None:
    """Raises `ValueError`, which calls the checkpoint `name`, if a feature extractor is not that of a model."""
    if not isinstance(extractor, WhisperFeatureExtractor) or extractor.feature_size != config.num_mel_bins:
        raise ValueError(
            f"{name}: the feature extractor is {type(extractor).__name__} with {extractor.feature_size} channels, and"
            f" the model takes {config.num_mel_bins} mel bins. Take the processor of the same checkpoint."
        )
    seconds = config.max_source_positions * FRAMES_PER_POSITION * extractor.hop_length / extractor.sampling_rate
    if seconds != extractor.chunk_length:
        raise ValueError(
            f"{name}: the feature extractor hears {extractor.chunk_length} s at a time, and the model {seconds:g} s."
            " Take the processor of the same checkpoint."
        )


__all__ = ["add_pitch", "check_extractor"]

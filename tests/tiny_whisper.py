"""A tiny Whisper with random weights, and what belongs to it, made without a network."""

import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

FRAMES = 100  # of a window of 1 s


def make_tokenizer() -> WhisperTokenizer:
    """Bytes, Whisper's special tokens with two languages, and the timestamps of a second."""
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    vocab = {token: index for index, token in enumerate([*bytes_to_unicode().values(), special[0]])}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[], pad_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(51)])
    return tokenizer


def make_whisper(seed: int = 0, **overrides) -> WhisperForConditionalGeneration:
    """A tiny Whisper with random weights, in which what it hears matters; in float32, as all here."""
    ids = make_tokenizer().convert_tokens_to_ids
    end = ids("<|endoftext|>")
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    tokens = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "vocab_size": 256 + 10 + 51}
    settings = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_source_positions": FRAMES // 2, **sizes}
    settings |= {"max_target_positions": 32, "median_filter_width": 3, "begin_suppress_tokens": [end], **tokens}
    config = WhisperConfig(**{**settings, "decoder_start_token_id": end + 1, **overrides})
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_positions" not in name:
                parameter.normal_(std=(2.0 if "encoder" in name else 1.0) * parameter[0].numel() ** -0.5)
    settings = model.generation_config
    settings.lang_to_id = {f"<|{name}|>": ids(f"<|{name}|>") for name in ("en", "zh")}
    settings.task_to_id = {name: ids(f"<|{name}|>") for name in ("translate", "transcribe")}
    settings.is_multilingual, settings.no_timestamps_token_id = True, ids("<|notimestamps|>")
    settings.prev_sot_token_id, settings.max_initial_timestamp_index = ids("<|startofprev|>"), 10
    settings.return_timestamps, settings.alignment_heads = False, [[0, 0], [1, 1]]
    settings.max_length = 32
    settings._from_model_config = False
    return model


def make_processor(**settings) -> WhisperProcessor:
    return WhisperProcessor(WhisperFeatureExtractor(**{"chunk_length": 1, **settings}), make_tokenizer())

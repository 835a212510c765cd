"""Echo as graphs that run without its Python code: `torch.export` and ONNX.

Greedy search needs two graphs. The encoder's also takes the first step of the decoder, the begin of sequence, so that
every cache is filled; the decoder's takes one more token. Caches are plain tensors; batch, frames and tokens are free.

B batch, T input frames, S encoder frames, N decoder layers, K key-value heads, D head dimension, P tokens so far."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .modeling_echo import EchoForConditionalGeneration

if TYPE_CHECKING:
    import onnxruntime

ENCODER_FILE, DECODER_FILE, SETTINGS_FILE = "encoder.onnx", "decoder.onnx", "generation.json"
ENCODER_OUTPUTS = ("logits", "keys", "values", "cross_keys", "cross_values", "encoder_mask", "token_pitch")
# Tracing takes a dimension of 1 for a constant, so shorter speech has to be padded.
MIN_ENCODER_FRAMES = 2


def stacked(cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all layers, each `(N, B, K, P, D)`."""
    return torch.stack([layer.keys for layer in cache.layers]), torch.stack([layer.values for layer in cache.layers])


class EncoderForExport(nn.Module):
    """Encoder and first step of the decoder: `(input_features, attention_mask)`, `(B, T, channels)` and `(B, T)`, to
    what [`ENCODER_OUTPUTS`] names:

    logits `(B, vocab_size)` of the token after the begin of sequence; keys, values `(N, B, K, 1, D)` of the decoder's
    self-attention; cross_keys, cross_values `(N, B, K, S, D)`; encoder_mask `(B, S)`; token_pitch `(B, spans)`, zeros
    if the model has none."""

    def __init__(self, model: EchoForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, input_features: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        encoded = self.model.model.encoder(input_features, attention_mask=attention_mask)
        start = attention_mask.new_full((input_features.shape[0], 1), self.model.config.decoder_start_token_id)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        outputs = self.model(encoder_outputs=encoded, decoder_input_ids=start, past_key_values=cache, use_cache=True)
        token_pitch = torch.zeros_like(encoded.f0) if encoded.token_pitch is None else encoded.token_pitch
        return (
            outputs.logits[:, -1],
            *stacked(cache.self_attention_cache),
            *stacked(cache.cross_attention_cache),
            encoded.attention_mask,
            token_pitch,
        )


class DecoderForExport(nn.Module):
    """One step of the decoder: the token `(B, 1)` and the outputs of [`EncoderForExport`] but its logits, to logits
    `(B, vocab_size)` of the next token and the longer keys and values `(N, B, K, P + 1, D)`."""

    def __init__(self, model: EchoForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cross_keys: torch.Tensor,
        cross_values: torch.Tensor,
        encoder_mask: torch.Tensor,
        token_pitch: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own, cross = DynamicCache(), DynamicCache()
        for layer in range(keys.shape[0]):
            own.update(keys[layer], values[layer], layer)
            cross.update(cross_keys[layer], cross_values[layer], layer)
        cache = EncoderDecoderCache(own, cross)
        cache.is_updated = dict.fromkeys(range(keys.shape[0]), True)
        outputs = self.model.model.decoder(
            input_ids,
            encoder_hidden_states=cross_keys[0, :, 0],  # only asked for its length: keys and values are there
            encoder_attention_mask=encoder_mask,
            token_pitch=token_pitch,
            past_key_values=cache,
            use_cache=True,
        )
        return self.model.proj_out(outputs.last_hidden_state)[:, -1], *stacked(own)


def min_frames(model: EchoForConditionalGeneration) -> int:
    """The fewest input frames, padding included, for which exported graphs are right."""
    config = model.config
    frames = MIN_ENCODER_FRAMES * int(np.prod(config.stem_strides))
    if config.token_pitch != "none":
        frames = max(frames, int(1.0 / (config.tokens_per_second * config.frame_seconds)))
    return frames + 1


def traced_parts(model: EchoForConditionalGeneration) -> list[tuple[nn.Module, dict, dict]]:
    """Encoder and decoder with example inputs by name and the names of their free dimensions."""
    model, config = model.eval(), model.config
    frames = 6 * min_frames(model) + 1
    shape = (2, frames, config.num_feature_channels)
    inputs = {
        "input_features": torch.zeros(shape, dtype=model.dtype, device=model.device),
        "attention_mask": torch.ones(shape[:2], dtype=torch.long, device=model.device),
    }
    encoder, decoder = EncoderForExport(model).eval(), DecoderForExport(model).eval()
    token = torch.full((2, 1), config.decoder_start_token_id, dtype=torch.long, device=model.device)
    with torch.no_grad():
        caches = encoder(**inputs)[1:]
        longer = decoder(token, *caches)[1:]
    step = dict(zip(("input_ids", *ENCODER_OUTPUTS[1:]), (token, *longer, *caches[2:])))
    free = {
        "input_ids": {0: "batch"},
        **dict.fromkeys(("keys", "values"), {1: "batch", 3: "tokens"}),
        **dict.fromkeys(("cross_keys", "cross_values"), {1: "batch", 3: "encoder_frames"}),
        "encoder_mask": {0: "batch", 1: "encoder_frames"},
        "token_pitch": {0: "batch", 1: "spans"},
    }
    return [(encoder, inputs, dict.fromkeys(inputs, {0: "batch", 1: "frames"})), (decoder, step, free)]


def export_programs(model: EchoForConditionalGeneration) -> tuple[torch.export.ExportedProgram, ...]:
    """Two `torch.export.ExportedProgram`, of [`EncoderForExport`] and of [`DecoderForExport`]. Puts the model into
    evaluation mode."""
    programs = []
    for part, inputs, shapes in traced_parts(model):
        free = {name: dict.fromkeys(dimensions, torch.export.Dim.AUTO) for name, dimensions in shapes.items()}
        with torch.no_grad():
            programs.append(torch.export.export(part, (), inputs, dynamic_shapes=free))
    return tuple(programs)


def export_onnx(model: EchoForConditionalGeneration, folder: str | Path) -> Path:
    """Writes `encoder.onnx`, `decoder.onnx` and the few settings that [`OnnxEcho`] reads into a folder, and returns it.

    Args:
        model ([`EchoForConditionalGeneration`]): in float32 on the CPU; is put into evaluation mode.
        folder (`str` or `Path`): made if it is not there.

    Raises:
        `ImportError`: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("Export to ONNX needs two more packages: pip install onnx onnxscript") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    outputs = (ENCODER_OUTPUTS, ENCODER_OUTPUTS[:3])
    for (part, inputs, shapes), file, names in zip(traced_parts(model), (ENCODER_FILE, DECODER_FILE), outputs):
        # A result needs a name that no input has.
        names = [name if name not in inputs else f"next_{name}" for name in names]
        with torch.no_grad():
            torch.onnx.export(
                part,
                (),
                folder / file,
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=names,
                external_data=False,
                verbose=False,
            )
    ends = model.generation_config.eos_token_id
    settings = {
        "decoder_start_token_id": model.config.decoder_start_token_id,
        "eos_token_ids": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "pad_token_id": model.config.pad_token_id,
        "max_length": model.generation_config.max_length,
        "min_frames": min_frames(model),
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    return folder


class OnnxEcho:
    """Runs what [`export_onnx`] wrote, with onnxruntime, on arrays of numpy.

    Args:
        folder (`str` or `Path`): of the two graphs.
        session_options (`onnxruntime.SessionOptions`, *optional*): number of threads and the like.

    Raises:
        `ImportError`: onnxruntime is not installed.
        `FileNotFoundError`: the folder lacks a file.
    """

    def __init__(self, folder: str | Path, session_options: "onnxruntime.SessionOptions | None" = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("ONNX graphs run with onnxruntime: pip install onnxruntime") from error
        folder = Path(folder)
        for file in (ENCODER_FILE, DECODER_FILE, SETTINGS_FILE):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} has no {file}; export_onnx(model, folder) writes it.")
        self.settings = json.loads((folder / SETTINGS_FILE).read_text())
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(folder / file, session_options, providers=["CPUExecutionProvider"])
            for file in (ENCODER_FILE, DECODER_FILE)
        )
        self.decoder_inputs = {node.name for node in self.decoder.get_inputs()}

    def generate(
        self, input_features: np.ndarray, attention_mask: np.ndarray | None = None, max_length: int | None = None
    ) -> np.ndarray:
        """Greedy search by the decoder, as `model.generate(..., ctc_weight=0.0, do_sample=False)`.

        Args:
            input_features (`np.ndarray` of shape `(B, T, channels)`): of [`EchoFeatureExtractor`].
            attention_mask (`np.ndarray` of shape `(B, T)`, *optional*): 1 for real frames.
            max_length (`int`, *optional*): most tokens, the begin of sequence included, at least 2; the model's if not
                given.

        Returns:
            `np.ndarray` of shape `(B, tokens)`, int64: begin of sequence, tokens, end of sequence, padding.

        Raises:
            `ValueError`: `max_length` leaves no room for a token.
        """
        max_length = self.settings["max_length"] if max_length is None else max_length
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, for the begin of sequence and a token, got {max_length}.")
        features = np.asarray(input_features, dtype=np.float32)
        mask = np.ones(features.shape[:2]) if attention_mask is None else np.asarray(attention_mask)
        missing = max(0, self.settings["min_frames"] - features.shape[1])
        features = np.pad(features, ((0, 0), (0, missing), (0, 0)))
        mask = np.pad(mask, ((0, 0), (0, missing))).astype(np.int64)
        logits, *states = self.encoder.run(None, {"input_features": features, "attention_mask": mask})
        inputs = dict(zip(ENCODER_OUTPUTS[1:], states))
        tokens = np.full((len(features), 1), self.settings["decoder_start_token_id"], dtype=np.int64)
        ended = np.zeros(len(features), dtype=bool)
        while True:
            following = np.where(ended, self.settings["pad_token_id"], logits.argmax(-1))
            tokens = np.concatenate((tokens, following[:, None]), axis=1)
            ended |= np.isin(following, self.settings["eos_token_ids"])
            if ended.all() or tokens.shape[1] >= max_length:
                return tokens
            inputs["input_ids"] = tokens[:, -1:]
            fed = {name: inputs[name] for name in self.decoder_inputs}
            logits, inputs["keys"], inputs["values"] = self.decoder.run(None, fed)

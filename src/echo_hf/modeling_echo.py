"""Echo: a speech recognizer that hears the pitch of the voice.

An encoder-decoder in the manner of Whisper and Moonshine. It differs from a plain rotary transformer in a few parts,
each with a field of the config and without effect when off:

    EchoRotaryEmbedding   F0 moves the rotary frequency (theta) and sets the rotary radius
    EchoAttention         frames of similar pitch attend more to each other (bias); silent keys are scaled to near zero
    EchoGatedMLP          the gates of the feed-forward see the pitch
    EchoStem              pitch as an input beside the spectrogram
    token_pitch           pitch of each token of the decoder

Two more parts are off by default: convolutions in the encoder's layers (`encoder_kernel_size`), and an encoder that
sees its own intermediate predictions (`self_conditioning_layers`).

F0 is the last channel of `input_features`, in Hz with 0 for unvoiced frames. `f0` is in Hz, `pitch` is normalized.

Dimensions: B batch, T input frames (10 ms), S encoder frames (40 ms), L tokens, H heads, K key-value heads, D head
dimension, C = D / 2 rotary pairs, E hidden size.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .conditioning_echo import (
    EchoPitch,
    EchoPitchProjection,
    EchoRotaryEmbedding,
    align_f0,
    find_silence,
    gaussian_bias_channels,
    laplacian_bias,
    mask_frames,
    pitch_per_token,
    precise_dtype,
    rotate,
    standardize_f0,
)
from .configuration_echo import EchoConfig, attach_module, attach_pipeline, check_dtype
from .generation_echo import (
    EchoCTCPrefixLogitsProcessor,
    EchoGenerationMixin,
    check_generation_config,
    check_kinds,
    drop_whisper_settings,
)
from .loss_echo import cross_entropy, ctc_loss, ignore_padding
from .normalization_echo import PITCH_CHANNELS, masked_mean, normalize_f0

attach_module(__name__)
if __name__.startswith("transformers_modules."):
    attach_pipeline(__package__)

logger = logging.get_logger(__name__)

STEM_KERNEL_SIZE = 9  # encoder frames, 360 ms
# Lists of layers in the weights, and the fields that give their lengths.
LAYER_FIELDS = {
    r"encoder\.layers": "encoder_num_hidden_layers",
    r"decoder\.layers": "decoder_num_hidden_layers",
    r"encoder\.stem_layers": "stem_num_layers",
}
DEFAULT_CTC_WEIGHT = 0.5  # in generate()
LONG_AUDIO = 30.0  # seconds; the text of more may not fit 448 tokens, so generate() warns
# The cache in the library's outputs is "cache" from Transformers 5.24 on.
CACHE_NAME = "cache" if "cache" in Seq2SeqModelOutput.__dataclass_fields__ else "past_key_values"


@dataclass
class EchoEncoderOutput(BaseModelOutput):
    """Output of the encoder."""

    attention_mask: torch.Tensor | None = None  # (B, S), 1 for real encoder frames, 0 for padding
    f0: torch.Tensor | None = None  # (B, S), Hz, 0 = unvoiced or padding
    silence: torch.Tensor | None = None  # (B, S), whether the frame is silent; with `silence_scaling`
    # (B, N), normalized pitch of each span of `1 / tokens_per_second` seconds; with `token_pitch`
    token_pitch: torch.Tensor | None = None
    # (B, N, S, vocab_size), predictions behind N layers; in training, with `self_conditioning_layers`
    intermediate_logits: torch.Tensor | None = None


@dataclass
class EchoSeq2SeqLMOutput(Seq2SeqLMOutput):
    """[`Seq2SeqLMOutput`] with the parts of the hybrid loss."""

    ce_loss: torch.Tensor | None = None  # (), cross-entropy a token
    ctc_loss: torch.Tensor | None = None  # (), CTC loss a token; with `ctc_loss_weight > 0`
    ctc_logits: torch.Tensor | None = None  # (B, S, vocab_size), of the CTC head; with labels


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a check may read the tensor: not while a graph is traced or captured, nor on the meta device."""
    return tensor.device.type != "meta" and not is_tracing(tensor)


def check_right_padding(attention_mask: torch.Tensor):
    """Raises a `ValueError` if a frame of `attention_mask`, `(B, T)`, is real behind one that is padding."""
    if has_values(attention_mask) and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError(
            "attention_mask must be 1 for an utterance's frames and 0 for the padding behind them; here a 1 follows a"
            " 0. Pad on the right, as EchoFeatureExtractor does."
        )


class EchoEncoderLayerInputs(NamedTuple):
    """Inputs that all layers of the encoder share, in the order of their arguments. They are passed by position, since
    gradient checkpointing follows gradients into positional tensors only."""

    attention_mask: torch.Tensor | None  # as the attention implementation wants it
    cos: torch.Tensor  # (B or 1, 1, S, C), of EchoRotaryEmbedding
    sin: torch.Tensor  # (B or 1, 1, S, C)
    silence: torch.Tensor | None  # (B, S), which frames are silent
    standardized_f0: torch.Tensor | None  # (B, S), for the gaussian bias
    position_bias: torch.Tensor | None  # (B, 1, S, S), the laplacian bias
    pitch: torch.Tensor  # (B, S, 3), normalized, for the gates
    encoder_mask: torch.Tensor  # (B, S), 1 for real frames, for the convolutions


class EchoStem(nn.Module):
    """Convolutions (kernel 3, GELU, RMSNorm at the end) that bring one channel group to the encoder's frame rate,
    `(B, T, channels)` to `(B, S, E)`. Padding is set to zero before each, so that a batch changes no utterance."""

    def __init__(self, config: EchoConfig, channels: int):
        super().__init__()
        self.strides = config.stem_strides
        widths = [channels] + [config.encoder_hidden_size] * len(self.strides)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(widths[i], widths[i + 1], kernel_size=3, stride=stride, padding=1)
            for i, stride in enumerate(self.strides)
        )
        self.activation = nn.GELU()
        self.norm = nn.RMSNorm(config.encoder_hidden_size, eps=config.rms_norm_eps)

    def forward(self, features: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden_states = features.transpose(1, 2)  # (B, channels, T)
        mask = attention_mask[:, None].to(hidden_states.dtype)
        for convolution, stride in zip(self.convolutions, self.strides):
            hidden_states = self.activation(convolution(hidden_states * mask))
            mask = mask[..., ::stride]
        return self.norm((hidden_states * mask).transpose(1, 2))


class EchoZeroLinear(nn.Linear):
    """A linear map that starts at 0."""


class EchoConvolutionLayer(nn.Module):
    """A depthwise convolution over time, `x + down(gelu(up(convolution(norm(x)))))`, as in ConvNeXt
    (https://huggingface.co/papers/2201.03545). It sees padding as zeros.

    Args:
        kernel_size (`int`): encoder frames that it sees, an odd number.
        within (`bool`): whether it is part of an encoder layer. It then has dropout and starts at 0.
    """

    def __init__(self, config: EchoConfig, kernel_size: int, within: bool = False):
        super().__init__()
        size = config.encoder_hidden_size
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.convolution = nn.Conv1d(size, size, kernel_size, padding=kernel_size // 2, groups=size)
        self.up_proj = nn.Linear(size, 2 * size)
        self.down_proj = (EchoZeroLinear if within else nn.Linear)(2 * size, size)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(config.dropout if within else 0.0)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(B, S, E)` and `(B, S)` to `(B, S, E)`."""
        near = self.norm(hidden_states) * attention_mask[..., None].to(hidden_states.dtype)
        near = self.convolution(near.transpose(1, 2)).transpose(1, 2)
        return hidden_states + self.dropout(self.down_proj(self.activation(self.up_proj(near))))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: its output `(B, L, H, D)` and its weights `(B, H, L, S)`."""
    scores = query @ repeat_kv(key, module.num_key_value_groups).transpose(2, 3) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:  # of another implementation
            attention_mask = torch.where(attention_mask, 0.0, torch.finfo(scores.dtype).min)
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = weights @ repeat_kv(value, module.num_key_value_groups)
    return output.transpose(1, 2).contiguous(), weights


class EchoAttention(nn.Module):
    r"""Multi-head attention: encoder self-attention, decoder self-attention, cross-attention.

    The score of query i and key j is

        z_j * (R_i q_i) . (R_j k_j) / sqrt(D)  +  bias_ij

    R rotates (not in cross-attention). `z_j` is 1, or for a silent frame the learned
    `clamp(softplus(silence_logit), low, high)`. The published form also scales pad tokens in the decoder, which the
    causal mask hides already.

    The bias of pitch is in the encoder only: [`laplacian_bias`], a matrix, or [`gaussian_bias_channels`], which replace
    the head's last rotary pair, so that every width stays and any attention kernel serves. Its strength is learned for
    each head and starts at 0."""

    def __init__(self, config: EchoConfig, layer_idx: int, side: str, is_cross_attention: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_cross_attention = is_cross_attention
        self.is_causal = side == "decoder" and not is_cross_attention
        hidden_size = getattr(config, f"{side}_hidden_size")
        self.num_heads = getattr(config, f"{side}_num_attention_heads")
        self.num_key_value_heads = getattr(config, f"{side}_num_key_value_heads")
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout

        key_value_size = config.encoder_hidden_size if is_cross_attention else hidden_size
        gaussian = side == "encoder" and config.pitch_bias == "gaussian"
        self.content_dim = self.head_dim - 2 if gaussian else self.head_dim
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.content_dim, bias=False)
        self.k_proj = nn.Linear(key_value_size, self.num_key_value_heads * self.content_dim, bias=False)
        self.v_proj = nn.Linear(key_value_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden_size, bias=False)
        if gaussian:
            self.bias_strength = nn.Parameter(torch.zeros(self.num_heads))
        if config.silence_scaling and not self.is_causal:
            self.silence_logit = nn.Parameter(torch.zeros(1))

    def append_pitch(
        self, query: torch.Tensor, key: torch.Tensor, f: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends the two channels of the gaussian bias. f: `(B, S)`, standardized F0, float32."""
        # The kernel multiplies all channels by the scaling, and the bias has none.
        of_queries, of_keys = gaussian_bias_channels(f, self.bias_strength.float() / self.scaling)
        of_keys = of_keys.expand(-1, key.shape[1], -1, -1)
        return torch.cat((query, of_queries.to(query.dtype)), -1), torch.cat((key, of_keys.to(key.dtype)), -1)

    def _split_heads(self, states: torch.Tensor, channels: int) -> torch.Tensor:
        """`(B, S, heads * channels)` to `(B, heads, S, channels)`."""
        return states.view(*states.shape[:2], -1, channels).transpose(1, 2)

    def _scale_silence(self, key: torch.Tensor, silence: torch.Tensor) -> torch.Tensor:
        """Keys `(B, K, S, D)` with those of silent frames, `(B, S)`, scaled to near zero."""
        factor = nn.functional.softplus(self.silence_logit.float()).clamp(*self.config.silence_scale_range)
        return key * torch.where(silence, factor, 1.0)[:, None, :, None].to(key.dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        silence: torch.Tensor | None = None,
        standardized_f0: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        eager: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, L, E)`): queries, and keys and values in self-attention.
            attention_mask, cos, sin, silence, standardized_f0, position_bias: see [`EchoEncoderLayerInputs`].
            key_value_states (`torch.Tensor` of shape `(B, S, E)`, *optional*): the encoder's, in cross-attention.
            past_key_values (`EncoderDecoderCache`, *optional*): keys and values of past tokens.
            eager (`bool`): whether to attend eagerly, to get the weights.

        Returns:
            `(B, L, E)` and, where the attention implementation gives them, the weights `(B, H, L, S)`.
        """
        query = self._split_heads(self.q_proj(hidden_states), self.content_dim)
        cache = cached = None
        if past_key_values is not None and self.is_cross_attention:
            cache, cached = past_key_values.cross_attention_cache, past_key_values.is_updated.get(self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
        elif past_key_values is not None:
            cache = past_key_values.self_attention_cache
        if cached:
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            states = key_value_states if self.is_cross_attention else hidden_states
            key = self._split_heads(self.k_proj(states), self.content_dim)
            value = self._split_heads(self.v_proj(states), self.head_dim)

        if cos is not None:
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if silence is not None and not cached:
            key = self._scale_silence(key, silence)
        if standardized_f0 is not None:
            query, key = self.append_pitch(query, key, standardized_f0)
        if cache is not None and not cached:
            key, value = cache.update(key, value, self.layer_idx)

        implementation = "eager" if eager else self.config._attn_implementation
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if position_bias is not None:
            kwargs["position_bias"] = position_bias.to(query.dtype)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1)), weights


class EchoOutputHead(nn.Linear):
    """A linear map to scores of tokens."""


class EchoGatedMLP(nn.Module):
    """Gated feed-forward, `down(act(gate(x) + pitch_gate(pitch)) * up(x))` (https://huggingface.co/papers/2002.05202);
    `pitch_gate` starts at 0."""

    def __init__(self, config: EchoConfig, hidden_size: int, intermediate_size: int, sees_pitch: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.pitch_proj = EchoPitchProjection(PITCH_CHANNELS, intermediate_size) if sees_pitch else None
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {config.hidden_act!r} is not known; give one of {', '.join(sorted(ACT2FN))}.")
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, pitch: torch.Tensor | None = None) -> torch.Tensor:
        gate = self.gate_proj(hidden_states)
        if self.pitch_proj is not None:
            gate = gate + self.pitch_proj(pitch)
        return self.down_proj(self.activation(gate) * self.up_proj(hidden_states))


class EchoEncoderLayer(GradientCheckpointingLayer):
    """Convolution (with `encoder_kernel_size`), pre-norm self-attention and gated feed-forward."""

    def __init__(self, config: EchoConfig, layer_idx: int):
        super().__init__()
        size = config.encoder_hidden_size
        kernel_size = config.encoder_kernel_size
        self.convolution = EchoConvolutionLayer(config, kernel_size, within=True) if kernel_size else None
        self.self_attn_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.self_attn = EchoAttention(config, layer_idx, "encoder")
        self.mlp_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.mlp = EchoGatedMLP(config, size, config.encoder_intermediate_size, config.pitch_gate)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        silence: torch.Tensor | None = None,
        standardized_f0: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        pitch: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        if self.convolution is not None:
            hidden_states = self.convolution(hidden_states, encoder_mask)
        normed = self.self_attn_norm(hidden_states)
        attended, _ = self.self_attn(
            normed, attention_mask, cos, sin, silence, standardized_f0, position_bias, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states), pitch))


class EchoDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm causal self-attention, cross-attention to the encoder's frames, gated feed-forward."""

    def __init__(self, config: EchoConfig, layer_idx: int):
        super().__init__()
        size = config.decoder_hidden_size
        self.self_attn_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.self_attn = EchoAttention(config, layer_idx, "decoder")
        self.encoder_attn_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.encoder_attn = EchoAttention(config, layer_idx, "decoder", is_cross_attention=True)
        self.mlp_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.mlp = EchoGatedMLP(config, size, config.decoder_intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        encoder_silence: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cross_attention_weights: list[torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Appends its cross-attention, `(B, H, L, S)`, to the list `cross_attention_weights`, if given."""
        normed = self.self_attn_norm(hidden_states)
        attended, _ = self.self_attn(normed, attention_mask, cos, sin, past_key_values=past_key_values, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        if encoder_hidden_states is not None:
            attended, weights = self.encoder_attn(
                self.encoder_attn_norm(hidden_states),
                encoder_attention_mask,
                silence=encoder_silence,
                key_value_states=encoder_hidden_states,
                past_key_values=past_key_values,
                eager=cross_attention_weights is not None,
                **kwargs,
            )
            if cross_attention_weights is not None:
                cross_attention_weights.append(weights)
            hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class EchoPreTrainedModel(PreTrainedModel):
    """Weight initialization and what the library asks of a model."""

    config_class = EchoConfig
    config: EchoConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["EchoEncoderLayer", "EchoDecoderLayer", "EchoStem", "EchoConvolutionLayer"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args, use_safetensors: bool | None = True, output_loading_info: bool = False, **kwargs):
        """As in the library, but weights are read from safetensors only: a pickle (`pytorch_model.bin`), which may hold
        code, needs `use_safetensors=False`.

        Raises:
            `ValueError`: the dtype is not a floating-point dtype, or the file has more layers than the config.
        """
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if dtype != "auto" and not isinstance(dtype, dict):
            check_dtype(dtype)
        model, loading_info = super().from_pretrained(
            *args, use_safetensors=use_safetensors, output_loading_info=True, **kwargs
        )
        for layers, field in LAYER_FIELDS.items():
            found = (re.search(rf"\b{layers}\.(\d+)\.", key) for key in loading_info["unexpected_keys"])
            number = max((int(match[1]) + 1 for match in found if match), default=0)
            if number > getattr(model.config, field):
                raise ValueError(
                    f"{field} is {getattr(model.config, field)}, and the weights have {number} layers. Set it to"
                    f" {number}. To cut layers off, load all of them and shorten the list afterwards."
                )
        return (model, loading_info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initial values:

        Linear, Conv1d        normal with standard deviation 1 / sqrt(inputs); biases 0
        Embedding, heads      normal with standard deviation `initializer_range`
        RMSNorm               1
        EchoRotaryEmbedding   log_theta 0 (theta as configured), gain 0 (radius 1), contour_gain 0 (theta constant)
        EchoAttention         bias_strength 0 (no bias), silence_logit in the middle of its range
        EchoPitchProjection   0, like EchoZeroLinear
        EchoEncoder           blend -2: the stem of pitch starts with a weight of an eighth"""
        super()._init_weights(module)
        if isinstance(module, EchoPitchProjection | EchoZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv1d) and not isinstance(module, EchoOutputHead):
            init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, EchoRotaryEmbedding):
            for name in ("log_theta", "gain", "contour_gain"):
                if hasattr(module, name):
                    init.zeros_(getattr(module, name))
        elif isinstance(module, EchoAttention):
            if hasattr(module, "bias_strength"):
                init.zeros_(module.bias_strength)
            if hasattr(module, "silence_logit"):
                middle = math.sqrt(math.prod(self.config.silence_scale_range))
                init.constant_(module.silence_logit, math.log(math.expm1(middle)))
        elif isinstance(module, EchoEncoder):
            if hasattr(module, "blend"):
                init.constant_(module.blend, -2.0)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        embeddings = self.get_input_embeddings()
        if isinstance(embeddings, nn.Embedding):
            embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            size = embeddings.num_embeddings
        else:  # an encoder has no embeddings, but may have a head
            multiple = pad_to_multiple_of or 1
            size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
            size = self.config.vocab_size = math.ceil(size / multiple) * multiple
        self._resize_heads(size, mean_resizing)
        return embeddings

    def _resize_heads(self, size: int, mean_resizing: bool):
        """Resizes the heads that are not tied to the embeddings. Each class resizes its own, and calls its children."""
        for child in self.children():
            if isinstance(child, EchoPreTrainedModel):
                child._resize_heads(size, mean_resizing)

    def freeze_encoder(self):
        """Stops the encoder from learning."""
        for module in self.modules():
            if isinstance(module, EchoEncoder):
                module.requires_grad_(False)

    def _get_feat_extract_output_lengths(self, input_lengths: torch.Tensor) -> torch.Tensor:
        """Encoder frames of so many input frames: `ceil(T / stride)`, stride after stride."""
        for stride in self.config.stem_strides:
            input_lengths = (input_lengths + stride - 1) // stride
        return input_lengths

    def _get_feature_vector_attention_mask(self, encoder_frames: int, attention_mask: torch.Tensor) -> torch.Tensor:
        """Mask of the encoder's frames, `(B, encoder_frames)`, from that of the input frames, `(B, T)`."""
        lengths = self._get_feat_extract_output_lengths(attention_mask.sum(-1))
        return mask_frames(lengths, encoder_frames).to(attention_mask.dtype)


class EchoEncoder(EchoPreTrainedModel):
    """Stems and a deep stack of [`EchoEncoderLayer`]."""

    _can_record_outputs = {"hidden_states": EchoEncoderLayer, "attentions": EchoAttention}

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.group_widths = list(config.feature_groups.values())
        stem_channels = {"spectrogram": config.feature_groups["spectrogram"]}
        if config.pitch_stem:
            stem_channels["pitch"] = PITCH_CHANNELS
        self.stems = nn.ModuleDict({name: EchoStem(config, channels) for name, channels in stem_channels.items()})
        if len(self.stems) > 1:
            self.blend = nn.Parameter(torch.zeros(len(self.stems) - 1))
        self.stem_layers = nn.ModuleList(
            EchoConvolutionLayer(config, STEM_KERNEL_SIZE) for _ in range(config.stem_num_layers)
        )
        self.dropout = nn.Dropout(config.dropout)
        head_dim = config.encoder_hidden_size // config.encoder_num_attention_heads
        self.rotary_emb = EchoRotaryEmbedding(config, head_dim, config.theta_mode, config.radius_mode)
        self.layers = nn.ModuleList(EchoEncoderLayer(config, i) for i in range(config.encoder_num_hidden_layers))
        self.norm = nn.RMSNorm(config.encoder_hidden_size, eps=config.rms_norm_eps)
        self.intermediate_head = None
        if config.self_conditioning_layers:
            self.intermediate_head = EchoOutputHead(config.encoder_hidden_size, config.vocab_size)
            self.self_conditioning = EchoZeroLinear(config.vocab_size, config.encoder_hidden_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.stems["spectrogram"].convolutions[0]

    def _resize_heads(self, size: int, mean_resizing: bool):
        super()._resize_heads(size, mean_resizing)
        if self.intermediate_head is not None:
            resize = self._get_resized_lm_head
            self.intermediate_head = resize(self.intermediate_head, size, mean_resizing=mean_resizing)
            self.self_conditioning = resize(self.self_conditioning, size, transposed=True, mean_resizing=mean_resizing)

    def _check_inputs(self, input_features: torch.Tensor, attention_mask: torch.Tensor | None):
        channels = self.config.num_feature_channels
        if input_features.dim() != 3 or input_features.shape[-1] != channels or input_features.shape[1] == 0:
            raise ValueError(
                f"input_features must have shape (batch, frames, {channels}), time-major, with the channel groups"
                f" {self.config.feature_groups}, got {tuple(input_features.shape)}. EchoFeatureExtractor with the same"
                " feature_groups makes them."
            )
        if attention_mask is not None and attention_mask.shape != input_features.shape[:2]:
            raise ValueError(
                "attention_mask must have the shape (batch, frames) of input_features,"
                f" {tuple(input_features.shape[:2])}, got {tuple(attention_mask.shape)}."
            )
        if has_values(input_features) and not input_features.isfinite().all():
            raise ValueError(
                "input_features hold NaN or infinity, and no transcript of them can be right. Look for the recording"
                " with numpy.isfinite."
            )
        if attention_mask is not None:
            check_right_padding(attention_mask)

    def _spec_augment(self, spectrogram: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Sets random spans of time and of mel channels to 0 (https://huggingface.co/papers/1904.08779)."""
        from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

        for name, dim, mask in (("time", 1, attention_mask), ("feature", 2, None)):
            fields = ("prob", "length", "min_masks")
            prob, length, min_masks = (getattr(self.config, f"mask_{name}_{field}") for field in fields)
            if prob > 0:
                shape = (spectrogram.shape[0], spectrogram.shape[dim])
                length = min(length, shape[1])
                masked = _compute_mask_indices(shape, prob, length, attention_mask=mask, min_masks=min_masks)
                masked = torch.from_numpy(masked).to(spectrogram.device).unsqueeze(3 - dim)
                spectrogram = spectrogram.masked_fill(masked, 0.0)
        return spectrogram

    def _read_pitch(
        self, groups: dict[str, torch.Tensor], attention_mask: torch.Tensor, encoder_mask: torch.Tensor
    ) -> EchoPitch:
        """F0 in all its forms; 0 Hz without the group `"pitch"`. It stays in float32 whatever the model's dtype."""
        lengths = (attention_mask.sum(-1), encoder_mask.sum(-1), encoder_mask.shape[1])
        frame_f0 = attention_mask.float() * (groups["pitch"][..., 0].float() if "pitch" in groups else 0.0)
        f0 = align_f0(frame_f0, *lengths)
        mean_f0 = masked_mean(frame_f0.to(precise_dtype(frame_f0.device)), attention_mask)
        frame_voicing = voicing = None
        if "voicing" in groups:
            frame_voicing = groups["voicing"][..., 0].float() * attention_mask
            voicing = align_f0(frame_voicing, *lengths)
        return EchoPitch(frame_f0, mean_f0, f0, normalize_f0(f0, encoder_mask, voicing), frame_voicing)

    def _embed(
        self,
        groups: dict[str, torch.Tensor],
        pitch: EchoPitch,
        attention_mask: torch.Tensor,
        encoder_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Channel groups `(B, T, channels)` to hidden states `(B, S, E)`: SpecAugment in training, stems, their learned
        blend, and convolutions over time."""
        inputs = dict(groups)
        if self.training and self.config.apply_spec_augment:
            inputs["spectrogram"] = self._spec_augment(groups["spectrogram"], attention_mask)
        if self.config.pitch_stem:
            inputs["pitch"] = normalize_f0(pitch.frame_f0, attention_mask, pitch.frame_voicing)
        hidden_states = None
        for i, (name, stem) in enumerate(self.stems.items()):
            stemmed = stem(inputs[name].to(stem.convolutions[0].weight.dtype), attention_mask)
            hidden_states = stemmed if i == 0 else torch.lerp(hidden_states, stemmed, self.blend[i - 1].sigmoid())
        for layer in self.stem_layers:
            hidden_states = layer(hidden_states, encoder_mask)
        return self.dropout(hidden_states)

    def _prepare_layers(
        self, hidden_states: torch.Tensor, pitch: EchoPitch, silence: torch.Tensor | None, encoder_mask: torch.Tensor
    ) -> EchoEncoderLayerInputs:
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        cos, sin = self.rotary_emb(positions, hidden_states.dtype, pitch.f0, pitch.normalized, pitch.mean_f0)
        standardized_f0 = position_bias = None
        if self.config.pitch_bias == "gaussian":  # it takes the place of the last rotary pair
            cos, sin = cos[..., :-1], sin[..., :-1]
            standardized_f0 = standardize_f0(pitch.f0, encoder_mask)
        elif self.config.pitch_bias == "laplacian":
            position_bias = laplacian_bias(pitch.f0, encoder_mask)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=encoder_mask)
        return EchoEncoderLayerInputs(
            mask, cos, sin, silence, standardized_f0, position_bias, pitch.normalized, encoder_mask
        )

    def _run_layers(
        self, hidden_states: torch.Tensor, shared: EchoEncoderLayerInputs, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states behind the last layer, and the logits, `(B, S, vocab_size)`, of each intermediate prediction:

        x = x + self_conditioning(softmax(intermediate_head(norm(x))))"""
        intermediate_logits = []
        for number, layer in enumerate(self.layers, 1):
            hidden_states = layer(hidden_states, *shared, **kwargs)
            if number in (self.config.self_conditioning_layers or ()):
                logits = self.intermediate_head(self.norm(hidden_states))
                hidden_states = hidden_states + self.self_conditioning(logits.softmax(-1))
                intermediate_logits.append(logits)
        return hidden_states, intermediate_logits

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EchoEncoderOutput:
        """
        Args:
            input_features (`torch.Tensor` of shape `(B, T, channels)`): of [`EchoFeatureExtractor`], F0 in Hz last.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real frames, 0 for padding behind.

        Returns:
            [`EchoEncoderOutput`] with `last_hidden_state` of shape `(B, S, E)`.

        Raises:
            `ValueError`: the shapes do not fit the config, the features hold NaN or infinity, or the mask has padding
                before real frames. Values are not checked while a graph is traced.
        """
        self._check_inputs(input_features, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones(input_features.shape[:2], device=input_features.device, dtype=torch.long)
        attention_mask = attention_mask.long()  # a mask of floats has a sum that cannot index
        encoder_frames = self._get_feat_extract_output_lengths(input_features.shape[1])
        encoder_mask = self._get_feature_vector_attention_mask(encoder_frames, attention_mask)  # (B, S)
        groups = dict(zip(self.config.feature_groups, input_features.split(self.group_widths, dim=-1)))

        pitch = self._read_pitch(groups, attention_mask, encoder_mask)
        silence = token_pitch = None
        if self.config.silence_scaling:
            stride, threshold = math.prod(self.config.stem_strides), self.config.silence_threshold
            silence = find_silence(groups["spectrogram"], attention_mask, encoder_frames, stride, threshold)
        if self.config.token_pitch != "none":
            frames_per_token = 1.0 / (self.config.tokens_per_second * self.config.frame_seconds)
            lengths = attention_mask.sum(-1)
            token_pitch = pitch_per_token(pitch.frame_f0, lengths, frames_per_token)

        hidden_states = self._embed(groups, pitch, attention_mask, encoder_mask)
        shared = self._prepare_layers(hidden_states, pitch, silence, encoder_mask)
        hidden_states, intermediate_logits = self._run_layers(hidden_states, shared, **kwargs)
        return EchoEncoderOutput(
            last_hidden_state=self.norm(hidden_states),
            attention_mask=encoder_mask,
            f0=pitch.f0,
            silence=silence,
            token_pitch=token_pitch,
            intermediate_logits=torch.stack(intermediate_logits, 1) if self.training and intermediate_logits else None,
        )


class EchoDecoder(EchoPreTrainedModel):
    """Token embeddings and a shallow stack of [`EchoDecoderLayer`]."""

    main_input_name = "input_ids"
    _can_record_outputs = {
        "hidden_states": EchoDecoderLayer,
        "attentions": OutputRecorder(EchoAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(EchoAttention, index=1, layer_name="encoder_attn"),
    }

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        size = config.decoder_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.pitch_proj = EchoPitchProjection(1, size) if config.token_pitch != "none" else None
        self.dropout = nn.Dropout(config.dropout)
        self.rotary_emb = EchoRotaryEmbedding(config, size // config.decoder_num_attention_heads)
        self.layers = nn.ModuleList(EchoDecoderLayer(config, i) for i in range(config.decoder_num_hidden_layers))
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def _pitch_embeds(self, token_pitch: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Embedded pitch of each token, `(B, L, E)`. The token at position p was spoken in span p - 1; the begin of
        sequence repeats the first span; beyond the audio's end pitch is 0."""
        span = (position_ids - 1).clamp(0, token_pitch.shape[1]).expand(token_pitch.shape[0], -1)
        pitch = nn.functional.pad(token_pitch, (0, 1)).gather(1, span)
        return self.pitch_proj(pitch[..., None])

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_silence: torch.Tensor | None = None,
        token_pitch: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Arguments as of [`EchoModel.forward`] without `decoder_`, and of the encoder `encoder_hidden_states`, `(B, S,
        E)`, and what [`EchoEncoderOutput`] describes.

        Returns:
            `BaseModelOutputWithPastAndCrossAttentions` with `last_hidden_state` of shape `(B, L, E)`.

        Raises:
            `ValueError`: both or neither of `input_ids` and `inputs_embeds` are given.
        """
        past_key_values = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        if self.gradient_checkpointing and self.training and (use_cache or past_key_values is not None):
            logger.warning_once("Gradient checkpointing does not work with use_cache, which is switched off.")
            use_cache, past_key_values = False, None
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("The decoder takes exactly one of decoder_input_ids and decoder_inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length

        causal_mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids
        )
        encoder_attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=encoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        hidden_states = inputs_embeds
        if self.pitch_proj is not None and token_pitch is not None:
            hidden_states = hidden_states + self._pitch_embeds(token_pitch, position_ids)
        hidden_states = self.dropout(hidden_states)
        cos, sin = self.rotary_emb(position_ids, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                causal_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                cos,
                sin,
                encoder_silence,
                past_key_values=past_key_values,
                **kwargs,
            )
        cache = {CACHE_NAME: past_key_values if use_cache else None}
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.norm(hidden_states), **cache)


class EchoEncoderModel(EchoPreTrainedModel):
    """The encoder without a head."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\."]

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.encoder = EchoEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EchoEncoderOutput:
        return self.encoder(input_features, attention_mask=attention_mask, **kwargs)


class EchoModel(EchoEncoderModel):
    """Encoder and decoder without a head.

    Example:

    ```python
    >>> import torch
    >>> from echo_hf import EchoConfig, EchoModel

    >>> model = EchoModel(EchoConfig.from_preset("all", size="2m"))
    >>> input_features = torch.zeros(1, 100, 81)  # one second: 80 mel channels and F0
    >>> outputs = model(input_features, decoder_input_ids=torch.tensor([[1, 35]]))
    >>> list(outputs.last_hidden_state.shape), list(outputs.encoder_last_hidden_state.shape)
    ([1, 2, 144], [1, 25, 144])

    ```"""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.decoder = EchoDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.decoder.embed_tokens = value

    def get_encoder_mask(self, encoder_outputs, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Mask of the encoder's frames, `(B, S)`: its own, or one from the mask of the input frames, `(B, T)`."""
        encoder_mask = getattr(encoder_outputs, "attention_mask", None)
        if encoder_mask is not None or attention_mask is None:
            return encoder_mask
        check_right_padding(attention_mask)
        return self._get_feature_vector_attention_mask(encoder_outputs[0].shape[1], attention_mask)

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: EchoEncoderOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """
        Args:
            input_features (`torch.Tensor` of shape `(B, T, channels)`): see [`EchoEncoder.forward`].
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real frames.
            decoder_input_ids (`torch.LongTensor` of shape `(B, L)`): tokens, the first `decoder_start_token_id`.
            decoder_attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for real tokens.
            encoder_outputs ([`EchoEncoderOutput`] or `tuple`, *optional*): in place of `input_features`.
            past_key_values (`EncoderDecoderCache`, *optional*): keys and values of past tokens. The name `cache`, which
                Transformers has from 5.24 on, is taken too.
            decoder_inputs_embeds (`torch.Tensor` of shape `(B, L, E)`, *optional*): in place of `decoder_input_ids`.
            decoder_position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): positions of the tokens.
            use_cache (`bool`, *optional*): whether the cache is returned; the config's if not given.

        Returns:
            `Seq2SeqModelOutput` with `last_hidden_state` of shape `(B, L, E)`.
        """
        past_key_values = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        if encoder_outputs is None:
            if input_features is None:
                raise ValueError("Either input_features or encoder_outputs must be given.")
            encoder_outputs = self.encoder(input_features, attention_mask=attention_mask, **kwargs)
        elif not hasattr(encoder_outputs, "last_hidden_state"):
            if len(encoder_outputs) > 1:
                raise ValueError(
                    "encoder_outputs is a tuple, which does not tell its parts: give what the encoder returns with"
                    " return_dict=True, or a tuple of the hidden states alone."
                )
            encoder_outputs = EchoEncoderOutput(*encoder_outputs)
        encoder_hidden_states = encoder_outputs.last_hidden_state
        encoder_mask = self.get_encoder_mask(encoder_outputs, attention_mask)

        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_mask,
            encoder_silence=getattr(encoder_outputs, "silence", None),
            token_pitch=getattr(encoder_outputs, "token_pitch", None),
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            position_ids=decoder_position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE_NAME: getattr(decoder_outputs, CACHE_NAME)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_hidden_states,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class EchoForConditionalGeneration(EchoPreTrainedModel, EchoGenerationMixin):
    """Echo with a language-model head, tied to the token embeddings, and with `ctc_loss_weight` a CTC head.

    Example:

    ```python
    >>> import torch
    >>> from echo_hf import EchoConfig, EchoForConditionalGeneration

    >>> model = EchoForConditionalGeneration(EchoConfig.from_preset("all", size="2m"))
    >>> input_features = torch.zeros(1, 100, 81)
    >>> outputs = model(input_features, labels=torch.tensor([[35, 36, 2]]))
    >>> list(outputs.logits.shape)
    [1, 3, 259]

    ```"""

    _auto_class = "AutoModelForSpeechSeq2Seq"
    _tied_weights_keys = {"proj_out.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.model = EchoModel(config)
        self.proj_out = EchoOutputHead(config.decoder_hidden_size, config.vocab_size, bias=False)
        self.ctc_head = None
        if config.ctc_loss_weight > 0:
            self.ctc_head = EchoOutputHead(config.encoder_hidden_size, config.vocab_size)
        self.generation_config.max_length = config.max_target_positions
        self.generation_config.ctc_weight = DEFAULT_CTC_WEIGHT if self.ctc_head is not None else 0.0
        # Else the library takes it for a copy of the model's config, and does not save it.
        self.generation_config._from_model_config = False
        self.post_init()

    def adjust_generation_fn(self, *args, **kwargs):
        default = self.generation_config
        super().adjust_generation_fn(*args, **kwargs)
        if self.generation_config._from_model_config:  # the checkpoint, of an EchoForCTC, has none
            self.generation_config = default

    def get_output_embeddings(self) -> nn.Module:
        return self.proj_out

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.proj_out = new_embeddings

    def _resize_heads(self, size: int, mean_resizing: bool):
        super()._resize_heads(size, mean_resizing)
        if self.ctc_head is not None:
            self.ctc_head = self._get_resized_lm_head(self.ctc_head, size, mean_resizing=mean_resizing)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Decoder inputs for labels `(B, L)`: shifted by one, behind `decoder_start_token_id`, with padding for -100.

        Raises:
            `ValueError`: the labels are longer than `max_target_positions`.
        """
        if labels.shape[1] > self.config.max_target_positions:
            raise ValueError(
                f"Labels of {labels.shape[1]} tokens are longer than max_target_positions,"
                f" {self.config.max_target_positions}, at which generate() stops. Leave long utterances out, or raise"
                " max_target_positions."
            )
        inputs = labels.new_full(labels.shape, self.config.decoder_start_token_id)
        inputs[:, 1:] = labels[:, :-1]
        return inputs.masked_fill(inputs == -100, self.config.pad_token_id)

    def train(self, mode: bool = True) -> "EchoForConditionalGeneration":
        if mode:  # an error now, and not at the first evaluation
            drop_whisper_settings(vars(self.generation_config))
        return super().train(mode)

    def _prepare_generation_config(self, generation_config, **kwargs):
        # Checked before the library merges them, since it accepts any name that the model's settings have.
        drop_whisper_settings({**vars(self.generation_config), **vars(generation_config or self.generation_config)})
        kwargs = drop_whisper_settings(kwargs)
        check_kinds({**vars(generation_config or self.generation_config), **kwargs})
        weight = kwargs.pop("ctc_weight", getattr(generation_config, "ctc_weight", None))
        if weight is None:
            weight = getattr(self.generation_config, "ctc_weight", None)
            weight = DEFAULT_CTC_WEIGHT if weight is None else weight
            if self.ctc_head is None:
                weight = 0.0
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        generation_config.ctc_weight = weight
        check_generation_config(generation_config, self.config.vocab_size)
        return generation_config, model_kwargs

    def _prepare_generated_length(self, generation_config, *args, inputs_tensor=None, **kwargs):
        if inputs_tensor is not None and inputs_tensor.ndim == 3:  # features, not encoder outputs
            seconds = inputs_tensor.shape[1] * self.config.frame_seconds
            if seconds > LONG_AUDIO:
                logger.warning_once(
                    f"generate() hears all {seconds:.0f} s of audio at once and stops at {generation_config.max_length}"
                    " tokens, if not told otherwise. The pipeline, or `echo-hf transcribe`, cuts long audio at pauses."
                )
        return super()._prepare_generated_length(generation_config, *args, inputs_tensor=inputs_tensor, **kwargs)

    def _get_logits_processor(self, generation_config, *args, model_kwargs=None, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        weight = generation_config.ctc_weight
        if not weight or generation_config.is_assistant:  # the assisted model scores an assistant's drafts
            return processors
        if self.ctc_head is None:
            raise ValueError(
                f"ctc_weight is {weight}, and this model has no CTC head (its ctc_loss_weight is 0). Leave it out."
            )
        logits, mask = self._score_frames(model_kwargs["encoder_outputs"], model_kwargs.get("attention_mask"))
        ends = generation_config._eos_token_tensor
        if ends is None:
            ends = torch.empty(0, dtype=torch.long, device=logits.device)
        joint = EchoCTCPrefixLogitsProcessor(
            logits,
            mask,
            self.config.pad_token_id,
            self.config.bos_token_id,
            ends,
            weight,
            max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1),
        )
        processors.insert(0, joint)  # first, so that what other processors rule out stays so
        return processors

    def _score_frames(
        self, encoder_outputs: EchoEncoderOutput | tuple, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the CTC head, `(B, S, vocab_size)`, and the mask of the encoder's frames, `(B, S)`."""
        logits = self.ctc_head(encoder_outputs[0])
        mask = self.model.get_encoder_mask(encoder_outputs, attention_mask)
        return logits, logits.new_ones(logits.shape[:2], dtype=torch.long) if mask is None else mask

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: EchoEncoderOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EchoSeq2SeqLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): tokens with the end of sequence and without its
                begin, at most `max_target_positions`; -100 and pad are ignored. `decoder_input_ids` are made of them if
                not given, and no cache.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): divisor of the losses' sums; the number of label
                tokens if not given.
            others: see [`EchoModel.forward`].

        Raises:
            `ValueError`: there is nothing to decode, the labels are too long, or the shapes do not fit the config.

        Returns:
            [`EchoSeq2SeqLMOutput`] with `logits` of shape `(B, L, vocab_size)`. With labels, `loss` is
            `(1 - w) * ce_loss + w * ctc_loss`, `w = ctc_loss_weight`.
        """
        past_key_values = kwargs.pop("cache", None) if past_key_values is None else past_key_values
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None:
            use_cache = bool(use_cache)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "There is nothing to decode: give labels, decoder_input_ids or decoder_inputs_embeds. (A Trainer with a"
                " label_smoothing_factor takes the labels away; set label_smoothing in the model's config instead.)"
            )
        if encoder_outputs is None and input_features is not None:
            encoder_outputs = self.model.encoder(input_features, attention_mask=attention_mask, **kwargs)
        outputs = self.model(
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        result = EchoSeq2SeqLMOutput(logits=self.proj_out(outputs.last_hidden_state), **others)
        if labels is not None:
            self._add_losses(result, labels, encoder_outputs, attention_mask, num_items_in_batch)
        return result

    def _add_losses(
        self,
        result: EchoSeq2SeqLMOutput,
        labels: torch.LongTensor,
        encoder_outputs: EchoEncoderOutput | tuple,
        attention_mask: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ):
        labels = ignore_padding(labels, self.config)
        smoothing = self.config.label_smoothing if self.training else 0.0
        result.ce_loss = result.loss = cross_entropy(result.logits, labels, smoothing, num_items_in_batch)
        if self.ctc_head is not None:
            result.ctc_logits, encoder_mask = self._score_frames(encoder_outputs, attention_mask)
            intermediate_logits = getattr(encoder_outputs, "intermediate_logits", None)
            result.ctc_loss = ctc_loss(
                result.ctc_logits, labels, encoder_mask, self.config, num_items_in_batch, intermediate_logits
            )
            result.loss = torch.lerp(result.ce_loss, result.ctc_loss, self.config.ctc_loss_weight)


def mean_cross_attention(
    model: EchoForConditionalGeneration,
    decoder_input_ids: torch.LongTensor,
    input_features: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    encoder_outputs: EchoEncoderOutput | None = None,
) -> torch.Tensor:
    """Cross-attention behind each predicted token, `(B, L, S)`, float32: the mean of all heads and layers. Only this
    call's cross-attention is eager. The model is not changed, so other threads may use it.

    Args:
        decoder_input_ids (`torch.LongTensor` of shape `(B, L)`): tokens, the first `decoder_start_token_id`.
        others: as of [`EchoModel.forward`].
    """
    if encoder_outputs is None:
        encoder_outputs = model.get_encoder()(input_features, attention_mask=attention_mask)
    weights: list[torch.Tensor] = []
    model.model(
        encoder_outputs=encoder_outputs,
        attention_mask=attention_mask,
        decoder_input_ids=decoder_input_ids,
        use_cache=False,
        cross_attention_weights=weights,
    )
    return torch.stack(weights).float().mean(dim=(0, 2))


class EchoForCTC(EchoPreTrainedModel):
    """The encoder with the CTC head alone. It shares checkpoints with an [`EchoForConditionalGeneration`] of
    `ctc_loss_weight > 0`, and ignores the decoder's weights."""

    _auto_class = "AutoModelForCTC"
    _keys_to_ignore_on_load_unexpected = [r"model\.decoder\.", r"proj_out\."]

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.model = EchoEncoderModel(config)
        self.ctc_head = EchoOutputHead(config.encoder_hidden_size, config.vocab_size)
        self.post_init()

    def _resize_heads(self, size: int, mean_resizing: bool):
        super()._resize_heads(size, mean_resizing)
        self.ctc_head = self._get_resized_lm_head(self.ctc_head, size, mean_resizing=mean_resizing)

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutput:
        """
        Args:
            input_features, attention_mask: see [`EchoEncoder.forward`].
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): tokens; -100, pad, begin and end of sequence are
                ignored.

        Returns:
            `CausalLMOutput` with `logits` of shape `(B, S, vocab_size)`; `pad_token_id` is the blank. Frames of padding
            predict the blank.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(input_features, attention_mask=attention_mask, **kwargs)
        logits = self.ctc_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            labels = ignore_padding(labels, self.config)
            loss = ctc_loss(
                logits, labels, outputs.attention_mask, self.config, num_items_in_batch, outputs.intermediate_logits
            )
        # Their argmax must give no words.
        blank = torch.zeros_like(logits[0, 0])
        blank[self.config.pad_token_id] = 1.0
        logits = torch.where(outputs.attention_mask[..., None] > 0, logits, blank)
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "EchoEncoder",
    "EchoDecoder",
    "EchoEncoderModel",
    "EchoModel",
    "EchoForConditionalGeneration",
    "EchoForCTC",
    "EchoPreTrainedModel",
]

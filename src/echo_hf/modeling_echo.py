"""Echo: a speech recogniser whose attention knows the pitch of the voice.

An encoder-decoder in the manner of Whisper and Moonshine. What differs from a plain rotary transformer is confined to
a few small parts, each switched by one field of the config and each doing nothing when it is off:

    EchoRotaryEmbedding   F0 moves the rotary frequency (theta) and sets the rotary radius
    EchoAttention         frames of similar pitch attend more to each other (bias); silent keys are scaled to near zero
    EchoGatedMLP          the gates of the feed-forward see the pitch
    EchoStem              pitch as an input of its own, beside the spectrogram
    token_pitch           pitch that accompanies each token of the decoder

Beside pitch, and off by default: convolutions in the encoder's layers (`encoder_kernel_size`), and an encoder that
hears its own intermediate predictions (`self_conditioning_layers`).

F0 arrives inside `input_features`, as its last channel, in Hz with 0 for unvoiced frames. Here `f0` is always in Hz,
`pitch` always normalised.

Dimensions: B batch, T input frames (10 ms), S encoder frames (40 ms), L tokens, H heads, K key-value heads, D head
dimension, C = D / 2 rotary pairs, E hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.cache_utils import DynamicCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.loss.loss_ctc import ForCTCLoss
from transformers.masking_utils import create_bidirectional_mask
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.modeling_outputs import Seq2SeqModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils import can_return_tuple
from transformers.utils import logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder
from transformers.utils.output_capturing import capture_outputs

from .configuration_echo import EchoConfig
from .configuration_echo import attach_module
from .configuration_echo import attach_pipeline
from .generation_echo import EchoCTCPrefixLogitsProcessor

attach_module(__name__)
if __name__.startswith("transformers_modules."):
    attach_pipeline(__package__)

logger = logging.get_logger(__name__)

MEL_THETA = 220.0  # theta at which the mel frequencies are what they are named
MEL_UNIT = 1000.0  # mel frequencies are given in thousands

STEM_KERNEL_SIZE = 9  # encoder frames, 360 ms, that a layer behind the stem sees
PITCH_CHANNELS = 3  # voiced, contour, register: what the network sees of F0
REGISTER_CENTRE = 150.0  # Hz, between low and high voices
REGISTER_WIDTH = 0.5  # natural log units; e ** 0.5 is about nine semitones
CONTOUR_FLOOR = 0.1  # natural log units; keeps a monotone's tiny wobble from being blown up to a contour
BIAS_EPSILON = 1e-8  # as published
INTERMEDIATE_WEIGHT = 0.3  # share of the CTC loss that is of predictions within the encoder, where it makes any
DEFAULT_CTC_WEIGHT = 0.5  # in generate()
LONG_AUDIO = 30.0  # seconds; generate() warns of more, of which 448 tokens may hold a part only
# What generate() of Whisper takes and this one has no use for.
WHISPER_OPTIONS = (
    *("language", "task", "is_multilingual", "prompt_ids", "prompt_condition_type", "forced_decoder_ids"),
    *("condition_on_prev_tokens", "return_timestamps", "return_token_timestamps", "return_segments"),
    *("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold", "num_segment_frames"),
)

TOKEN_PITCH_MIN, TOKEN_PITCH_LOW, TOKEN_PITCH_HIGH = 100.0, 71.0, 500.0  # Hz, as published


@dataclass
class EchoEncoderOutput(BaseModelOutput):
    """What the encoder gives, and what the decoder needs of it beside the hidden states.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, S)`): 1 for real encoder frames, 0 for padding.
        f0 (`torch.Tensor` of shape `(B, S)`): F0 in Hz at the encoder's frames, 0 = unvoiced or padding.
        silence (`torch.Tensor` of shape `(B, S)`, *optional*): whether the frame is silent; with `silence_scaling`.
        token_pitch (`torch.Tensor` of shape `(B, N)`, *optional*): normalised pitch of each span of
            `1 / tokens_per_second` seconds; with `token_pitch`.
        intermediate_logits (`torch.Tensor` of shape `(B, N, S, vocab_size)`, *optional*): what the encoder took each
            frame for behind N of its layers; in training, with `self_conditioning_layers`.
    """

    attention_mask: torch.Tensor | None = None
    f0: torch.Tensor | None = None
    silence: torch.Tensor | None = None
    token_pitch: torch.Tensor | None = None
    intermediate_logits: torch.Tensor | None = None


@dataclass
class EchoSeq2SeqLMOutput(Seq2SeqLMOutput):
    """The usual output, and the parts of the hybrid loss.

    Args:
        ce_loss (`torch.Tensor` of shape `()`, *optional*): cross-entropy a token.
        ctc_loss (`torch.Tensor` of shape `()`, *optional*): CTC loss a token; with `ctc_loss_weight > 0`.
        ctc_logits (`torch.Tensor` of shape `(B, S, vocab_size)`, *optional*): of the CTC head; with labels given.
    """

    ce_loss: torch.Tensor | None = None
    ctc_loss: torch.Tensor | None = None
    ctc_logits: torch.Tensor | None = None


def precise_dtype(device: torch.device) -> torch.dtype:
    """The dtype that angles are made in: float64, or float32 where the device has no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the last dimension of what `mask` holds, kept as a dimension: `(..., N)` to `(..., 1)`."""
    return (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def mask_frames(lengths: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Which of `num_frames` frames are real where `lengths` of them are, `(B,)` to `(B, num_frames)`, boolean."""
    return torch.arange(num_frames, device=lengths.device)[None] < lengths[:, None]


def align_f0(
    f0: torch.Tensor, lengths: torch.Tensor, encoder_lengths: torch.Tensor, encoder_frames: int
) -> torch.Tensor:
    """F0 at the encoder's frames, by nearest index, so that the contour keeps its character.

    `index_i = min(floor(i * F / S), F - 1)` with the utterance's own F and S, so that padding changes nothing.

    Args:
        f0 (`torch.Tensor` of shape `(B, T)`): Hz.
        lengths (`torch.Tensor` of shape `(B,)`): F, real input frames.
        encoder_lengths (`torch.Tensor` of shape `(B,)`): S, real encoder frames.
        encoder_frames (`int`): encoder frames of the padded batch.

    Returns:
        `torch.Tensor` of shape `(B, encoder_frames)`: Hz; 0 beyond an utterance's end.
    """
    frames = torch.arange(encoder_frames, device=f0.device)[None]
    index = frames * lengths[:, None] // encoder_lengths[:, None].clamp(min=1)
    index = torch.minimum(index, lengths[:, None] - 1).clamp(min=0)
    return f0.gather(1, index) * (frames < encoder_lengths[:, None])


def normalize_f0(f0: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pitch as the network sees it.

    Channel 0, voiced: 1 or 0. Channel 1, contour: `(ln f0 - mean) / max(std, 0.1)` over the utterance's voiced frames.
    Channel 2, register: `(ln f0 - ln 150) / 0.5`. All 0 where unvoiced.

    Args:
        f0 (`torch.Tensor` of shape `(B, T)`): Hz, 0 = unvoiced.
        mask (`torch.Tensor` of shape `(B, T)`): 1 for real frames.

    Returns:
        `torch.Tensor` of shape `(B, T, 3)`, float32.
    """
    voiced = ((f0 > 0) & (mask > 0)).float()
    log_f0 = torch.where(voiced > 0, f0, 1.0).float().log()
    deviation = log_f0 - masked_mean(log_f0, voiced)
    spread = masked_mean(deviation.square(), voiced).sqrt().clamp(min=CONTOUR_FLOOR)
    register = (log_f0 - math.log(REGISTER_CENTRE)) / REGISTER_WIDTH
    return torch.stack((voiced, voiced * deviation / spread, voiced * register), dim=-1)


def standardize_f0(f0: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """F0 as the pitch bias compares it, as published: `(f0 - mean) / (std + 1e-8)` over the real frames, unvoiced ones
    (0 Hz) included. Shapes `(B, S)` to `(B, S)`, float32; 0 in padding."""
    mask = mask.float()
    deviation = f0.float() - masked_mean(f0.float(), mask)
    spread = masked_mean(deviation.square(), mask).sqrt()
    return deviation / (spread + BIAS_EPSILON) * mask


def pitch_per_token(
    f0: torch.Tensor, lengths: torch.Tensor, frames_per_token: float, method: str = "mean"
) -> torch.Tensor:
    """Pitch of each span of a fixed token rate: what the decoder is told of F0, in training and in generation alike.

    Token i holds the frames k with `i * R <= k <= (i + 1) * R`, R frames a token, at least one. Their mean, median or
    last F0; below 100 Hz becomes 0; else `(f0 - 71) / (500 - 71)`.

    Args:
        f0 (`torch.Tensor` of shape `(B, T)`): Hz.
        lengths (`torch.Tensor` of shape `(B,)`): real input frames.
        frames_per_token (`float`): R.
        method (`str`): `"mean"`, `"median"` or `"last"`.

    Returns:
        `torch.Tensor` of shape `(B, N)`, `N = ceil(T / R)`, float32; 0 for tokens beyond an utterance's end.
    """
    tokens = torch.arange(math.ceil(f0.shape[1] / frames_per_token), device=f0.device, dtype=torch.float32)
    last_frame = (lengths[:, None] - 1).clamp(min=0)  # (B, 1)
    start = torch.minimum((tokens * frames_per_token).ceil().long()[None], last_frame)  # (B, N)
    end = torch.minimum(((tokens + 1) * frames_per_token).floor().long()[None], last_frame)
    end = torch.maximum(end, start)
    # Every span gets as many places as the longest can have; the places behind its end are left out.
    place = start[..., None] + torch.arange(math.floor(frames_per_token) + 2, device=f0.device)  # (B, N, W)
    inside = place <= end[..., None]
    place = torch.minimum(place, end[..., None])
    spans = f0.float().gather(1, place.flatten(1)).view_as(place)
    if method == "mean":
        value = masked_mean(spans, inside).squeeze(-1)
    elif method == "median":
        ordered = spans.masked_fill(~inside, torch.inf).sort(dim=-1).values
        count = inside.sum(-1, keepdim=True)
        value = (ordered.gather(2, (count - 1) // 2) + ordered.gather(2, count // 2)).squeeze(-1) / 2
    else:
        value = spans[..., -1]  # places behind the end repeat the last frame
    heard = (value >= TOKEN_PITCH_MIN) & (tokens[None] * frames_per_token < lengths[:, None])
    return torch.where(heard, (value - TOKEN_PITCH_LOW) / (TOKEN_PITCH_HIGH - TOKEN_PITCH_LOW), 0.0)


class EchoStem(nn.Module):
    """Convolutions that bring one channel group to the encoder's frame rate, `(B, T, channels)` to `(B, S, E)`.

    Each convolution (kernel 3) is followed by a GELU, the last by an RMSNorm, so that what a frame holds is not drowned
    by what the layers add. Padding is set to zero before every one of them, which is what the convolution itself sees
    beyond an utterance's end, so that a batch does not change an utterance.
    """

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
    """A linear map that starts at 0, so that what it is added to starts as if it were not there."""


class EchoConvolutionLayer(nn.Module):
    """Lets a frame hear its neighbours before attention does: `x + down(gelu(up(convolution(norm(x)))))`, with a
    depthwise convolution that sees padding as zeros (a block of ConvNeXt, https://huggingface.co/papers/2201.03545, in
    time). In short trials on an hour of speech the CTC loss left the blank's plateau sooner with four of them behind
    the stem; no word error rate was compared.

    Args:
        kernel_size (`int`): encoder frames that it sees, an odd number.
        within (`bool`): whether it is part of an encoder layer: with dropout, and doing nothing until it has learned,
            so that a model which gets convolutions starts as the one without.
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


class EchoRotaryEmbedding(nn.Module):
    r"""Cosines and sines of the rotary angles, with the radius folded in.

    Frequencies of channel pair c of `C = d / 2`, in rad a frame:

        standard   omega_c = theta ** (-2c / d)                                  (https://huggingface.co/papers/2104.09864)
        mel        omega_c = theta / 220 * m_c,   m_c = K * (10 ** (x_c / 2595) - 1) / 1000,
                   x_c evenly spaced from 0 to 2595 * log10(1 + M / K)

    How F0 moves theta, and the angle of frame t:

        none       theta_t = theta                    angle = t * omega_c
        mean       theta_t = theta + mean real f0     angle = t * omega_c
        frame      theta_t = theta + f0_t             angle = t * omega_c(theta_t)             (not relative)
        phase      theta_t = theta + f0_t             angle = sum of omega_c(theta_s), s <= t  (relative)

    The radius multiplies both channels of each pair, in queries and keys alike:

        unit       1
        sigmoid    sigmoid(f0_t)
        raw        f0_t
        bounded    1 + 0.5 * tanh(gain * contour_t), with a learned gain that starts at 0

    theta is `rotary_theta`, times `exp(log_theta)` with `learn_theta`; `log_theta` starts at 0.

    The published mel frequencies reach 363 rad a frame: at frame 1500 float32 is off by 0.03 rad and bfloat16 is noise.
    So angles are made in float64, omega reduced to [0, 2 pi) first, which changes nothing for whole-number positions.
    """

    def __init__(self, config: EchoConfig, head_dim: int, theta_mode: str = "none", radius_mode: str = "unit"):
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.theta_mode = theta_mode
        self.radius_mode = radius_mode
        if config.learn_theta:
            self.log_theta = nn.Parameter(torch.zeros(1))
        if radius_mode == "bounded":
            self.gain = nn.Parameter(torch.zeros(1))

    def frequencies(self, theta: torch.Tensor) -> torch.Tensor:
        """omega, in rad a frame, `(...)` to `(..., C)`, in theta's dtype."""
        pairs = torch.arange(self.head_dim // 2, device=theta.device, dtype=theta.dtype)
        if self.config.rotary_frequencies == "standard":
            return theta[..., None] ** (-2.0 * pairs / self.head_dim)
        corner, top = self.config.mel_corner_frequency, self.config.mel_max_frequency
        mel = pairs * (math.log10(1.0 + top / corner) / max(self.head_dim // 2 - 1, 1))  # x_c / 2595
        return theta[..., None] / MEL_THETA * (corner * (10.0**mel - 1.0) / MEL_UNIT)

    def theta(self, device: torch.device, f0: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        """Theta of each frame, `(B or 1, S or 1)`."""
        dtype = precise_dtype(device)
        theta = torch.tensor([[self.config.rotary_theta]], device=device, dtype=dtype)  # (1, 1)
        if self.config.learn_theta:
            theta = theta * self.log_theta.to(dtype).exp()
        if self.theta_mode == "mean":
            theta = theta + masked_mean(f0.to(dtype), mask)
        elif self.theta_mode in ("frame", "phase"):
            theta = theta + f0.to(dtype)
        return theta

    def angles(self, position_ids: torch.Tensor, f0: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        """Rotary angles in [0, 2 pi), `(B or 1, S, C)`."""
        omega = self.frequencies(self.theta(position_ids.device, f0, mask)) % (2 * math.pi)
        if self.theta_mode == "phase":
            return omega.cumsum(dim=1) % (2 * math.pi)
        return position_ids[..., None].to(omega.dtype) * omega % (2 * math.pi)

    def radius(self, f0: torch.Tensor, pitch: torch.Tensor) -> torch.Tensor | None:
        """Rotary radius, `(B, S, 1)`, float32, or None for 1."""
        if self.radius_mode == "sigmoid":
            return f0.float().sigmoid()[..., None]
        if self.radius_mode == "raw":
            return f0.float()[..., None]
        if self.radius_mode == "bounded":
            return 1.0 + 0.5 * torch.tanh(self.gain.float() * pitch[..., 1:2])
        return None

    def forward(
        self,
        position_ids: torch.Tensor,
        dtype: torch.dtype,
        f0: torch.Tensor | None = None,
        pitch: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            position_ids (`torch.Tensor` of shape `(B or 1, S)`): whole-number positions.
            dtype (`torch.dtype`): of the result.
            f0 (`torch.Tensor` of shape `(B, S)`, *optional*): Hz.
            pitch (`torch.Tensor` of shape `(B, S, 3)`, *optional*): normalised.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 for real frames.

        Returns:
            Two `torch.Tensor` of shape `(B or 1, 1, S, C)`: radius times cosine, radius times sine.
        """
        angles = self.angles(position_ids, f0, attention_mask).float()
        cos, sin = angles.cos(), angles.sin()
        if (radius := self.radius(f0, pitch)) is not None:
            cos, sin = cos * radius, sin * radius
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (x0, x1), (x2, x3), ... of `(B, H, S, 2C)` as complex numbers times `radius * exp(i * angle)`."""
    real, imaginary = states[..., 0::2], states[..., 1::2]
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(-2)


def to_blocks(states: torch.Tensor, size: int) -> torch.Tensor:
    """Cuts frames into blocks that become batch rows, the last filled up with zeros: `(B, H, S, D)` to
    `(B * N, H, size, D)`, `N = ceil(S / size)`."""
    batch, heads, frames, channels = states.shape
    states = nn.functional.pad(states, (0, 0, 0, -frames % size))
    return states.view(batch, heads, -1, size, channels).transpose(1, 2).flatten(0, 1)


def to_surroundings(states: torch.Tensor, size: int) -> torch.Tensor:
    """For each block of [`to_blocks`], itself and the blocks before and after it, zeros where there are none:
    `(B, H, S, D)` to `(B * N, H, 3 * size, D)`."""
    states = nn.functional.pad(states, (0, 0, size, size + -states.shape[2] % size))
    return states.unfold(2, 3 * size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)


def effective_window(window: int | None, frames: int) -> int | None:
    """The window that so many frames attend within, or None for full attention, which it is where they all fit in."""
    return window if window is not None and window < frames else None


def window_mask(encoder_mask: torch.Tensor, size: int) -> torch.Tensor:
    """Which keys of its surroundings each frame of a block attends to: real ones up to `size` frames away, and itself.

    Args:
        encoder_mask (`torch.Tensor` of shape `(B, S)`): 1 for real frames.
        size (`int`): the window to either side, and the length of a block.

    Returns:
        `torch.Tensor` of shape `(B * N, 1, size, 3 * size)`, bool.
    """
    real = to_surroundings(encoder_mask[:, None, :, None], size)[..., 0] > 0  # (B * N, 1, 3 * size)
    offset = torch.arange(3 * size, device=real.device)[None] - torch.arange(size, device=real.device)[:, None] - size
    # A frame of padding has itself to attend to, or its softmax would have nothing to share out.
    return (offset.abs() <= size) & real[:, :, None] | (offset == 0)


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
    """Attention written out: the one that can return its weights, `(B, H, L, S)`, beside its output `(B, L, H, D)`."""
    scores = query @ repeat_kv(key, module.num_key_value_groups).transpose(2, 3) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = weights @ repeat_kv(value, module.num_key_value_groups)
    return output.transpose(1, 2).contiguous(), weights


class EchoAttention(nn.Module):
    r"""Multi-head attention, of all three kinds: encoder self-attention, decoder self-attention, cross-attention.

    The score of query i and key j is

        z_j * (R_i q_i) . (R_j k_j) / sqrt(D)  +  bias_ij

    R rotates (not in cross-attention). `z_j` scales silent keys, "leveraging silence": 1, or for a silent frame the
    learned `clamp(softplus(silence_logit), low, high)`. Padding is no silence: it is masked. The published form scales
    pad tokens in the decoder's self-attention too; there a pad token never stands before a real one, and the causal
    mask hides it already, so Echo leaves that out.

    The pitch bias (encoder only), with f the standardised F0:

        laplacian   bias_ij = exp(-|f_i - f_j|)                as published; a matrix (B, 1, S, S), handed in
        gaussian    bias_ij = s_h * (2 f_i f_j - f_j ** 2)     which softmax cannot tell from -s_h * (f_i - f_j) ** 2

    The gaussian is the dot product of `s_h * (2 f_i, -1)` and `(f_j, f_j ** 2)`: two channels of queries and keys. They
    take the place of the head's last rotary pair, so that every width stays and any attention kernel serves. `s_h` is
    learned, one a head, and starts at 0. Scaling a key's channels is scaling its score, so no kind of mechanism but the
    laplacian needs a matrix of frames by frames.

    With `encoder_attention_window` w, a frame of the encoder attends to the w frames on either side of it. Queries are
    cut into blocks of w frames, each with the keys of the three blocks around it (as in Longformer,
    https://huggingface.co/papers/2004.05150), which any attention kernel takes as a batch of short sequences.
    """

    def __init__(self, config: EchoConfig, layer_idx: int, side: str, is_cross_attention: bool = False):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = side == "decoder" and not is_cross_attention
        hidden_size = getattr(config, f"{side}_hidden_size")
        self.num_heads = getattr(config, f"{side}_num_attention_heads")
        self.num_key_value_heads = getattr(config, f"{side}_num_key_value_heads")
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.window = config.encoder_attention_window if side == "encoder" else None

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

    def silence_factor(self) -> torch.Tensor:
        """z of a silent key, shape `(1,)`, float32."""
        return nn.functional.softplus(self.silence_logit.float()).clamp(*self.config.silence_scale_range)

    def project(self, projection: nn.Linear, states: torch.Tensor, channels: int) -> torch.Tensor:
        """`(B, S, E)` to `(B, heads, S, channels)`."""
        return projection(states).view(*states.shape[:2], -1, channels).transpose(1, 2)

    def append_pitch(
        self, query: torch.Tensor, key: torch.Tensor, f: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends the two channels of the gaussian bias. f: `(B, S)`, standardised F0, float32."""
        f = f[:, None]  # (B, 1, S)
        # The kernel multiplies every channel by the scaling; the bias stands outside it.
        strength = self.bias_strength.float()[None, :, None, None] / self.scaling  # (1, H, 1, 1)
        query_pitch = strength * torch.stack((2 * f, -torch.ones_like(f)), dim=-1)  # (B, H, S, 2)
        key_pitch = torch.stack((f, f * f), dim=-1).expand(-1, key.shape[1], -1, -1)  # (B, K, S, 2)
        return torch.cat((query, query_pitch.to(query.dtype)), -1), torch.cat((key, key_pitch.to(key.dtype)), -1)

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
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, L, E)`): queries, and keys and values in self-attention.
            attention_mask: as the chosen attention wants it; made by the library's mask functions, or [`window_mask`].
            cos, sin (`torch.Tensor` of shape `(B or 1, 1, L, C)`, *optional*): of [`EchoRotaryEmbedding`]; not in
                cross-attention. Apart, since checkpointing follows gradients (the radius may learn) only into tensors.
            silence (`torch.Tensor` of shape `(B, S)`, *optional*): which keys are silent.
            standardized_f0 (`torch.Tensor` of shape `(B, S)`, *optional*): for the gaussian bias.
            position_bias (`torch.Tensor` of shape `(B, 1, S, S)`, *optional*): the laplacian bias; within windows
                `(B * N, 1, w, 3 * w)`.
            key_value_states (`torch.Tensor` of shape `(B, S, E)`, *optional*): the encoder's, in cross-attention.
            past_key_values (`EncoderDecoderCache`, *optional*): keys and values of past tokens.

        Returns:
            `(B, L, E)` and the weights `(B, H, L, S)` where the chosen attention gives them; within windows, of frames
            more than a window long, `(B * N, H, w, 3 * w)`.
        """
        query = self.project(self.q_proj, hidden_states, self.content_dim)
        is_cross_attention = key_value_states is not None
        cached = False
        if past_key_values is not None:
            cached = is_cross_attention and past_key_values.is_updated.get(self.layer_idx)
            if is_cross_attention:
                past_key_values.is_updated[self.layer_idx] = True
                past_key_values = past_key_values.cross_attention_cache
            else:
                past_key_values = past_key_values.self_attention_cache

        if cached:
            key = past_key_values.layers[self.layer_idx].keys
            value = past_key_values.layers[self.layer_idx].values
        else:
            states = key_value_states if is_cross_attention else hidden_states
            key = self.project(self.k_proj, states, self.content_dim)
            value = self.project(self.v_proj, states, self.head_dim)

        if cos is not None:
            cos, sin = cos[..., : self.content_dim // 2], sin[..., : self.content_dim // 2]
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if silence is not None and not cached:
            factor = torch.where(silence, self.silence_factor(), 1.0)
            key = key * factor[:, None, :, None].to(key.dtype)
        if standardized_f0 is not None:
            query, key = self.append_pitch(query, key, standardized_f0)
        if past_key_values is not None and not cached:
            key, value = past_key_values.update(key, value, self.layer_idx)

        if window := effective_window(self.window, query.shape[2]):
            query = to_blocks(query, window)
            key, value = to_surroundings(key, window), to_surroundings(value, window)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
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
        if window:
            output = output.reshape(hidden_states.shape[0], -1, *output.shape[2:])[:, : hidden_states.shape[1]]
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1)), weights


class EchoPitchProjection(nn.Module):
    """A linear map of pitch without bias, `(..., pitch_channels)` to `(..., size)`, that starts at 0, so that what it
    is added to starts as if it were not there. No `nn.Linear`: quantisation takes those, and fails at one column."""

    def __init__(self, pitch_channels: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, pitch_channels))

    def forward(self, pitch: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(pitch.to(self.weight.dtype), self.weight)


class EchoOutputHead(nn.Linear):
    """A linear map to scores of tokens. It starts small, so that at first every token is as likely."""


class EchoGatedMLP(nn.Module):
    """Gated feed-forward, `down(act(gate(x) + pitch_gate(pitch)) * up(x))` (https://huggingface.co/papers/2002.05202).

    The pitch's part, "a pitch-aware filter", starts at 0.
    """

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
    """Pre-norm self-attention and gated feed-forward over frames; before them, with `encoder_kernel_size`, a
    convolution over neighbouring frames, which starts as if it were not there."""

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
        attended, _ = self.self_attn(
            self.self_attn_norm(hidden_states),
            attention_mask,
            cos,
            sin,
            silence,
            standardized_f0,
            position_bias,
            **kwargs,
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.self_attn_norm(hidden_states),
            attention_mask,
            cos,
            sin,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attended)
        if encoder_hidden_states is not None:
            attended, _ = self.encoder_attn(
                self.encoder_attn_norm(hidden_states),
                encoder_attention_mask,
                silence=encoder_silence,
                key_value_states=encoder_hidden_states,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class EchoPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what the library asks to know of an Echo model."""

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
    def from_pretrained(cls, *args, use_safetensors: bool | None = True, **kwargs):
        """As in the library, but only from safetensors: a pickle (`pytorch_model.bin`) could hold code, and is loaded
        with `use_safetensors=False` alone."""
        return super().from_pretrained(*args, use_safetensors=use_safetensors, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Where every parameter starts:

        Linear, Conv1d        normal with standard deviation 1 / sqrt(inputs), so that small models pass signals on
                              as large ones do; biases 0
        Embedding             normal with standard deviation `initializer_range`; so is the output head
        RMSNorm               1
        EchoRotaryEmbedding   log_theta 0 (theta as configured), gain 0 (radius 1)
        EchoAttention         bias_strength 0 (no bias), silence_logit in the middle of its range
        EchoPitchProjection   weight 0; so is EchoZeroLinear
        EchoEncoder           blend -2: a further channel group starts with an eighth of the say
        """
        super()._init_weights(module)
        if isinstance(module, EchoPitchProjection | EchoZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv1d) and not isinstance(module, EchoOutputHead):
            init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, EchoRotaryEmbedding):
            for name in ("log_theta", "gain"):
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
        else:  # an encoder takes no tokens, and a head behind it may write them
            multiple = pad_to_multiple_of or 1
            size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
            size = self.config.vocab_size = math.ceil(size / multiple) * multiple
        # What else has a row, or a column, for each token.
        for module in list(self.modules()):
            for name, transposed in (("ctc_head", False), ("intermediate_head", False), ("self_conditioning", True)):
                head = getattr(module, name, None)
                if head is not None and head.weight.shape[transposed] != size:
                    head = self._get_resized_lm_head(head, size, transposed=transposed, mean_resizing=mean_resizing)
                    setattr(module, name, head)
        return embeddings

    def _drops_layer(self, probability: float) -> bool:
        """Whether this batch passes over the next layer: LayerDrop (https://huggingface.co/papers/1909.11556)."""
        return self.training and probability > 0 and torch.rand(()).item() < probability

    def _get_feat_extract_output_lengths(self, input_lengths: torch.Tensor) -> torch.Tensor:
        """Encoder frames of that many input frames: `ceil(T / stride)`, stride after stride."""
        for stride in self.config.stem_strides:
            input_lengths = (input_lengths + stride - 1) // stride
        return input_lengths


class EchoEncoder(EchoPreTrainedModel):
    """Stems, the pitch that goes with them, and a deep stack of [`EchoEncoderLayer`]."""

    _can_record_outputs = {"hidden_states": EchoEncoderLayer, "attentions": EchoAttention}

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.group_widths = list(config.feature_groups.values())
        stem_channels = {
            name: {"pitch": PITCH_CHANNELS, "phase": 2}.get(name, width)
            for name, width in config.feature_groups.items()
            if name != "pitch" or config.pitch_stem
        }
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

    def _spec_augment(self, spectrogram: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Sets random spans of time and of mel channels to 0, the floor (https://huggingface.co/papers/1904.08779)."""
        from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

        batch, frames, bins = spectrogram.shape
        config = self.config
        if config.mask_time_prob > 0:
            mask = _compute_mask_indices(
                (batch, frames),
                mask_prob=config.mask_time_prob,
                mask_length=min(config.mask_time_length, frames),
                attention_mask=attention_mask,
                min_masks=config.mask_time_min_masks,
            )
            spectrogram = spectrogram.masked_fill(torch.from_numpy(mask).to(spectrogram.device)[..., None], 0.0)
        if config.mask_feature_prob > 0:
            mask = _compute_mask_indices(
                (batch, bins),
                mask_prob=config.mask_feature_prob,
                mask_length=min(config.mask_feature_length, bins),
                min_masks=config.mask_feature_min_masks,
            )
            spectrogram = spectrogram.masked_fill(torch.from_numpy(mask).to(spectrogram.device)[:, None], 0.0)
        return spectrogram

    def _silence(self, spectrogram: torch.Tensor, attention_mask: torch.Tensor, encoder_frames: int) -> torch.Tensor:
        """Encoder frames all of whose input frames are silent, `(B, S)`, bool."""
        loudness = spectrogram.amax(-1) * attention_mask  # (B, T)
        stride = math.prod(self.config.stem_strides)
        loudness = nn.functional.pad(loudness, (0, encoder_frames * stride - loudness.shape[1]))
        return loudness.view(-1, encoder_frames, stride).amax(-1) <= self.config.silence_threshold

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
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real frames, 0 for padding, which must
                be on the right.

        Returns:
            [`EchoEncoderOutput`] with `last_hidden_state` of shape `(B, S, E)`.

        Raises:
            `ValueError`: the shapes do not fit the config.
        """
        self._check_inputs(input_features, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones(input_features.shape[:2], device=input_features.device, dtype=torch.long)
        attention_mask = attention_mask.long()  # `torch.ones` are floats, whose sum is no place to look at
        config = self.config
        groups = dict(zip(config.feature_groups, input_features.split(self.group_widths, dim=-1)))
        lengths = attention_mask.sum(-1)  # (B,)
        encoder_lengths = self._get_feat_extract_output_lengths(lengths)
        encoder_frames = self._get_feat_extract_output_lengths(input_features.shape[1])
        frames = torch.arange(encoder_frames, device=input_features.device)[None]  # (1, S)
        encoder_mask = mask_frames(encoder_lengths, encoder_frames).to(attention_mask.dtype)  # (B, S)

        # F0 stays in float32 whatever the model's dtype: bfloat16 keeps only 8 bits of it.
        frame_f0 = (
            groups["pitch"][..., 0].float() if "pitch" in groups else input_features.new_zeros(input_features.shape[:2])
        )
        frame_f0 = frame_f0 * attention_mask
        f0 = align_f0(frame_f0, lengths, encoder_lengths, encoder_frames)  # (B, S)
        pitch = normalize_f0(f0, encoder_mask)  # (B, S, 3)
        spectrogram = groups["spectrogram"]
        silence = self._silence(spectrogram, attention_mask, encoder_frames) if config.silence_scaling else None
        token_pitch = None
        if config.token_pitch != "none":
            frames_per_token = 1.0 / (config.tokens_per_second * config.frame_seconds)
            token_pitch = pitch_per_token(frame_f0, lengths, frames_per_token, config.token_pitch)

        if self.training and config.apply_spec_augment:
            groups["spectrogram"] = self._spec_augment(spectrogram, attention_mask)
        if "phase" in groups:
            groups["phase"] = torch.cat((groups["phase"].cos(), groups["phase"].sin()), dim=-1)
        if config.pitch_stem:
            groups["pitch"] = normalize_f0(frame_f0, attention_mask)
        hidden_states = None
        for i, (name, stem) in enumerate(self.stems.items()):
            stemmed = stem(groups[name].to(stem.convolutions[0].weight.dtype), attention_mask)
            hidden_states = stemmed if i == 0 else torch.lerp(hidden_states, stemmed, self.blend[i - 1].sigmoid())
        for layer in self.stem_layers:
            hidden_states = layer(hidden_states, encoder_mask)
        hidden_states = self.dropout(hidden_states)

        cos, sin = self.rotary_emb(frames, hidden_states.dtype, f0, pitch, encoder_mask)
        window = effective_window(config.encoder_attention_window, encoder_frames)
        standardized_f0 = position_bias = None
        if config.pitch_bias == "gaussian":
            standardized_f0 = standardize_f0(f0, encoder_mask)
        elif config.pitch_bias == "laplacian":
            ours = theirs = standardize_f0(f0, encoder_mask)[:, None, :, None]  # (B, 1, S, 1)
            if window:
                ours, theirs = to_blocks(ours, window), to_surroundings(theirs, window)
            position_bias = torch.exp(-(ours - theirs.transpose(2, 3)).abs())  # (B, 1, S, S) or (B * N, 1, w, 3 * w)
        if window:
            mask = window_mask(encoder_mask, window)
            if config._attn_implementation == "eager":
                lowest = torch.finfo(hidden_states.dtype).min
                mask = torch.zeros_like(mask, dtype=hidden_states.dtype).masked_fill(~mask, lowest)
        else:
            mask = create_bidirectional_mask(config=config, inputs_embeds=hidden_states, attention_mask=encoder_mask)

        intermediate_logits = []
        shared = (mask, cos, sin, silence, standardized_f0, position_bias, pitch, encoder_mask)
        for number, layer in enumerate(self.layers, 1):
            if not self._drops_layer(config.encoder_layerdrop):
                hidden_states = layer(hidden_states, *shared, **kwargs)
            if config.self_conditioning_layers and number in config.self_conditioning_layers:
                logits = self.intermediate_head(self.norm(hidden_states))
                hidden_states = hidden_states + self.self_conditioning(logits.softmax(-1))
                intermediate_logits.append(logits)
        return EchoEncoderOutput(
            last_hidden_state=self.norm(hidden_states),
            attention_mask=encoder_mask,
            f0=f0,
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
        """The pitch that accompanies each token, `(B, L, E)`. The token at position p was spoken in span p - 1; the
        first, begin of sequence, repeats the first span's pitch; beyond the audio's end there is none."""
        span = (position_ids - 1).clamp(min=0).expand(token_pitch.shape[0], -1)
        inside = span < token_pitch.shape[1]
        pitch = token_pitch.gather(1, span.clamp(max=token_pitch.shape[1] - 1)) * inside
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
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): tokens; or `inputs_embeds`, `(B, L, E)`.
            attention_mask (`torch.Tensor` of shape `(B, past + L)`, *optional*): 1 for real tokens.
            encoder_hidden_states (`torch.Tensor` of shape `(B, S, E)`, *optional*): the encoder's frames.
            encoder_attention_mask, encoder_silence (`torch.Tensor` of shape `(B, S)`, *optional*): the encoder's.
            token_pitch (`torch.Tensor` of shape `(B, N)`, *optional*): the encoder's.
            past_key_values (`EncoderDecoderCache`, *optional*): keys and values of past tokens.
            position_ids (`torch.LongTensor` of shape `(B or 1, L)`, *optional*): positions; counted on when not given.

        Returns:
            `BaseModelOutputWithPastAndCrossAttentions` with `last_hidden_state` of shape `(B, L, E)`.

        Raises:
            `ValueError`: both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if past_key_values is None:
            past_key_values = kwargs.pop("cache", None)  # its name from Transformers 5.24 on
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
            if self._drops_layer(self.config.decoder_layerdrop):
                continue
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
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class EchoModel(EchoPreTrainedModel):
    """Encoder and decoder without a head."""

    _auto_class = "AutoModel"

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.encoder = EchoEncoder(config)
        self.decoder = EchoDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        self.decoder.embed_tokens = value

    def freeze_encoder(self):
        """Stops the encoder from learning; its weights keep their values in training."""
        self.encoder.requires_grad_(False)

    def get_encoder_mask(self, encoder_outputs, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Which of the encoder's frames are real, `(B, S)`: as the encoder tells; or, for states of another making, by
        the mask of the input frames that they came from, `(B, T)`. `None` if nothing tells."""
        encoder_mask = getattr(encoder_outputs, "attention_mask", None)
        if encoder_mask is not None or attention_mask is None:
            return encoder_mask
        lengths = self._get_feat_extract_output_lengths(attention_mask.sum(-1))
        return mask_frames(lengths, encoder_outputs[0].shape[1]).to(attention_mask.dtype)

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
            encoder_outputs (`EchoEncoderOutput`, *optional*): in place of `input_features`.

        Returns:
            `Seq2SeqModelOutput` with `last_hidden_state` of shape `(B, L, E)`.

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
        if past_key_values is None:
            past_key_values = kwargs.pop("cache", None)  # its name from Transformers 5.24 on
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
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_hidden_states,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


def ignore_padding(labels: torch.Tensor, config: EchoConfig) -> torch.Tensor:
    """Labels with pad tokens, like -100, left out of every loss."""
    return labels.masked_fill(labels == config.pad_token_id, -100)


def ctc_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    encoder_mask: torch.Tensor,
    config: EchoConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    intermediate_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """CTC loss a token (Graves et al., https://doi.org/10.1145/1143844.1143891), the pad token as blank; 30% of it are
    that of intermediate predictions, where there are any (Lee and Watanabe, https://huggingface.co/papers/2102.03216).

    Args:
        logits (`torch.Tensor` of shape `(B, S, vocab_size)`)
        labels (`torch.LongTensor` of shape `(B, L)`): -100 is ignored, and so are begin and end of sequence, no sounds.
        encoder_mask (`torch.Tensor` of shape `(B, S)`): 1 for real frames.
        num_items_in_batch (*optional*): number of label tokens to divide the sum by, with gradient accumulation; those
            that are not -100, if not given.
        intermediate_logits (`torch.Tensor` of shape `(B, N, S, vocab_size)`, *optional*): of [`EchoEncoderOutput`]; the
            mean of their N losses counts.

    Returns:
        `torch.Tensor` of shape `()`. An utterance with too few frames for its labels counts 0.
    """
    if num_items_in_batch is None:  # counted as the Trainer does
        num_items_in_batch = (labels != -100).sum().clamp(min=1)
    for token in (config.bos_token_id, *config.ends_of_sequence):
        if token is not None:
            labels = labels.masked_fill(labels == token, -100)
    settings = {"blank_token_id": config.pad_token_id, "reduction": "sum", "zero_infinity": True}
    total = ForCTCLoss(logits, labels, encoder_mask.sum(-1), **settings)
    if intermediate_logits is not None:
        number = intermediate_logits.shape[1]
        labels, lengths = labels.repeat_interleave(number, 0), encoder_mask.sum(-1).repeat_interleave(number)
        between = ForCTCLoss(intermediate_logits.flatten(0, 1), labels, lengths, **settings) / number
        total = torch.lerp(total, between, INTERMEDIATE_WEIGHT)
    return _divide(total, num_items_in_batch)


def _divide(total: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    # The Trainer's number need not be on the device of the logits, and replicas of `DataParallel` know of none.
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


def shift_tokens_right(labels: torch.Tensor, config: EchoConfig) -> torch.Tensor:
    """Decoder inputs for the labels: one step later, begun with `decoder_start_token_id`, -100 as padding."""
    shifted = labels.new_full(labels.shape, config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == -100, config.pad_token_id)


class EchoForConditionalGeneration(EchoPreTrainedModel, GenerationMixin):
    """Echo with a language-model head, tied to the token embeddings, and with `ctc_loss_weight` a CTC head."""

    _auto_class = "AutoModelForSpeechSeq2Seq"
    _tied_weights_keys = {"proj_out.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.model = EchoModel(config)
        self.proj_out = EchoOutputHead(config.decoder_hidden_size, config.vocab_size, bias=False)
        self.ctc_head = None
        if config.ctc_loss_weight > 0:
            self.ctc_head = EchoOutputHead(config.encoder_hidden_size, config.vocab_size)
        # Left alone, generate() would stop at 20 tokens.
        self.generation_config.max_length = config.max_target_positions
        self.generation_config.ctc_weight = DEFAULT_CTC_WEIGHT if self.ctc_head is not None else 0.0
        # Else the library takes it for a copy of the model's config, and loses the weight when it is saved and loaded.
        self.generation_config._from_model_config = False
        self.post_init()

    def adjust_generation_fn(self, *args, **kwargs):
        made = self.generation_config
        super().adjust_generation_fn(*args, **kwargs)
        if self.generation_config._from_model_config:  # the checkpoint has none, such as that of an EchoForCTC
            self.generation_config = made

    def get_output_embeddings(self) -> nn.Module:
        return self.proj_out

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.proj_out = new_embeddings

    def freeze_encoder(self):
        """Stops the encoder from learning; its weights keep their values in training."""
        self.model.freeze_encoder()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Decoder inputs for labels `(B, L)`, for collators that ask the model for them."""
        return shift_tokens_right(labels, self.config)

    def _prepare_generation_config(self, generation_config, **kwargs):
        # Here, since a setting that stands in the model's own, as scripts for Whisper put it there, would be taken for
        # known later, and do nothing.
        given = {name: kwargs.pop(name) for name in WHISPER_OPTIONS if name in kwargs}
        foreign = [name for name, value in given.items() if value is not None and value is not False]
        if foreign:
            raise ValueError(
                f"generate() of Echo takes no {', '.join(foreign)}: it writes the language that it hears, as it was"
                " trained to. Leave them out. Times come from the pipeline: return_timestamps=True, or 'word'."
            )
        # Only what the model's own settings hold may be given to generate(), and those of another making lack it. Those
        # of a checkpoint that is loaded without its CTC head have a weight, which then is nobody's wish.
        if self.ctc_head is None:
            self.generation_config.ctc_weight = 0.0
        elif getattr(self.generation_config, "ctc_weight", None) is None:
            self.generation_config.ctc_weight = DEFAULT_CTC_WEIGHT
        return super()._prepare_generation_config(generation_config, **kwargs)

    def _prepare_generated_length(self, generation_config, *args, inputs_tensor=None, **kwargs):
        if inputs_tensor is not None and inputs_tensor.ndim == 3:  # features; without, the encoder has heard them
            seconds = inputs_tensor.shape[1] * self.config.frame_seconds
            if seconds > LONG_AUDIO:
                logger.warning_once(
                    f"generate() hears all {seconds:.0f} s of audio at once and stops at {generation_config.max_length}"
                    " tokens, if not told otherwise. The pipeline, or `echo-hf transcribe`, cuts long audio at pauses."
                )
        return super()._prepare_generated_length(generation_config, *args, inputs_tensor=inputs_tensor, **kwargs)

    def _get_logits_processor(self, generation_config, *args, model_kwargs=None, **kwargs):
        """Adds joint decoding with CTC, if `generation_config.ctc_weight` is above 0."""
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        weight = generation_config.ctc_weight
        if not weight or generation_config.is_assistant:  # what an assistant drafts is scored by the model it assists
            return processors
        if self.ctc_head is None:
            raise ValueError(
                f"ctc_weight is {weight}, and this model has no CTC head (its ctc_loss_weight is 0). Leave it out."
            )
        logits, mask = self._score_frames(model_kwargs["encoder_outputs"], model_kwargs.get("attention_mask"))
        ends = generation_config._eos_token_tensor
        if ends is None:  # whoever wants no end: none is scored
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
        # First of all: what others rule out must stay so.
        processors.insert(0, joint)
        return processors

    def _score_frames(
        self, encoder_outputs: EchoEncoderOutput | tuple, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the CTC head, `(B, S, vocab_size)`, and the mask of the encoder's frames, `(B, S)`; without any
        mask all frames are real."""
        logits = self.ctc_head(encoder_outputs[0])
        mask = self.model.get_encoder_mask(encoder_outputs, attention_mask)
        if mask is None:
            mask = torch.ones(logits.shape[:2], device=logits.device, dtype=torch.long)
        return logits, mask

    def _cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Cross-entropy a token. `logits[:, t]` predicts `labels[:, t]`: the shift is in the decoder's inputs."""
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels.to(logits.device).flatten(),
            ignore_index=-100,
            reduction="mean" if num_items_in_batch is None else "sum",
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )
        return loss if num_items_in_batch is None else _divide(loss, num_items_in_batch)

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
            input_features (`torch.Tensor` of shape `(B, T, channels)`): see [`EchoEncoder.forward`].
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real frames.
            decoder_input_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): made from `labels` when not given.
            decoder_attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for real tokens.
            encoder_outputs ([`EchoEncoderOutput`] or `tuple`, *optional*): the encoder's, in place of `input_features`.
            past_key_values (`Cache`, *optional*): keys and values of the tokens before these.
            decoder_inputs_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): in place of `decoder_input_ids`.
            decoder_position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): places of the tokens in the text.
            use_cache (`bool`, *optional*): whether `past_key_values` are returned; the config's if not given, and not
                with labels.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): tokens with the end of sequence and without its
                begin, at most `max_target_positions`; -100 and pad are ignored.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): label tokens that the sums of the losses are
                divided by; those of `labels` if not given.

        Raises:
            `ValueError`: there is nothing to decode, the labels are too long, or the shapes do not fit the config.

        Returns:
            [`EchoSeq2SeqLMOutput`] with `logits` of shape `(B, L, vocab_size)`. With labels, `loss` is
            `(1 - w) * ce_loss + w * ctc_loss`, `w = ctc_loss_weight`.

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
        if past_key_values is None:
            past_key_values = kwargs.pop("cache", None)  # its name from Transformers 5.24 on
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None:
            if labels.shape[1] > self.config.max_target_positions:
                raise ValueError(
                    f"Labels of {labels.shape[1]} tokens are longer than max_target_positions,"
                    f" {self.config.max_target_positions}, at which generate() stops. Leave long utterances out, or"
                    " raise max_target_positions."
                )
            if use_cache is None:
                use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = shift_tokens_right(labels, self.config)
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
        logits = self.proj_out(outputs.last_hidden_state)

        result = EchoSeq2SeqLMOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )
        if labels is not None:
            labels = ignore_padding(labels, self.config)
            result.ce_loss = result.loss = self._cross_entropy(logits, labels, num_items_in_batch)
            if self.ctc_head is not None:
                result.ctc_logits, encoder_mask = self._score_frames(encoder_outputs, attention_mask)
                intermediate_logits = getattr(encoder_outputs, "intermediate_logits", None)
                result.ctc_loss = ctc_loss(
                    result.ctc_logits, labels, encoder_mask, self.config, num_items_in_batch, intermediate_logits
                )
                result.loss = torch.lerp(result.ce_loss, result.ctc_loss, self.config.ctc_loss_weight)
        return result


def mean_cross_attention(
    model: EchoForConditionalGeneration, decoder_input_ids: torch.LongTensor, **heard
) -> torch.Tensor:
    """Where the decoder looked as it predicted each next token: the mean of all heads and layers.

    Args:
        model ([`EchoForConditionalGeneration`]): attends eagerly meanwhile, as other attentions do not tell their
            weights.
        decoder_input_ids (`torch.LongTensor` of shape `(B, L)`): tokens, the first `decoder_start_token_id`.
        heard: `input_features` or `encoder_outputs`, and `attention_mask`, as the model takes them.

    Returns:
        `torch.Tensor` of shape `(B, L, S)`, float32.
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        outputs = model(decoder_input_ids=decoder_input_ids, use_cache=False, output_attentions=True, **heard)
    finally:
        model.set_attn_implementation(implementation)
    return torch.stack(outputs.cross_attentions).float().mean(dim=(0, 2))


class EchoForCTC(EchoPreTrainedModel):
    """The encoder of Echo with the CTC head alone. Loads from, and into, the same checkpoints as
    [`EchoForConditionalGeneration`] with `ctc_loss_weight > 0`; it leaves the decoder's weights aside."""

    _auto_class = "AutoModelForCTC"
    _keys_to_ignore_on_load_unexpected = [r"model\.decoder\.", r"proj_out\."]

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        # A dictionary of one, so that the weights have the names they have in EchoForConditionalGeneration.
        self.model = nn.ModuleDict({"encoder": EchoEncoder(config)})
        self.ctc_head = EchoOutputHead(config.encoder_hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model["encoder"].get_input_embeddings()

    def freeze_encoder(self):
        """Stops the encoder from learning; its weights keep their values in training."""
        self.model["encoder"].requires_grad_(False)

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
            input_features (`torch.Tensor` of shape `(B, T, channels)`): see [`EchoEncoder.forward`].
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 for real frames.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): tokens; -100, pad, begin and end of sequence are
                ignored.

        Returns:
            `CausalLMOutput` with `logits` of shape `(B, S, vocab_size)`; `pad_token_id` is the blank. Frames of padding
            predict the blank.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs = self.model["encoder"](input_features, attention_mask=attention_mask, **kwargs)
        logits = self.ctc_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            labels = ignore_padding(labels, self.config)
            loss = ctc_loss(
                logits, labels, outputs.attention_mask, self.config, num_items_in_batch, outputs.intermediate_logits
            )
        # Whoever takes the argmax, as the pipeline does, must not read words out of padding.
        blank = torch.zeros_like(logits[0, 0])
        blank[self.config.pad_token_id] = 1.0
        logits = torch.where(outputs.attention_mask[..., None] > 0, logits, blank)
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "EchoEncoder",
    "EchoDecoder",
    "EchoModel",
    "EchoForConditionalGeneration",
    "EchoForCTC",
    "EchoPreTrainedModel",
]

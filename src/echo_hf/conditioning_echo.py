"""How F0 and silence enter the model: each mechanism is a function or a small module with its equation.

    forms of F0          align_f0, standardize_f0, pitch_per_token, those of normalization_echo; together in EchoPitch
    theta and radius     EchoRotaryEmbedding, rotate
    bias                 laplacian_bias, gaussian_bias_channels
    gate, token pitch    EchoPitchProjection
    silence              find_silence

`modeling_echo.py` has the layers that read them and the names of the dimensions. `f0` is in Hz, 0 where unvoiced;
`pitch` is normalized.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from .configuration_echo import EchoConfig
from .normalization_echo import masked_mean

MEL_THETA = 220.0  # theta at which the mel frequencies have their nominal values
MEL_UNIT = 1000.0  # Hz

SPREAD_FLOOR = 1e-3  # Hz; a smaller deviation is rounding

TOKEN_PITCH_MIN, TOKEN_PITCH_LOW, TOKEN_PITCH_HIGH = 100.0, 71.0, 500.0  # Hz, as published


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def mask_frames(lengths: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Boolean mask `(B, num_frames)` of the first `lengths` frames, `(B,)`."""
    return torch.arange(num_frames, device=lengths.device)[None] < lengths[:, None]


def align_f0(
    f0: torch.Tensor, lengths: torch.Tensor, encoder_lengths: torch.Tensor, encoder_frames: int
) -> torch.Tensor:
    """F0, `(B, T)` in Hz, at the encoder's frames, `(B, encoder_frames)`, by nearest index; 0 in padding.

    `index_i = min(floor(i * F / S), F - 1)` with the utterance's own numbers of real frames, `lengths` F and
    `encoder_lengths` S, each `(B,)`, so that padding changes nothing."""
    frames = torch.arange(encoder_frames, device=f0.device)[None]
    index = frames * lengths[:, None] // encoder_lengths[:, None].clamp(min=1)
    index = torch.minimum(index, lengths[:, None] - 1).clamp(min=0)
    return f0.gather(1, index) * (frames < encoder_lengths[:, None])


def standardize_f0(f0: torch.Tensor, mask: torch.Tensor, correction: int = 0) -> torch.Tensor:
    """F0 for the pitch bias, `(B, S)` in Hz: `(f0 - mean) / max(std, 0.001)` over the real frames, unvoiced ones (0 Hz)
    included; float32, 0 in padding. `correction` is subtracted from the number of frames in the variance: 0, or 1 as
    published.

    The floor replaces the published `std + 1e-8`, which scales rounding up where all frames are alike."""
    mask = mask.float()
    deviation = (f0.float() - masked_mean(f0.float(), mask)) * mask
    variance = deviation.square().sum(-1, keepdim=True) / (mask.sum(-1, keepdim=True) - correction).clamp(min=1)
    return deviation / variance.sqrt().clamp(min=SPREAD_FLOOR)


def pitch_per_token(f0: torch.Tensor, lengths: torch.Tensor, frames_per_token: float) -> torch.Tensor:
    """Pitch of each span of a fixed token rate, for the decoder: `(B, N)`, `N = ceil(T / R)`, float32.

    Token i covers the frames k with `i * R <= k <= (i + 1) * R`, at least one, with R `frames_per_token`. Its F0 is
    their mean; below 100 Hz and beyond an utterance's end it becomes 0,
    else `(f0 - 71) / (500 - 71)`.

    Args:
        f0 (`torch.Tensor` of shape `(B, T)`): Hz.
        lengths (`torch.Tensor` of shape `(B,)`): real input frames.
    """
    tokens = torch.arange(math.ceil(f0.shape[1] / frames_per_token), device=f0.device, dtype=torch.float32)
    last_frame = (lengths[:, None] - 1).clamp(min=0)  # (B, 1)
    start = torch.minimum((tokens * frames_per_token).ceil().long()[None], last_frame)  # (B, N)
    end = torch.minimum(((tokens + 1) * frames_per_token).floor().long()[None], last_frame)
    end = torch.maximum(end, start)
    # Every span has W places, as many as the longest needs; places behind its end repeat its last frame.
    place = start[..., None] + torch.arange(math.floor(frames_per_token) + 2, device=f0.device)  # (B, N, W)
    inside = place <= end[..., None]
    place = torch.minimum(place, end[..., None])
    spans = f0.float().gather(1, place.flatten(1)).view_as(place)
    value = masked_mean(spans, inside).squeeze(-1)
    heard = (value >= TOKEN_PITCH_MIN) & (tokens[None] * frames_per_token < lengths[:, None])
    return torch.where(heard, (value - TOKEN_PITCH_LOW) / (TOKEN_PITCH_HIGH - TOKEN_PITCH_LOW), 0.0)


def find_silence(
    spectrogram: torch.Tensor, attention_mask: torch.Tensor, encoder_frames: int, stride: int, threshold: float
) -> torch.Tensor:
    """Which encoder frames are silent, `(B, encoder_frames)`: no mel channel of their `stride` input frames is above
    the threshold. The spectrogram is `(B, T, bins)`, log-mel, with its mask `(B, T)`."""
    loudness = spectrogram.amax(-1) * attention_mask  # (B, T)
    loudness = nn.functional.pad(loudness, (0, encoder_frames * stride - loudness.shape[1]))
    return loudness.view(-1, encoder_frames, stride).amax(-1) <= threshold


class EchoPitch(NamedTuple):
    """F0 of a batch, in the forms that the mechanisms read."""

    frame_f0: torch.Tensor  # (B, T), Hz at the input frames, 0 = unvoiced or padding, float32
    mean_f0: torch.Tensor  # (B, 1), Hz, mean of the real input frames, unvoiced ones included
    f0: torch.Tensor  # (B, S), Hz at the encoder's frames
    normalized: torch.Tensor  # (B, S, 3), see normalize_f0
    frame_voicing: torch.Tensor | None = None  # (B, T), voicing at the input frames


class EchoRotaryEmbedding(nn.Module):
    r"""Cosines and sines of the rotary angles, times the radius.

    Frequencies of channel pair c of `C = d / 2`, in rad a frame:

        standard   omega_c = theta ** (-2c / d)                              (https://huggingface.co/papers/2104.09864)
        mel        omega_c = theta / 220 * m_c,   m_c = K * (10 ** (x_c / 2595) - 1) / 1000,
                   x_c evenly spaced from 0 to 2595 * log10(1 + M / K)

    How F0 moves theta, and the angle of frame t:

        none       theta_t = theta                    angle = t * omega_c
        mean       theta_t = theta + mean f0          angle = t * omega_c                      (mean of input frames)
        frame      theta_t = theta + f0_t             angle = t * omega_c(theta_t)             (not relative)
        phase      theta_t = theta + f0_t             angle = sum of omega_c(theta_s), s <= t  (relative)
        contour    theta_t = theta                    angle = sum of omega_c * w_c(s), s <= t  (relative),
                   w_c(s) = 1 + 0.5 * tanh(g_c * contour_s), with learned g_c that start at 0

    The radius multiplies both channels of each pair, in queries and keys:

        unit       1
        sigmoid    sigmoid(f0_t)
        raw        f0_t
        bounded    1 + 0.5 * tanh(gain * contour_t), with a learned gain that starts at 0

    theta is `rotary_theta`, times `exp(log_theta)` with `learn_theta`; `log_theta` starts at 0.

    The published mel frequencies reach 363 rad a frame, too much for float32 at long audio. So angles are computed in
    float64, with omega reduced to [0, 2 pi) first, which changes nothing at integer positions.
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
        if theta_mode == "contour":
            self.contour_gain = nn.Parameter(torch.zeros(head_dim // 2))

    def frequencies(self, theta: torch.Tensor) -> torch.Tensor:
        """omega in rad a frame: `(...)` to `(..., C)`, in theta's dtype."""
        pairs = torch.arange(self.head_dim // 2, device=theta.device, dtype=theta.dtype)
        if self.config.rotary_frequencies == "standard":
            return theta[..., None] ** (-2.0 * pairs / self.head_dim)
        corner, top = self.config.mel_corner_frequency, self.config.mel_max_frequency
        mel = pairs * (math.log10(1.0 + top / corner) / max(self.head_dim // 2 - 1, 1))  # x_c / 2595
        return theta[..., None] / MEL_THETA * (corner * (10.0**mel - 1.0) / MEL_UNIT)

    def theta(self, device: torch.device, f0: torch.Tensor | None, mean_f0: torch.Tensor | None) -> torch.Tensor:
        """Theta of each frame, `(B or 1, S or 1)`."""
        dtype = precise_dtype(device)
        theta = torch.tensor([[self.config.rotary_theta]], device=device, dtype=dtype)  # (1, 1)
        if self.config.learn_theta:
            theta = theta * self.log_theta.to(dtype).exp()
        if self.theta_mode == "mean":
            theta = theta + mean_f0.to(dtype)
        elif self.theta_mode in ("frame", "phase"):
            theta = theta + f0.to(dtype)
        return theta

    def angles(
        self,
        position_ids: torch.Tensor,
        f0: torch.Tensor | None,
        mean_f0: torch.Tensor | None,
        pitch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotary angles in [0, 2 pi), `(B or 1, S, C)`."""
        omega = self.frequencies(self.theta(position_ids.device, f0, mean_f0)) % (2 * math.pi)
        if self.theta_mode == "phase":
            return omega.cumsum(dim=1) % (2 * math.pi)
        angles = position_ids[..., None].to(omega.dtype) * omega
        if self.theta_mode == "contour":  # added to the plain angles, so that gains of 0 leave them exact
            angles = angles + omega * self.warp(pitch.to(omega.dtype)).cumsum(dim=1)
        return angles % (2 * math.pi)

    def warp(self, pitch: torch.Tensor) -> torch.Tensor:
        """By how much of its frequency the contour turns each pair faster, `(B, S, C)`: `0.5 tanh(g_c contour)`."""
        return 0.5 * torch.tanh(self.contour_gain.to(pitch.dtype) * pitch[..., 1:2])

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
        mean_f0: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Radius times cosine and radius times sine, each `(B or 1, 1, S, C)`, at integer positions `(B or 1, S)`.
        `f0`, `pitch` and `mean_f0` are `f0`, `normalized` and `mean_f0` of [`EchoPitch`]."""
        angles = self.angles(position_ids, f0, mean_f0, pitch).float()
        cos, sin = angles.cos(), angles.sin()
        if (radius := self.radius(f0, pitch)) is not None:
            cos, sin = cos * radius, sin * radius
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Multiplies the channel pairs (x0, x1), (x2, x3), ... of `(B, H, S, 2C)`, as complex numbers, by
    `radius * exp(i * angle)`."""
    real, imaginary = states[..., 0::2], states[..., 1::2]
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(-2)


def laplacian_bias(f0: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The published pitch bias, `exp(-|f_i - f_j|)` of the F0 standardized with n - 1: `(B, S)` in Hz and its mask to
    `(B, 1, S, S)`."""
    f = standardize_f0(f0, mask, correction=1)[:, None]
    return torch.exp(-(f[..., :, None] - f[..., None, :]).abs())


def gaussian_bias_channels(f: torch.Tensor, strength: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pitch bias as two channels of queries, `(B, H, S, 2)`, and of keys, `(B, 1, S, 2)`:

        bias_ij = s_h * (2 f_i f_j - f_j ** 2)   =   s_h * (2 f_i, -1) . (f_j, f_j ** 2)

    with f the standardized F0, `(B, S)`, and s the strength of each head, `(H,)`. Softmax ignores terms of the query
    alone, so this equals `-s_h * (f_i - f_j) ** 2`, without a matrix of frames by frames."""
    f = f[:, None]  # (B, 1, S)
    of_queries = strength[None, :, None, None] * torch.stack((2 * f, -torch.ones_like(f)), dim=-1)
    return of_queries, torch.stack((f, f * f), dim=-1)


class EchoPitchProjection(nn.Module):
    """A linear map of pitch, `(..., pitch_channels)` to `(..., size)`, that starts at 0. It is no `nn.Linear`, since
    quantization converts those and fails at one column."""

    def __init__(self, pitch_channels: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, pitch_channels))

    def forward(self, pitch: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(pitch.to(self.weight.dtype), self.weight)

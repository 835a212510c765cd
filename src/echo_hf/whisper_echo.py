"""Pitch for Whisper: a Whisper checkpoint whose encoder is also given F0, and which starts as the Whisper that it was.

Features, decoder, generation, tokenizer and weights are those of Transformers' Whisper, which these classes subclass.
F0 travels as the last row of `input_features`. Five mechanisms carry it into the encoder, each a switch of the config:

    pitch_stem     h_t + conv(pitch)_t                          behind Whisper's convolutions
    pitch_gate     fc2(act(fc1(x)_t + W pitch_t))               the hidden units of each layer's feed-forward
    pitch_radius   q_t and k_t times 1 + 0.5 tanh(g contour_t)  one g a layer
    pitch_theta    q_t and k_t turned by the angle a_(t,c) = sum over s <= t of omega_c tanh(g_c contour_s),
                   omega_c = 10000 ** (-c / C)                  one g_c a layer and pair of channels
    pitch_bias     score_ij + b_h voiced_i voiced_j exp(-(contour_i - contour_j) ** 2 / 2)  one b_h a layer and head

Every weight, gain and strength starts at 0, where each formula adds 0, multiplies by 1 or turns by 0: the outputs are
Whisper's, whatever F0 is. Each is stored as a sixteenth of what is used (`PITCH_SCALE`): an optimizer such as AdamW
moves a parameter by about its learning rate a step, and at the rates that suit Whisper's matrices what starts at 0
would still be near 0 after thousands of steps.

Dimensions: B batch, T frames of features (10 ms), S encoder frames (20 ms), H heads, D head dimension, C = D / 2 pairs
of channels, E hidden size, F hidden units of the feed-forward.
"""

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.configuration_whisper import WhisperConfig
from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import (
    WhisperAttention,
    WhisperEncoder,
    WhisperEncoderLayer,
    WhisperForConditionalGeneration,
    WhisperModel,
    WhisperPreTrainedModel,
    eager_attention_forward,
)
from transformers.models.whisper.processing_whisper import WhisperProcessor

from .normalization_echo import PITCH_CHANNELS, normalize_f0
from .pitch_echo import F0_CEILING, F0_FLOOR, check_tracker, estimate_f0_batch
from .whisper_generation_echo import FRAMES_PER_POSITION, EchoWhisperGenerationMixin
from .whisper_pipeline_echo import EchoWhisperPipeline

PITCH_SCALE = 16.0  # what is used of a pitch parameter, over what is stored
STEM_KERNEL_SIZE = 9  # encoder frames, 180 ms: about a syllable
F0_RANGE = (20.0, 2000.0)  # Hz; what lies beyond counts as the nearest of these, so that no F0 gives an infinite pitch

# What LoRA has to train beside its own matrices: `LoraConfig(..., modules_to_save=PITCH_MODULES)`.
PITCH_MODULES = ["pitch_stem", "pitch_gate", "pitch_attention"]


@strict
class EchoWhisperConfig(WhisperConfig):
    r"""
    The configuration of Whisper, and which mechanisms carry pitch into its encoder.

    Args:
        pitch_stem (`bool`, *optional*, defaults to `True`):
            Whether a convolution of the pitch is added to the encoder's input.
        pitch_gate (`bool`, *optional*, defaults to `True`):
            Whether the hidden units of the encoder's feed-forward see the pitch.
        pitch_radius (`bool`, *optional*, defaults to `True`):
            Whether the pitch contour scales queries and keys of the encoder.
        pitch_theta (`bool`, *optional*, defaults to `False`):
            Whether the pitch contour turns queries and keys of the encoder.
        pitch_bias (`bool`, *optional*, defaults to `False`):
            Whether voiced frames of similar pitch attend more, or less, to each other. It needs a matrix of frames by
            frames for each head, and attention by `"sdpa"` or `"eager"`.
        kwargs: fields of [`WhisperConfig`].
    """

    model_type = "echo_whisper"
    _auto_class = "AutoConfig"

    pitch_stem: bool = True
    pitch_gate: bool = True
    pitch_radius: bool = True
    pitch_theta: bool = False
    pitch_bias: bool = False

    def __post_init__(self, **kwargs):
        # The library runs the pipeline class that lies beside a checkpoint only with `trust_remote_code`, so where this
        # package itself reads the config, which brings the class, it drops the name. `to_dict` puts it back.
        if not __name__.startswith("transformers_modules."):
            kwargs.pop("custom_pipelines", None)
        kwargs["auto_map"] = {
            "AutoConfig": "whisper_echo.EchoWhisperConfig",
            "AutoFeatureExtractor": "whisper_echo.EchoWhisperFeatureExtractor",
            "AutoProcessor": "whisper_echo.EchoWhisperProcessor",
            "AutoModel": "whisper_echo.EchoWhisperModel",
            "AutoModelForSpeechSeq2Seq": "whisper_echo.EchoWhisperForConditionalGeneration",
        }
        super().__post_init__(**kwargs)
        head_dim = self.d_model // self.encoder_attention_heads
        if self.pitch_theta and head_dim % 2:
            raise ValueError(f"pitch_theta turns pairs of channels, and a head has {head_dim}; switch it off.")

    @property
    def num_feature_rows(self) -> int:
        """Rows of `input_features`: the log-mel spectrogram and F0."""
        return self.num_mel_bins + 1

    @property
    def pitch_mechanisms(self) -> list[str]:
        """Names of the switches that are on."""
        return [name for name in EchoWhisperConfig.__annotations__ if getattr(self, name)]

    def to_dict(self) -> dict:
        pipeline = {"impl": "whisper_pipeline_echo.EchoWhisperPipeline", "pt": ["AutoModelForSpeechSeq2Seq"]}
        task = {"automatic-speech-recognition": {**pipeline, "type": "multimodal"}}
        return {**super().to_dict(), "custom_pipelines": task}


class EchoWhisperFeatureExtractor(WhisperFeatureExtractor):
    r"""
    Whisper's features with F0 as one more row: `input_features` of shape `(batch, feature_size + 1, frames)`, F0 in Hz
    last, 0 where the voice is unvoiced and in padding. F0 is tracked before the audio is padded.

    Args:
        f0_method (`str`, *optional*, defaults to `"autocorrelation"`):
            Tracker of F0, a name in `pitch_echo.TRACKERS`; `"dio"` and `"dio_fast"` need pyworld.
        f0_min (`float`, *optional*, defaults to 71.0):
            Lowest F0 in Hz.
        f0_max (`float`, *optional*, defaults to 500.0):
            Highest F0 in Hz.
        kwargs: as of [`WhisperFeatureExtractor`]; `feature_size` is the number of mel bins, without F0.

    Raises:
        `ValueError`: a setting of the tracker cannot work.
    """

    _auto_class = "AutoFeatureExtractor"

    def __init__(
        self, f0_method: str = "autocorrelation", f0_min: float = F0_FLOOR, f0_max: float = F0_CEILING, **kwargs
    ):
        super().__init__(**kwargs)
        check_tracker(f0_method, f0_min, f0_max, self.sampling_rate)
        self.f0_method = f0_method
        self.f0_min = f0_min
        self.f0_max = f0_max

    def __call__(self, raw_speech, *args, **kwargs) -> BatchFeature:
        """
        Args:
            raw_speech: one recording or a list of recordings, each of shape `(samples,)`, as
                [`WhisperFeatureExtractor`] takes them.
            args, kwargs: of [`WhisperFeatureExtractor`].

        Returns:
            [`BatchFeature`] with `input_features`, float32 `(batch, feature_size + 1, frames)`.

        Raises:
            `ValueError`: a recording is not 1-D or not finite, or of another sampling rate.
        """
        features = super().__call__(raw_speech, *args, **kwargs)
        log_mel = features["input_features"]
        longest = log_mel.shape[-1] * self.hop_length  # samples: what the spectrogram holds
        is_one = len(raw_speech) == 0 or np.ndim(raw_speech[0]) == 0
        waveforms = [np.asarray(one, dtype=np.float32)[:longest] for one in ([raw_speech] if is_one else raw_speech)]
        waveforms = [one if one.size else np.zeros(self.hop_length, dtype=np.float32) for one in waveforms]
        settings = (self.sampling_rate, self.hop_length, self.f0_method, self.f0_min, self.f0_max)
        f0 = np.zeros((len(waveforms), 1, log_mel.shape[-1]), dtype=np.float32)
        for row, track in zip(f0, estimate_f0_batch(waveforms, *settings, device=kwargs.get("device") or "cpu")):
            row[0, : len(track)] = track[: row.shape[-1]]
        if isinstance(log_mel, torch.Tensor):
            features["input_features"] = torch.cat((log_mel, torch.from_numpy(f0).to(log_mel)), dim=1)
        else:
            features["input_features"] = np.concatenate((log_mel, f0), axis=1)
        return features


class EchoWhisperProcessor(WhisperProcessor):
    """Joins an [`EchoWhisperFeatureExtractor`] and Whisper's tokenizer; a [`WhisperProcessor`] otherwise."""

    _auto_class = "AutoProcessor"


def split_f0(input_features: torch.Tensor, config: EchoWhisperConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-mel spectrogram `(B, num_mel_bins, T)` and F0 in Hz `(B, T)`, views of `(B, num_mel_bins + 1, T)`.

    Raises:
        `ValueError`: there are more or fewer rows.
    """
    if input_features.ndim != 3 or input_features.shape[1] != config.num_feature_rows:
        raise ValueError(
            f"input_features have shape {tuple(input_features.shape)}, and this model takes (batch,"
            f" {config.num_feature_rows}, frames): {config.num_mel_bins} mel bins, and F0 in Hz as the last row. Make"
            " them with the processor of this checkpoint: AutoProcessor.from_pretrained(checkpoint)."
        )
    return input_features[:, :-1], input_features[:, -1]


def normalize_window(f0: torch.Tensor) -> torch.Tensor:
    """[`normalize_f0`] over the window, of F0 in Hz `(B, S)` to `(B, S, 3)`. What is not finite is unvoiced."""
    f0 = f0.float()
    f0 = torch.where((f0 > 0) & f0.isfinite(), f0.clamp(*F0_RANGE), 0.0)
    return normalize_f0(f0, torch.ones_like(f0))


class EchoWhisperPitchStem(nn.Conv1d):
    """A convolution of pitch over time, `(B, S, 3)` to `(B, S, E)`, that starts at 0."""

    def __init__(self, config: EchoWhisperConfig):
        padding = STEM_KERNEL_SIZE // 2
        super().__init__(PITCH_CHANNELS, config.d_model, STEM_KERNEL_SIZE, padding=padding, bias=False)

    def forward(self, pitch: torch.Tensor) -> torch.Tensor:
        scaled = PITCH_SCALE * pitch.transpose(1, 2)
        return super().forward(scaled.to(self.weight.dtype)).transpose(1, 2)


class EchoWhisperPitchGate(nn.Module):
    """A linear map of pitch, `(B, S, 3)` to `(B, S, F)`, that starts at 0. No `nn.Linear`: quantization and LoRA take
    those, and fail or gain nothing at three columns."""

    def __init__(self, config: EchoWhisperConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.encoder_ffn_dim, PITCH_CHANNELS))

    def forward(self, pitch: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear((PITCH_SCALE * pitch).to(self.weight.dtype), self.weight)


class EchoWhisperPitchAttention(nn.Module):
    """What pitch does to a layer's attention: radius, theta and bias, as far as the config has them."""

    def __init__(self, config: EchoWhisperConfig):
        super().__init__()
        pairs = config.d_model // config.encoder_attention_heads // 2
        self.radius_gain = nn.Parameter(torch.zeros(1)) if config.pitch_radius else None
        self.theta_gain = nn.Parameter(torch.zeros(pairs)) if config.pitch_theta else None
        self.bias_strength = nn.Parameter(torch.zeros(config.encoder_attention_heads)) if config.pitch_bias else None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, pitch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Args:
            query, key (`torch.Tensor` of shape `(B, H, S, D)`): with the scaling in them.
            pitch (`torch.Tensor` of shape `(B, S, 3)`): of [`normalize_f0`].

        Returns:
            Queries and keys `(B, H, S, D)`, and the bias `(B, H, S, S)` that is added to the scores, or None.
        """
        voiced, contour = pitch[..., 0], pitch[..., 1]  # (B, S)
        bias = None
        if self.radius_gain is not None:
            radius = 1.0 + 0.5 * torch.tanh(PITCH_SCALE * self.radius_gain.float() * contour)
            radius = radius[:, None, :, None].to(query.dtype)
            query, key = query * radius, key * radius
        if self.theta_gain is not None:
            gain = PITCH_SCALE * self.theta_gain.float()
            omega = 10000.0 ** (-torch.arange(len(gain), device=gain.device) / len(gain))  # rad a frame
            angle = (omega * torch.tanh(gain * contour[..., None])).cumsum(1)  # (B, S, C)
            cos, sin = angle.cos()[:, None].to(query.dtype), angle.sin()[:, None].to(query.dtype)
            query, key = turn(query, cos, sin), turn(key, cos, sin)
        if self.bias_strength is not None:
            similarity = torch.exp(-0.5 * (contour[:, :, None] - contour[:, None, :]).square())
            similarity = similarity * voiced[:, :, None] * voiced[:, None, :]  # (B, S, S)
            bias = PITCH_SCALE * self.bias_strength.float()[None, :, None, None] * similarity[:, None]
            bias = bias.to(query.dtype)
        return query, key, bias


def turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs of channels (c, c + C) of `(B, H, S, 2 C)` by angles, given as `(B, 1, S, C)` each."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class EchoWhisperAttention(WhisperAttention):
    """Whisper's self-attention in the encoder, with pitch in its queries, keys and scores."""

    def __init__(self, config: EchoWhisperConfig):
        super().__init__(config.d_model, config.encoder_attention_heads, config.attention_dropout, config=config)
        self.pitch_attention = EchoWhisperPitchAttention(config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pitch: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(B, S, E)` and pitch `(B, S, 3)` to `(B, S, E)`, and the weights where the chosen attention gives them."""

        def split_heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2).contiguous()

        query, key, bias = self.pitch_attention(
            split_heads(self.q_proj(hidden_states) * self.scaling), split_heads(self.k_proj(hidden_states)), pitch
        )
        if bias is not None:
            if "flash" in self.config._attn_implementation:
                raise ValueError("pitch_bias needs attn_implementation='sdpa' or 'eager': flash attention takes none.")
            attention_mask = bias if attention_mask is None else attention_mask + bias
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        value = split_heads(self.v_proj(hidden_states))
        dropout = self.dropout if self.training else 0.0
        attended, weights = attention(self, query, key, value, attention_mask, dropout=dropout, scaling=1.0, **kwargs)
        return self.out_proj(attended.flatten(2)), weights


class EchoWhisperEncoderLayer(WhisperEncoderLayer):
    """A layer of Whisper's encoder that is given the pitch; the first adds the pitch stem to its input."""

    def __init__(self, config: EchoWhisperConfig, layer_idx: int):
        super().__init__(config)
        self.pitch_stem = EchoWhisperPitchStem(config) if config.pitch_stem and layer_idx == 0 else None
        self.pitch_gate = EchoWhisperPitchGate(config) if config.pitch_gate else None
        self.attention_sees_pitch = config.pitch_radius or config.pitch_theta or config.pitch_bias
        if self.attention_sees_pitch:
            self.self_attn = EchoWhisperAttention(config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pitch: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        """`(B, S, E)` and pitch `(B, S, 3)` to `(B, S, E)`."""

        def drop(states: torch.Tensor, share: float) -> torch.Tensor:
            return nn.functional.dropout(states, p=share, training=self.training)

        if self.pitch_stem is not None:
            hidden_states = hidden_states + self.pitch_stem(pitch)
        if self.attention_sees_pitch:
            kwargs["pitch"] = pitch
        attended, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + drop(attended, self.dropout)
        inner = self.fc1(self.final_layer_norm(hidden_states))
        if self.pitch_gate is not None:
            inner = inner + self.pitch_gate(pitch)
        inner = drop(self.activation_fn(inner), self.activation_dropout)
        hidden_states = hidden_states + drop(self.fc2(inner), self.dropout)
        if hidden_states.dtype == torch.float16:  # as Whisper: what half precision cannot hold stays finite
            limit = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-limit, limit)
        return hidden_states


class EchoWhisperPreTrainedModel(WhisperPreTrainedModel):
    """Weight initialization and what the library asks to know of a Whisper with pitch."""

    config_class = EchoWhisperConfig
    config: EchoWhisperConfig
    _no_split_modules = ["EchoWhisperEncoderLayer", "WhisperDecoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, EchoWhisperPitchStem | EchoWhisperPitchGate | EchoWhisperPitchAttention):
            for parameter in module.parameters():
                init.zeros_(parameter)


class EchoWhisperEncoder(EchoWhisperPreTrainedModel, WhisperEncoder):
    """Whisper's encoder, given F0 as the last row of its features."""

    def __init__(self, config: EchoWhisperConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(EchoWhisperEncoderLayer(config, index) for index in range(config.encoder_layers))
        self.post_init()

    def forward(self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """
        Args:
            input_features (`torch.Tensor` of shape `(B, num_mel_bins + 1, T)`): log-mel spectrogram, and F0 in Hz last.
            attention_mask: not used, as by Whisper.

        Returns:
            `BaseModelOutput` with `last_hidden_state` of shape `(B, S, E)`, `S = T / 2`.

        Raises:
            `ValueError`: the features have other rows, or are not as long as the window of the model.
        """
        log_mel, f0 = split_f0(input_features, self.config)
        # Encoder frame s is centered at frame 2 s of the features. The nearest F0, not a mean: a contour stays sharp.
        pitch = normalize_window(f0[:, ::FRAMES_PER_POSITION])
        # A copy: a kernel may round otherwise where rows are apart in memory.
        return super().forward(log_mel.contiguous(), pitch=pitch, **kwargs)


class EchoWhisperModel(EchoWhisperPreTrainedModel, WhisperModel):
    """Whisper with pitch, without a language model head."""

    _auto_class = "AutoModel"

    def __init__(self, config: EchoWhisperConfig):
        super().__init__(config)
        self.encoder = EchoWhisperEncoder(config)
        self.post_init()

    def _mask_input_features(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """SpecAugment of the spectrogram as Whisper has it; F0 is hidden in the frames that are hidden throughout."""
        log_mel, f0 = split_f0(input_features, self.config)
        masked = super()._mask_input_features(log_mel, attention_mask)
        if not (self.training and self.config.apply_spec_augment):
            return input_features
        f0 = f0 * (masked != 0).any(1)
        return torch.cat((masked, f0[:, None]), dim=1)


class EchoWhisperForConditionalGeneration(
    EchoWhisperPreTrainedModel, EchoWhisperGenerationMixin, WhisperForConditionalGeneration
):
    r"""
    Whisper with pitch, for speech recognition. Made of a Whisper by [`add_pitch`]; used, generated with, fine-tuned and
    saved as a [`WhisperForConditionalGeneration`].

    Example:

    ```python
    >>> import torch
    >>> from echo_hf import EchoWhisperConfig, EchoWhisperForConditionalGeneration

    >>> sizes = dict(d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=50)
    >>> model = EchoWhisperForConditionalGeneration(EchoWhisperConfig(encoder_layers=1, decoder_layers=1, **sizes))
    >>> model(torch.zeros(1, 81, 100), labels=torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 51865])

    ```"""

    _auto_class = "AutoModelForSpeechSeq2Seq"
    pipeline_class = EchoWhisperPipeline  # which the pipeline of this package asks for

    def __init__(self, config: EchoWhisperConfig):
        super().__init__(config)
        self.model = EchoWhisperModel(config)
        self.post_init()

    def generate(self, input_features: torch.Tensor | None = None, *args, **kwargs):
        """As [`WhisperForConditionalGeneration`], of features `(B, num_mel_bins + 1, T)` of any length; raises
        `ValueError` for features with other rows."""
        if input_features is not None:
            split_f0(input_features, self.config)
        return super().generate(input_features, *args, **kwargs)


__all__ = [
    "EchoWhisperConfig",
    "EchoWhisperFeatureExtractor",
    "EchoWhisperForConditionalGeneration",
    "EchoWhisperModel",
    "EchoWhisperPreTrainedModel",
    "EchoWhisperProcessor",
]

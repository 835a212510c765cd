"""The configuration of Echo.

One flat config serves encoder and decoder, with one field for each pitch mechanism. A value that cannot work raises a
`ValueError` that names the field; nothing is corrected in silence.
"""

import math
import os
import shutil
import sys
from dataclasses import field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import GenerationConfig

from .presets_echo import (
    BASELINE,
    BOUNDS,
    MAX_FRAMES_PER_ENCODER_FRAME,
    MAX_FRAMES_PER_TOKEN,
    MAX_GROUP_WIDTH,
    MAX_PARAMETERS,
    MAX_STRIDES,
    PRESETS,
    SIDES,
    SIZES,
)

# Where echo_hf is not installed, the library copies a checkpoint's file together with the relative imports that it
# finds in its text. These make it copy all the code.
if TYPE_CHECKING:
    from .modeling_echo import EchoModel  # noqa: F401
    from .pipeline_echo import EchoAutomaticSpeechRecognitionPipeline  # noqa: F401
    from .processing_echo import EchoProcessor  # noqa: F401
    from .tokenization_echo import EchoTokenizer  # noqa: F401

# Channel groups of `input_features`, in the order in which they lie.
FEATURE_GROUPS = ("spectrogram", "voicing", "pitch")

AUTO_MAP = {
    "AutoConfig": "configuration_echo.EchoConfig",
    "AutoFeatureExtractor": "feature_extraction_echo.EchoFeatureExtractor",
    "AutoTokenizer": ["tokenization_echo.EchoTokenizer", "tokenization_echo.EchoTokenizer"],
    "AutoProcessor": "processing_echo.EchoProcessor",
    "AutoModel": "modeling_echo.EchoModel",
    "AutoModelForSpeechSeq2Seq": "modeling_echo.EchoForConditionalGeneration",
    "AutoModelForCTC": "modeling_echo.EchoForCTC",
}
PIPELINE_CLASS = "pipeline_echo.EchoAutomaticSpeechRecognitionPipeline"
# The class that saved a checkpoint, and the Auto class that loads it in a pipeline.
PIPELINE_MODELS = {"EchoForConditionalGeneration": "AutoModelForSpeechSeq2Seq", "EchoForCTC": "AutoModelForCTC"}


def attach_module(name: str) -> None:
    """Makes a module an attribute of its package, as an import statement does. The library's loader of remote code
    does not, and dill, by which `datasets` fingerprints, then finds no class by its name."""
    package, _, attribute = name.rpartition(".")
    if package:
        setattr(import_module(package), attribute, sys.modules[name])


def attach_pipeline(package: str) -> None:
    """Makes `pipeline(task, model=<model object>)` use the pipeline class of this package of remote code. The library
    reads `custom_pipelines` only where it loads the config itself."""
    from transformers.pipelines import SUPPORTED_TASKS

    SUPPORTED_TASKS["automatic-speech-recognition"]["impl"] = f"{package}.{PIPELINE_CLASS}"


attach_module(__name__)

DTYPES = ("float32", "float16", "bfloat16", "float64", "float", "half", "double")

# Settings of generate() that scripts written for Whisper put on the model's config too.
WHISPER_SETTINGS = (
    *("language", "task", "is_multilingual", "prompt_ids", "prompt_condition_type", "forced_decoder_ids"),
    *("condition_on_prev_tokens", "return_timestamps", "return_token_timestamps", "return_segments"),
    *("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold", "num_segment_frames"),
)
GENERATION_SETTINGS = frozenset((*GenerationConfig().to_dict(), *WHISPER_SETTINGS))

# Fields of earlier versions, and the values at which they did nothing.
REMOVED_FIELDS = {"encoder_attention_window": (None,), "encoder_layerdrop": (None, 0), "decoder_layerdrop": (None, 0)}


def check_dtype(dtype: Any):
    """Raises a `ValueError` if `dtype`, a `str`, a `torch.dtype` or None, is no floating-point dtype of PyTorch."""
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES[:4])}, got {dtype!r}.")


def validate_feature_groups(feature_groups: dict[str, int]) -> dict[str, int]:
    """Channel groups, name to number of channels, checked and in the order of `FEATURE_GROUPS`.

    Raises:
        `ValueError`: a name is not known, a group that is needed is missing, or a width is not possible.
    """
    for name, width in feature_groups.items():
        if name not in FEATURE_GROUPS:
            raise ValueError(
                f"feature_groups: Echo has the groups {', '.join(FEATURE_GROUPS)}, and no {name!r}. Leave it out; a"
                " checkpoint that was trained with it needs the version of echo_hf that trained it."
            )
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= MAX_GROUP_WIDTH:
            raise ValueError(
                f"feature_groups: the width of {name!r} must be at most {MAX_GROUP_WIDTH} and a whole number above 0,"
                f" got {width!r}."
            )
        if name != "spectrogram" and width != 1:
            raise ValueError(f"feature_groups: {name!r} is a single channel, got a width of {width}.")
    if "voicing" in feature_groups and "pitch" not in feature_groups:
        raise ValueError("feature_groups: 'voicing' goes with 'pitch'; add 'pitch': 1, or leave it out.")
    if "spectrogram" not in feature_groups:
        raise ValueError("feature_groups: the 'spectrogram' is always needed, e.g. {'spectrogram': 80, 'pitch': 1}.")
    return {name: feature_groups[name] for name in FEATURE_GROUPS if name in feature_groups}


@strict
class EchoConfig(PreTrainedConfig):
    r"""
    Configuration of an [`EchoModel`]. The defaults give a model of about 10M parameters (with the byte vocabulary).
    Pitch is an input and moves the gates of the encoder, as the study of pitch supports, and silence is scaled, which
    it did not test. `EchoConfig.from_preset("baseline")` has all of them off, and `"all"` has all on.

    Args:
        vocab_size (`int`, defaults to 259): Number of tokens; 259 is the byte vocabulary of `EchoTokenizer()`.
        feature_groups (`dict[str, int]`, defaults to `{"spectrogram": 80, "pitch": 1}`):
            Channel groups of `input_features` and their widths; see `FEATURE_GROUPS`. Must equal the extractor's. With
            `"voicing": 1` pitch is continuous: a voicing from 0 to 1, and log-F0 carried across unvoiced frames.
        sampling_rate (`int`, defaults to 16000): Sampling rate of the audio in Hz.
        hop_length (`int`, defaults to 160): Samples from one input frame to the next.
        stem_strides (`list[int]`, defaults to `[2, 2]`):
            Stride of each convolution of the stem. Their product is the number of input frames to an encoder frame.
        stem_num_layers (`int`, defaults to 4): Number of residual convolutions over time behind the stem.
        encoder_hidden_size (`int`, defaults to 256): Width of the encoder.
        decoder_hidden_size (`int`, *optional*): Width of the decoder; the encoder's if not given.
        encoder_num_hidden_layers (`int`, defaults to 8): Number of encoder layers.
        decoder_num_hidden_layers (`int`, defaults to 2): Number of decoder layers.
        encoder_num_attention_heads (`int`, defaults to 4): Attention heads in each encoder layer.
        decoder_num_attention_heads (`int`, defaults to 4): Attention heads in each decoder layer.
        encoder_num_key_value_heads (`int`, *optional*):
            Key and value heads in the encoder (grouped-query attention, https://huggingface.co/papers/2305.13245); as
            many as attention heads if not given.
        decoder_num_key_value_heads (`int`, *optional*): The same in the decoder.
        encoder_kernel_size (`int`, *optional*):
            Encoder frames, an odd number, that a convolution in each encoder layer sees, as in a Conformer
            (https://huggingface.co/papers/2005.08100); no convolution if not given. Its output starts at 0, so it can
            be added to a trained encoder.
        self_conditioning_layers (`list[int]`, *optional*):
            Encoder layers, counted from 1, behind which the encoder predicts tokens, feeds the prediction back and
            learns by a CTC loss on it (self-conditioned CTC, https://huggingface.co/papers/2104.02724), e.g. `[3, 6]`.
            Needs `ctc_loss_weight`. What is fed back starts at 0.
        encoder_intermediate_size (`int`, defaults to 688): Width inside the encoder's gated feed-forward.
        decoder_intermediate_size (`int`, *optional*): The same in the decoder; the encoder's if not given.
        hidden_act (`str`, defaults to `"silu"`): Activation of the gates.
        max_target_positions (`int`, defaults to 448):
            Longest transcript in tokens: limit of the labels, and `max_length` of `generate()` in a new model.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of embeddings and output heads at the start. Other weights start by their fan-in.
        rms_norm_eps (`float`, defaults to 1e-6): Added to the mean square in each RMSNorm, from 1e-7 to 1.
        dropout (`float`, defaults to 0.0): Dropout of the embeddings and of each sub-layer's output.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention weights.
        rotary_frequencies (`str`, defaults to `"standard"`):
            Rotary frequencies (rad a frame): `"standard"`, `theta ** (-2c / d)`, or `"mel"`, evenly spaced on a mel
            scale and proportional to theta.
        rotary_theta (`float`, defaults to 10000.0): Theta, or where it starts.
        learn_theta (`bool`, defaults to `False`): Whether theta is learned, as a factor that starts at 1.
        mel_corner_frequency (`float`, defaults to 80.0): K of the mel scale (Hz): linear below, logarithmic above.
        mel_max_frequency (`float`, defaults to 2000.0):
            M, the top of the mel scale (Hz). The largest step is `theta / 220 * M / 1000` rad a frame.
        theta_mode (`str`, defaults to `"none"`):
            How F0 moves theta in the encoder: `"none"`; `"mean"`, by the utterance's mean F0; `"frame"`, by each
            frame's F0 (published; not relative); `"phase"`, by each frame's F0 with the angle summed up (relative);
            `"contour"`, by the normalized log-F0 and a learned gain for each channel pair, summed up (relative).
        radius_mode (`str`, defaults to `"unit"`):
            How F0 sets the rotary radius in the encoder: `"unit"`, 1; `"sigmoid"` of F0 in Hz (published); `"raw"`, F0
            in Hz (published; saturates); `"bounded"`, within [0.5, 1.5] by normalized log-F0 and a learned gain.
        pitch_bias (`str`, defaults to `"none"`):
            What is added to the encoder's attention scores for frames of similar pitch: `"none"`; `"gaussian"`, with a
            learned strength for each head and no matrix of frames by frames; `"laplacian"`, published, with one.
        silence_scaling (`bool`, defaults to `True`):
            Whether the scores of silent frames, as keys, are scaled to near zero by a learned factor.
        silence_threshold (`float`, defaults to 0.5):
            A frame is silent when none of its log-mel channels is above this, in units of the extractor: 0 is its
            floor, 80 dB under the peak; 0.05 is 2 dB.
        silence_scale_range (`list[float]`, defaults to `[0.001, 0.1]`): Bounds of the learned factor of silent keys.
        pitch_gate (`bool`, defaults to `True`): Whether the gates of the encoder's feed-forward see the pitch.
        pitch_stem (`bool`, defaults to `True`): Whether pitch has a stem of its own beside the spectrogram's.
        token_pitch (`str`, defaults to `"none"`):
            Pitch given to the decoder with each token: `"none"`, or the `"mean"` F0 of the token's span of time.
        tokens_per_second (`float`, defaults to 10.0): Fixed token rate that says which span belongs to a token.
        ctc_loss_weight (`float`, defaults to 0.3):
            Weight of the CTC loss in the hybrid loss, in [0, 1]; cross-entropy has the rest. 0: no CTC head. (Watanabe
            et al., https://ieeexplore.ieee.org/document/8068205)
        label_smoothing (`float`, defaults to 0.0):
            Probability mass that the cross-entropy's target spreads evenly over the vocabulary, in [0, 1).
        apply_spec_augment (`bool`, defaults to `False`):
            Whether to mask spans of time and of mel channels in training (https://huggingface.co/papers/1904.08779).
        mask_time_prob (`float`, defaults to 0.05): Largest share of frames that are masked, in spans of time.
        mask_time_length (`int`, defaults to 10): Length of a span of time in input frames.
        mask_time_min_masks (`int`, defaults to 0): Fewest spans of time in an utterance.
        mask_feature_prob (`float`, defaults to 0.05): Largest share of mel channels that are masked, in spans.
        mask_feature_length (`int`, defaults to 10): Length of a span in mel channels.
        mask_feature_min_masks (`int`, defaults to 0): Fewest spans of channels in an utterance.
        use_cache (`bool`, defaults to `True`): Whether the decoder returns its keys and values.
        pad_token_id (`int`, defaults to 0): Padding, ignored by the loss, and the blank of CTC.
        bos_token_id (`int`, defaults to 1): Begin of sequence.
        eos_token_id (`int` or `list[int]`, defaults to 2): End of sequence.
        decoder_start_token_id (`int`, defaults to 1): First token of the decoder.
        tie_word_embeddings (`bool`, defaults to `True`): Whether the embeddings are also the output projection.

    Raises:
        `ValueError`: a field has a value that cannot work; the message names it.
        `StrictDataclassFieldValidationError`: a field has a value of the wrong type or none of the choices.

    Example:

    ```python
    >>> from echo_hf import EchoConfig, EchoForConditionalGeneration

    >>> configuration = EchoConfig.from_preset("baseline", size="2m")
    >>> model = EchoForConditionalGeneration(configuration)
    >>> model.config.theta_mode
    'none'

    ```"""

    model_type = "echo"
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "ce_loss", "ctc_loss", "ctc_logits"]
    attribute_map = {
        "hidden_size": "decoder_hidden_size",
        "intermediate_size": "decoder_intermediate_size",
        "num_hidden_layers": "decoder_num_hidden_layers",
        "num_attention_heads": "decoder_num_attention_heads",
        "num_key_value_heads": "decoder_num_key_value_heads",
        "max_position_embeddings": "max_target_positions",
    }

    vocab_size: int = 259
    feature_groups: dict[str, int] = field(default_factory=lambda: {"spectrogram": 80, "pitch": 1})
    sampling_rate: int = 16000
    hop_length: int = 160
    stem_strides: list[int] | tuple[int, ...] = (2, 2)
    stem_num_layers: int = 4
    encoder_hidden_size: int = 256
    decoder_hidden_size: int | None = None
    encoder_num_hidden_layers: int = 8
    decoder_num_hidden_layers: int = 2
    encoder_num_attention_heads: int = 4
    decoder_num_attention_heads: int = 4
    encoder_num_key_value_heads: int | None = None
    decoder_num_key_value_heads: int | None = None
    encoder_kernel_size: int | None = None
    self_conditioning_layers: list[int] | tuple[int, ...] | None = None
    encoder_intermediate_size: int = 688
    decoder_intermediate_size: int | None = None
    hidden_act: str = "silu"
    max_target_positions: int = 448
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    rotary_frequencies: Literal["standard", "mel"] = "standard"
    rotary_theta: float | int = 10000.0
    learn_theta: bool = False
    mel_corner_frequency: float | int = 80.0
    mel_max_frequency: float | int = 2000.0
    theta_mode: Literal["none", "mean", "frame", "phase", "contour"] = "none"
    radius_mode: Literal["unit", "sigmoid", "raw", "bounded"] = "unit"
    pitch_bias: Literal["none", "gaussian", "laplacian"] = "none"
    silence_scaling: bool = True
    silence_threshold: float | int = 0.5
    silence_scale_range: list[float] | tuple[float, ...] = (0.001, 0.1)
    pitch_gate: bool = True
    pitch_stem: bool = True
    token_pitch: Literal["none", "mean"] = "none"
    tokens_per_second: float | int = 10.0
    ctc_loss_weight: float | int = 0.3
    label_smoothing: float | int = 0.0
    apply_spec_augment: bool = False
    mask_time_prob: float | int = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 0
    mask_feature_prob: float | int = 0.05
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    use_cache: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        # The library would set these on the finished config, unchecked.
        known = {*cls.__annotations__, *cls.attribute_map, *REMOVED_FIELDS}
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        return super().from_dict({**config_dict, **own}, **kwargs)

    def __setattr__(self, name, value):
        # The library saves no such attribute of a config, and generate() reads none.
        if name in GENERATION_SETTINGS and name not in self.__dataclass_fields__:
            if value:
                raise ValueError(
                    f"{name} is a setting of generate() and does nothing in a model's config: set"
                    f" model.generation_config.{name}, or leave it out."
                )
            return
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs):
        for name, neutral in REMOVED_FIELDS.items():
            if (value := kwargs.pop(name, None)) not in neutral:
                raise ValueError(
                    f"{name} is {value!r}, and Echo no longer has it. The weights are the same without it: set it to"
                    f" {neutral[-1]}, e.g. from_pretrained(..., {name}={neutral[-1]})."
                )
        for alias, name in self.attribute_map.items():
            if alias in kwargs:  # before other fields are derived from it
                setattr(self, name, kwargs.pop(alias))
        if self.decoder_hidden_size is None:
            self.decoder_hidden_size = self.encoder_hidden_size
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = self.encoder_intermediate_size
        if self.encoder_num_key_value_heads is None:
            self.encoder_num_key_value_heads = self.encoder_num_attention_heads
        if self.decoder_num_key_value_heads is None:
            self.decoder_num_key_value_heads = self.decoder_num_attention_heads
        self.stem_strides = list(self.stem_strides)
        if self.self_conditioning_layers is not None:
            self.self_conditioning_layers = list(self.self_conditioning_layers)
        self.silence_scale_range = list(self.silence_scale_range)
        self.feature_groups = validate_feature_groups(self.feature_groups)
        # The library runs the pipeline class beside a checkpoint only with `trust_remote_code`. Where this package is
        # installed it brings the class, so the name is dropped.
        if not __name__.startswith("transformers_modules."):
            kwargs.pop("custom_pipelines", None)
        kwargs["auto_map"] = dict(AUTO_MAP)
        check_dtype(self.dtype if self.dtype is not None else kwargs.get("torch_dtype"))
        super().__post_init__(**kwargs)
        self._check_bounds()
        self._check_sizes()
        self._check_pitch()
        self._check_training()

    def _check_bounds(self):
        for name, (lowest, highest) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                raise ValueError(f"{name} must be from {lowest:g} to {highest:g}, got {value}.")
        for name in ("dropout", "attention_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")

    def _check_sizes(self):
        if self.encoder_kernel_size is not None and self.encoder_kernel_size % 2 == 0:
            raise ValueError(
                f"encoder_kernel_size must be an odd number, or None for no convolution; got"
                f" {self.encoder_kernel_size}."
            )
        strides = self.stem_strides
        if (
            not 1 <= len(strides) <= MAX_STRIDES
            or min(strides) < 1
            or math.prod(strides) > MAX_FRAMES_PER_ENCODER_FRAME
        ):
            raise ValueError(
                f"stem_strides must be 1 to {MAX_STRIDES} whole numbers above 0 with a product of at most"
                f" {MAX_FRAMES_PER_ENCODER_FRAME}, got {strides}."
            )
        for side in SIDES:
            width, heads = getattr(self, f"{side}_hidden_size"), getattr(self, f"{side}_num_attention_heads")
            key_value_heads = getattr(self, f"{side}_num_key_value_heads")
            if width % heads or (width // heads) % 2 or width // heads < 4:
                raise ValueError(
                    f"{side}_hidden_size ({width}) must be an even multiple, at least 4, of {side}_num_attention_heads"
                    f" ({heads}): rotary embeddings turn pairs of channels."
                )
            if heads % key_value_heads:
                raise ValueError(
                    f"{side}_num_key_value_heads ({key_value_heads}) must divide {side}_num_attention_heads ({heads})."
                )
        if (parameters := self._estimate_parameters()) > MAX_PARAMETERS:
            raise ValueError(
                f"The model would have about {parameters:.1g} parameters, and at most {MAX_PARAMETERS:.0g} are allowed:"
                " look at vocab_size and at hidden_size, intermediate_size and num_hidden_layers of both sides."
            )

    def _estimate_parameters(self) -> int:
        """Parameters of the large matrices."""
        encoder, decoder = self.encoder_hidden_size, self.decoder_hidden_size
        convolutions = self.stem_num_layers + (self.encoder_num_hidden_layers if self.encoder_kernel_size else 0)
        return (
            self.vocab_size * (encoder + 2 * decoder)
            + self.encoder_num_hidden_layers * encoder * (4 * encoder + 3 * self.encoder_intermediate_size)
            + self.decoder_num_hidden_layers * decoder * (8 * decoder + 3 * self.decoder_intermediate_size)
            + (4 * convolutions + 3 * len(self.stem_strides)) * encoder**2
            + 3 * self.num_feature_channels * encoder
        )

    def _check_pitch(self):
        if not 1 / MAX_FRAMES_PER_TOKEN <= self.tokens_per_second * self.frame_seconds <= MAX_FRAMES_PER_TOKEN:
            raise ValueError(
                f"tokens_per_second must give at most {MAX_FRAMES_PER_TOKEN} frames a token and tokens a frame,"
                f" got {self.tokens_per_second} with frames of {self.frame_seconds:g} s."
            )
        if len(self.silence_scale_range) != 2 or not 0 < self.silence_scale_range[0] < self.silence_scale_range[1] <= 1:
            raise ValueError(
                f"silence_scale_range must be two numbers, 0 < low < high <= 1, got {self.silence_scale_range}."
            )
        if "pitch" not in self.feature_groups and (used := self.pitch_mechanisms):
            raise ValueError(
                f"feature_groups has no 'pitch', which {', '.join(used)} need; add 'pitch': 1 or switch them off, as"
                ' `EchoConfig.from_preset("baseline")` and --preset baseline do.'
            )

    def _check_training(self):
        if self.pad_token_id is None or self.pad_token_id in (self.bos_token_id, *self.ends_of_sequence):
            raise ValueError(
                f"pad_token_id must be a token of its own, since no loss counts it and it is the blank of CTC; got"
                f" {self.pad_token_id}, with bos_token_id {self.bos_token_id} and eos_token_id {self.eos_token_id}."
            )
        if self.decoder_start_token_id is None:
            raise ValueError("decoder_start_token_id is None, and the decoder begins with it; give bos_token_id.")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            tokens = self.ends_of_sequence if name == "eos_token_id" else [getattr(self, name)]
            if any(token is not None and not 0 <= token < self.vocab_size for token in tokens):
                raise ValueError(
                    f"{name} must be a token, from 0 to vocab_size - 1 ({self.vocab_size - 1}), got"
                    f" {getattr(self, name)}."
                )
        layers = self.self_conditioning_layers or []
        if any(not 1 <= layer < self.encoder_num_hidden_layers for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(
                "self_conditioning_layers must be different encoder layers before the last, from 1 to"
                f" {self.encoder_num_hidden_layers - 1}, got {layers}."
            )
        if layers and not self.ctc_loss_weight:
            raise ValueError("self_conditioning_layers learn by the CTC loss, and ctc_loss_weight is 0; raise it.")

    @property
    def pitch_mechanisms(self) -> list[str]:
        """Names of the fields whose mechanism reads F0 and is switched on."""
        names = ("theta_mode", "radius_mode", "pitch_bias", "pitch_gate", "pitch_stem", "token_pitch")
        return [name for name in names if getattr(self, name) != BASELINE[name]]

    @property
    def ends_of_sequence(self) -> list[int]:
        """`eos_token_id` as a list, of none, one or several."""
        ends = self.eos_token_id
        return [] if ends is None else ends if isinstance(ends, list) else [ends]

    @property
    def num_feature_channels(self) -> int:
        """Channels of `input_features`."""
        return sum(self.feature_groups.values())

    @property
    def frame_seconds(self) -> float:
        """Seconds from one input frame to the next."""
        return self.hop_length / self.sampling_rate

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples of audio to an encoder frame."""
        return self.hop_length * math.prod(self.stem_strides)

    @classmethod
    def from_preset(cls, preset: str = "baseline", size: str | None = None, **overrides) -> "EchoConfig":
        """A named setting of the pitch mechanisms, at a named size.

        Args:
            preset (`str`): one of `PRESETS`: `"baseline"` (all pitch mechanisms off), one mechanism alone (`"theta"`,
                `"radius"`, `"bias"`, `"silence"`, `"gate"`, `"pitch_input"`, `"token_pitch"`), `"all"`, or a published
                setting (`"published_mean_sigmoid"`, `"published_frame_raw"`).
            size (`str`, *optional*): one of `SIZES`, named by the parameters it gives: `"2m"` to `"80m"`.
            overrides: any field of the config; wins over preset and size.

        Raises:
            `ValueError`: the preset or the size is not known.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r} is not known; choose one of {', '.join(PRESETS)}.")
        settings: dict[str, Any] = {**BASELINE, **PRESETS[preset]}
        if size is not None:
            if size not in SIZES:
                raise ValueError(f"size {size!r} is not known; choose one of {', '.join(SIZES)}.")
            for side, sizes in SIZES[size].items():
                names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
                settings |= {f"{side}_{name}": value for name, value in zip(names, sizes)}
        return cls(**{**settings, **overrides})

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # The library keeps the first class that loads, and each of the two loads what the other saved.
        models = [PIPELINE_MODELS[name] for name in self.architectures or () if name in PIPELINE_MODELS]
        output["custom_pipelines"] = {
            "automatic-speech-recognition": {
                "impl": PIPELINE_CLASS,
                "pt": models or list(PIPELINE_MODELS.values()),
                "type": "multimodal",
            }
        }
        return output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Saves the config and, beside it, the code that the checkpoint needs where echo_hf is not installed."""
        folder, here = Path(save_directory), Path(__file__).parent
        if not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if here.resolve() != folder.resolve():
                for path in here.glob("*_echo.py"):
                    if not path.name.startswith("whisper"):  # another model, which Echo does not need
                        shutil.copyfile(path, folder / path.name)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


__all__ = ["EchoConfig"]

"""A larger speech model whose hidden states Echo's encoder learns to tell, frame by frame, beside the texts.

The teacher hears each recording once, before training; its states are kept with the features. What the encoder hears in
training is perturbed and masked, and it still has to tell what the teacher made of the recording as it was.

Sources: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets" (https://huggingface.co/papers/1412.6550); for speech
Guo et al. 2023 (https://huggingface.co/papers/2211.00508). That states are standardised over the utterance is of
data2vec (https://huggingface.co/papers/2202.03555).
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig
from transformers import AutoFeatureExtractor
from transformers import AutoModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .feature_extraction_echo import resample_audio

SILENCE_BEHIND = 1.0  # seconds of silence behind a recording: cut off at its last word, Whisper hears on
LONGEST = 29.0  # seconds that a teacher hears at once; with the silence, the 30 that Whisper's positions hold
SHORTEST = 2.0  # seconds of a recording below which its states have too little to be standardised over


class Teacher:
    """
    The encoder of a speech model of Transformers: Whisper's, or any that makes states of audio alone (wav2vec 2.0,
    HuBERT, WavLM, ...).

    Args:
        checkpoint (`str` or `Path`): folder, or name on the Hub, such as `openai/whisper-base`.
        frame_samples (`int`): samples of audio a frame of the states is to span, as
            [`EchoConfig.inputs_to_logits_ratio`].
        dtype (`torch.dtype`, defaults to `torch.float32`): that it computes in.

    Attributes:
        hidden_size (`int`): channels of its states.
        sampling_rate (`int`): Hz of the audio it hears.
        fingerprint (`str`): another whenever its states may differ.

    Raises:
        `ValueError`: there is no such checkpoint, or what is in it makes no hidden states of audio.
    """

    def __init__(self, checkpoint: str | Path, frame_samples: int, dtype: torch.dtype = torch.float32):
        try:
            config = AutoConfig.from_pretrained(checkpoint)
            self.feature_extractor = AutoFeatureExtractor.from_pretrained(checkpoint)
            model = AutoModel.from_pretrained(checkpoint, dtype=dtype)
        except (OSError, ValueError, HFValidationError) as error:
            raise ValueError(f"No teacher could be loaded from {checkpoint}: {error}") from error
        self.encoder = (model.get_encoder() if config.is_encoder_decoder else model).eval()
        if self.encoder.main_input_name not in ("input_features", "input_values"):
            raise ValueError(
                f"The teacher {checkpoint} takes {self.encoder.main_input_name}, not audio; name a speech encoder."
            )
        self.frame_samples, self.dtype = frame_samples, dtype
        self.sampling_rate = self.feature_extractor.sampling_rate
        digest = hashlib.sha256(f"{config.to_json_string()} {frame_samples} {dtype}".encode())
        digest.update(self.feature_extractor.to_json_string().encode() + Path(__file__).read_bytes())
        for name, value in self.encoder.state_dict().items():
            digest.update(name.encode() + value.flatten().view(torch.uint8).numpy().tobytes())
        self.positions = None
        if isinstance(self.encoder, WhisperEncoder):
            self.positions = self.encoder.embed_positions.weight.detach().clone()
        try:
            with torch.no_grad():
                self.hidden_size = self._hear(np.zeros(self.sampling_rate, np.float32), self.sampling_rate).shape[-1]
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"The teacher {checkpoint} makes no hidden states of audio: {error}") from error
        self.fingerprint = digest.hexdigest()[:32]

    @torch.no_grad()
    def __call__(self, waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
        """
        Args:
            waveform (`np.ndarray` of shape `(samples,)`): float32.
            sampling_rate (`int`): of the waveform (Hz), which `frame_samples` counts at.

        Returns:
            `np.ndarray` of shape `(frames, hidden_size)`, float16: the last hidden states, each channel with mean 0 and
            variance 1 over the utterance, one frame for each `frame_samples` begun; no frames of a recording
            shorter than 2 s.
        """
        if len(waveform) < SHORTEST * sampling_rate:
            return np.zeros((0, self.hidden_size), dtype=np.float16)
        step = int(LONGEST * sampling_rate / self.frame_samples) * self.frame_samples
        pieces = [self._hear(waveform[start : start + step], sampling_rate) for start in range(0, len(waveform), step)]
        states = torch.cat(pieces)
        deviation = states.std(0, correction=0).clamp(min=1e-5)
        return ((states - states.mean(0)) / deviation).half().numpy()

    def _hear(self, waveform: np.ndarray, sampling_rate: int) -> torch.Tensor:
        """States of a piece, `(frames, hidden_size)`, float32."""
        frames = math.ceil(len(waveform) / self.frame_samples)
        padded = np.pad(waveform, (0, round(SILENCE_BEHIND * sampling_rate)))
        share = frames * self.frame_samples / len(padded)  # the last frame may hold some of the silence
        if sampling_rate != self.sampling_rate:
            padded = resample_audio(padded, sampling_rate, self.sampling_rate)
        options = {} if self.positions is None else {"padding": "longest", "truncation": False}
        inputs = self.feature_extractor(padded, sampling_rate=self.sampling_rate, return_tensors="pt", **options)
        values = inputs[self.encoder.main_input_name].to(self.dtype)
        if self.positions is not None:
            # Whisper's encoder takes 30 s, not a frame less, of which most would be silence here.
            number = min(values.shape[-1] // 2, len(self.positions))
            values = values[..., : 2 * number]
            self.encoder.config.max_source_positions = number
            self.encoder.embed_positions = torch.nn.Embedding.from_pretrained(self.positions[:number])
        states = self.encoder(values).last_hidden_state[0].float()
        heard = max(1, round(len(states) * share))
        return torch.nn.functional.adaptive_avg_pool1d(states[:heard].T[None], frames)[0].T


__all__ = ["Teacher"]

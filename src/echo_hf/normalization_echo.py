"""F0 in Hz as a network sees it: voiced, contour and register. A Whisper with pitch carries this module, and not the
rest of Echo."""

import math

import torch

PITCH_CHANNELS = 3  # voiced, contour, register
REGISTER_CENTER = 150.0  # Hz, between low and high voices
REGISTER_WIDTH = 0.5  # natural log units, about nine semitones
CONTOUR_FLOOR = 0.1  # natural log units; smaller deviations are not scaled up


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the values where `mask` is 1: `(..., N)` to `(..., 1)`."""
    return (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def carry_log_f0(log_f0: torch.Tensor, voiced: torch.Tensor) -> torch.Tensor:
    """Log-F0, `(B, T)`, interpolated linearly across frames that are not `voiced` (1 or 0), and constant before the
    first and after the last voiced one. An utterance without a voiced frame is unchanged."""
    number = log_f0.shape[1]
    frames = torch.arange(number, device=log_f0.device)[None]
    before = torch.where(voiced > 0, frames, -1).cummax(1).values  # -1: none
    after = number - torch.where(voiced > 0, number - frames, -1).flip(1).cummax(1).values.flip(1)  # number + 1: none
    start = torch.where(before < 0, after, before).clamp(max=number - 1)
    end = torch.where(after > number, before, after).clamp(min=0)
    weight = ((frames - start) / (end - start).clamp(min=1)).to(log_f0.dtype)
    carried = torch.lerp(log_f0.gather(1, start), log_f0.gather(1, end), weight)
    return torch.where(voiced.amax(1, keepdim=True) > 0, carried, log_f0)


def normalize_f0(f0: torch.Tensor, mask: torch.Tensor, voicing: torch.Tensor | None = None) -> torch.Tensor:
    """Pitch as the network sees it, in three channels that are 0 where unvoiced:

        voiced     1
        contour    (ln f0 - mean) / max(std, 0.1), mean and std of the utterance's voiced frames
        register   (ln f0 - ln 150) / 0.5

    With `voicing`, pitch is continuous (Ghahremani et al., https://doi.org/10.1109/ICASSP.2014.6854049): channel 0 is
    the voicing, and the others use [`carry_log_f0`]. An utterance without a voiced frame is all 0.

    Args:
        f0 (`torch.Tensor` of shape `(B, T)`): Hz, 0 = unvoiced.
        mask (`torch.Tensor` of shape `(B, T)`): 1 for real frames.
        voicing (`torch.Tensor` of shape `(B, T)`, *optional*): from 0, noise, to 1, periodic.

    Returns:
        `torch.Tensor` of shape `(B, T, 3)`, float32; 0 in padding.
    """
    voiced = ((f0 > 0) & (mask > 0)).float()
    log_f0 = torch.where(voiced > 0, f0, 1.0).float().log()
    if voicing is not None:
        log_f0 = carry_log_f0(log_f0, voiced)
    deviation = log_f0 - masked_mean(log_f0, voiced)
    spread = masked_mean(deviation.square(), voiced).sqrt().clamp(min=CONTOUR_FLOOR)
    register = (log_f0 - math.log(REGISTER_CENTER)) / REGISTER_WIDTH
    if voicing is None:
        return torch.stack((voiced, voiced * deviation / spread, voiced * register), dim=-1)
    known = (mask > 0) * voiced.amax(-1, keepdim=True)
    return torch.stack((known * voicing.float(), known * deviation / spread, known * register), dim=-1)

"""Cross-entropy of the decoder and CTC of the encoder.

The hybrid loss is `(1 - w) * cross_entropy + w * ctc_loss`, `w = ctc_loss_weight`. Dimensions as in `modeling_echo.py`.
"""

import torch
from torch import nn
from transformers.loss.loss_ctc import ForCTCLoss

from .configuration_echo import EchoConfig

INTERMEDIATE_WEIGHT = 0.3  # share of the intermediate predictions in the CTC loss


def ignore_padding(labels: torch.Tensor, config: EchoConfig) -> torch.Tensor:
    """Labels with -100 in place of pad tokens."""
    return labels.masked_fill(labels == config.pad_token_id, -100)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of the tokens, shape `()`. `logits[:, t]` predicts `labels[:, t]`.

    Args:
        logits (`torch.Tensor` of shape `(B, L, vocab_size)`)
        labels (`torch.LongTensor` of shape `(B, L)`): -100 is ignored.
        label_smoothing (`float`): probability mass that the target spreads evenly over the vocabulary.
        num_items_in_batch (*optional*): divisor of the sum; the number of labels that count if not given.
    """
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1),
        labels.to(logits.device).flatten(),
        ignore_index=-100,
        reduction="mean" if num_items_in_batch is None else "sum",
        label_smoothing=label_smoothing,
    )
    return loss if num_items_in_batch is None else _divide(loss, num_items_in_batch)


def ctc_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    encoder_mask: torch.Tensor,
    config: EchoConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    intermediate_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """CTC loss a token, shape `()`, with the pad token as blank (Graves et al.,
    https://doi.org/10.1145/1143844.1143891). Intermediate predictions, if any, have 30% of it (Lee and Watanabe,
    https://huggingface.co/papers/2102.03216). An utterance with too few frames for its labels counts 0.

    Args:
        logits (`torch.Tensor` of shape `(B, S, vocab_size)`)
        labels (`torch.LongTensor` of shape `(B, L)`): -100, begin and end of sequence are ignored.
        encoder_mask (`torch.Tensor` of shape `(B, S)`): 1 for real frames.
        num_items_in_batch (*optional*): divisor of the sum; the number of labels that are not -100 if not given.
        intermediate_logits (`torch.Tensor` of shape `(B, N, S, vocab_size)`, *optional*): of [`EchoEncoderOutput`].
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
    # The Trainer's number may be on another device; replicas of `DataParallel` get a plain number.
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)

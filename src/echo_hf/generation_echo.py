"""Joint decoding: what the decoder would write next, weighed against what the encoder's CTC head has heard.

The decoder alone may lose its place in long speech, repeat itself, or stop too soon. CTC cannot: it knows how much of
the speech a transcript so far accounts for. So `generate()` takes both, for greedy search, beams and sampling alike.
"""

from numbers import Integral
from numbers import Real
from typing import Any

import torch
from transformers import GenerationConfig
from transformers import LogitsProcessor

from .configuration_echo import WHISPER_SETTINGS

# Log-probability of what cannot be. Finite, as differences of infinities are not numbers.
IMPOSSIBLE = -1e10

MAX_HYPOTHESES = 1000  # of an utterance in generate()
TOKEN_SETTINGS = (  # settings of generate() that hold one or several tokens
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
)


def find_cut_off(ids: torch.Tensor, generation_config) -> torch.Tensor:
    """Which texts `generate()` stopped for their length.

    Args:
        ids (`torch.LongTensor` of shape `(B, L)`): what it gave.
        generation_config (`GenerationConfig`): says what ends a text; without an `eos_token_id` nothing does, and none
            counts as cut off.

    Returns:
        `torch.BoolTensor` of shape `(B,)`.
    """
    if generation_config.eos_token_id is None:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    return ~torch.isin(ids, torch.as_tensor(generation_config.eos_token_id, device=ids.device)).any(-1)


def drop_whisper_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """
    Settings of generate() without those of Whisper, which Echo has no use for.

    Raises:
        `ValueError`: one of those is switched on.
    """
    given = {name: settings[name] for name in WHISPER_SETTINGS if settings.get(name) is not None}
    foreign = [name for name, value in given.items() if torch.is_tensor(value) or value not in (False, "", [])]
    if foreign:
        raise ValueError(
            f"generate() of Echo takes no {', '.join(foreign)}: it writes the language that it hears, as it was"
            " trained to. Leave them out, in model.generation_config too. Times come from the pipeline:"
            " return_timestamps=True, or 'word'."
        )
    return {name: value for name, value in settings.items() if name not in WHISPER_SETTINGS}


def check_generation_config(generation_config: GenerationConfig, vocab_size: int):
    """
    Checks the settings of generate() that would fail deep inside it, or not at all.

    Raises:
        `ValueError`: one of them has a value that cannot work; the message names it.
    """
    for name in ("num_beams", "num_return_sequences"):
        value = getattr(generation_config, name)
        if value is not None and not (isinstance(value, Integral) and 1 <= value <= MAX_HYPOTHESES):
            raise ValueError(f"{name} must be a whole number from 1 to {MAX_HYPOTHESES}, got {value!r}.")
    weight = generation_config.ctc_weight
    if weight is not None and not (isinstance(weight, Real) and 0 <= weight <= 1):
        raise ValueError(f"ctc_weight must be a number from 0, the decoder alone, to 1, got {weight!r}.")
    for name in TOKEN_SETTINGS:
        value = getattr(generation_config, name)
        tokens = value.tolist() if hasattr(value, "tolist") else value  # of an array or a tensor
        tokens = [] if tokens is None else tokens if isinstance(tokens, list | tuple) else [tokens]
        if not all(isinstance(token, Integral) and 0 <= token < vocab_size for token in tokens):
            raise ValueError(
                f"{name} of the generation config must be of the vocabulary, from 0 to {vocab_size - 1}, or None; got"
                f" {value!r}."
            )


def log_cumulative_products(factors: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """`x_t = a_t * (x_{t-1} + b_t)` for all t at once, `x` before the first being 0; all in logarithms.

    Divided by the product of all factors so far, the recurrence is a running sum.

    Args:
        factors (`torch.Tensor` of shape `(rows, frames)`): log a.
        inputs (`torch.Tensor` of shape `(rows, frames)`): log b.

    Returns:
        `torch.Tensor` of shape `(rows, frames)`: log x.
    """
    products = factors.cumsum(-1)
    before = torch.nn.functional.pad(products[:, :-1], (1, 0))
    return products + torch.logcumsumexp(inputs - before, dim=-1)


class EchoCTCPrefixLogitsProcessor(LogitsProcessor):
    r"""
    Scores of the next token by decoder and CTC together: `(1 - w) * log p_decoder + w * log p_CTC`.

    `p_CTC` of token c after the transcript g is `psi(g c) / psi(g)`, with `psi(g)` the probability, summed over all
    alignments, that the speech's transcript begins with g; for the end of sequence it is the probability that g is all
    (Watanabe et al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", 2017, algorithm 2,
    https://doi.org/10.1109/JSTSP.2017.2763455). With `r^n_t(g)` and `r^b_t(g)` the probabilities that the frames up to
    t read g and end in its last token, or in a blank:

        phi_t   = r^b_{t-1}(g) + (r^n_{t-1}(g) unless c is g's last token)
        psi(gc) = sum_t phi_t p_t(c)
        r^n_t(gc) = p_t(c) (r^n_{t-1}(gc) + phi_t)
        r^b_t(gc) = p_t(blank) (r^b_{t-1}(gc) + r^n_{t-1}(gc))

    A step costs frames times vocabulary for each row, with no loop over frames.

    Args:
        logits (`torch.Tensor` of shape `(rows, frames, vocab_size)`):
            Of the CTC head, a row for each hypothesis: those of an utterance lie together.
        mask (`torch.Tensor` of shape `(rows, frames)`):
            1 for real frames, 0 for padding.
        blank_token_id (`int`):
            The blank; `pad_token_id` in Echo.
        bos_token_id (`int`):
            Begin of sequence, never to be written; `None` where there is none.
        eos_token_ids (`torch.Tensor` of shape `(ends,)`):
            Ends of sequence.
        weight (`float`):
            w, above 0; at 1 the decoder has no say.
        num_hypotheses (`int`, defaults to 1):
            Rows that each utterance has: beams, or samples.

    Raises:
        `ValueError`: the weight is not above 0 and at most 1.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        mask: torch.Tensor,
        blank_token_id: int,
        bos_token_id: int | None,
        eos_token_ids: torch.Tensor,
        weight: float,
        num_hypotheses: int = 1,
    ):
        if not 0 < weight <= 1:
            raise ValueError(f"ctc_weight must be above 0 and at most 1, got {weight}.")
        dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # sums of thousands of logarithms
        # The hypotheses of an utterance share its frames: (batch, frames, vocab_size).
        log_probs, mask = logits[::num_hypotheses].to(dtype).log_softmax(-1), mask[::num_hypotheses]
        # Frames of padding are blank for certain, which leaves every probability at the last real frame as it is.
        log_probs = torch.where(mask[..., None] > 0, log_probs, IMPOSSIBLE)
        log_probs[..., blank_token_id] = torch.where(mask > 0, log_probs[..., blank_token_id], 0.0)
        self.log_probs = log_probs.clamp(min=IMPOSSIBLE)
        unsaid = [token for token in (blank_token_id, bos_token_id) if token is not None]
        self.unsaid_token_ids = torch.tensor(unsaid, device=logits.device)
        self.eos_token_ids = eos_token_ids
        self.no_text_ids = torch.cat((eos_token_ids, self.unsaid_token_ids))
        self.weight = weight
        self.num_hypotheses = num_hypotheses
        self.probs = self.log_probs.exp()
        self.input_ids = None  # of the last call
        self.blanks = self.log_probs[..., blank_token_id].repeat_interleave(num_hypotheses, 0)  # (rows, frames)
        self._begin()

    def _begin(self):
        """The state of the empty transcript, for every row."""
        rows, frames = self.blanks.shape
        self.ends_in_token = self.blanks.new_full((rows, frames), IMPOSSIBLE)  # log r^n
        self.ends_in_blank = self.blanks.cumsum(-1)  # log r^b
        self.prefix = self.blanks.new_zeros(rows)  # log psi
        self.last = torch.full((rows,), -1, device=self.blanks.device)

    def _before(self) -> tuple[torch.Tensor, torch.Tensor]:
        """log r^n and log r^b one frame earlier, `(rows, frames)`."""
        ends_in_token = torch.nn.functional.pad(self.ends_in_token[:, :-1], (1, 0), value=IMPOSSIBLE)
        first = torch.where(self.last < 0, 0.0, IMPOSSIBLE)[:, None].to(self.blanks.dtype)
        return ends_in_token, torch.cat((first, self.ends_in_blank[:, :-1]), dim=-1)

    def _heard(self, tokens: torch.Tensor) -> torch.Tensor:
        """log p_t of each row's own token, `(rows,)` to `(rows, frames)`."""
        tokens = tokens.unflatten(0, (-1, 1, self.num_hypotheses))
        log_probs = self.log_probs.gather(2, tokens.expand(-1, self.log_probs.shape[1], -1))
        return log_probs.transpose(1, 2).flatten(0, 1)

    def _advance(self, tokens: torch.Tensor):
        """Takes one more token for each row, `(rows,)`. An end of sequence or padding changes nothing."""
        is_text = ~torch.isin(tokens, self.no_text_ids)
        before_token, before_blank = self._before()
        inputs = torch.where((tokens == self.last)[:, None], before_blank, torch.logaddexp(before_token, before_blank))
        heard = self._heard(tokens)
        ends_in_token = log_cumulative_products(heard, inputs)
        arriving = torch.nn.functional.pad(ends_in_token[:, :-1], (1, 0), value=IMPOSSIBLE)
        ends_in_blank = log_cumulative_products(self.blanks, arriving)
        self.ends_in_token = torch.where(is_text[:, None], ends_in_token, self.ends_in_token)
        self.ends_in_blank = torch.where(is_text[:, None], ends_in_blank, self.ends_in_blank)
        self.prefix = torch.where(is_text, (inputs + heard).logsumexp(-1), self.prefix)
        self.last = torch.where(is_text, tokens, self.last)

    def _follow(self, input_ids: torch.LongTensor):
        """Brings the state to these transcripts so far, `(rows, length)`: a step on from the last call's, of which each
        continues any of its utterance's; otherwise from the beginning."""
        known = self.input_ids
        if known is not None and input_ids.shape[1] == known.shape[1] + 1:
            # The rows of an utterance are its beams, which search reorders.
            now, then = (ids.unflatten(0, (-1, self.num_hypotheses)) for ids in (input_ids[:, :-1], known))
            same = (now[:, :, None] == then[:, None]).all(-1)  # (batch, beams, beams)
            if same.any(-1).all():
                first = torch.arange(0, len(known), self.num_hypotheses, device=known.device)[:, None]
                parent = (same.to(torch.uint8).argmax(-1) + first).flatten()
                for name in ("ends_in_token", "ends_in_blank", "prefix", "last"):
                    setattr(self, name, getattr(self, name)[parent])
                self._advance(input_ids[:, -1])
                self.input_ids = input_ids
                return
        self._begin()
        for tokens in input_ids[:, 1:].unbind(-1):  # the first is the begin of sequence
            self._advance(tokens)
        self.input_ids = input_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(rows, length)`): transcripts so far, with the begin of sequence.
            scores (`torch.FloatTensor` of shape `(rows, vocab_size)`): the decoder's, as logits or log-probabilities.

        Returns:
            `torch.FloatTensor` of shape `(rows, vocab_size)`: scores, logarithmic; minus infinity for the begin of
            sequence and padding.
        """
        self._follow(input_ids)
        before_token, before_blank = self._before()
        inputs = torch.logaddexp(before_token, before_blank)
        # log psi(g c), (rows, vocab_size): a product of matrices, scaled by the largest input, is a sum over frames.
        # What underflows there is a transcript hundreds of decades less likely than others.
        scale = inputs.amax(-1, keepdim=True)
        share = (inputs - scale).exp().unflatten(0, (-1, self.num_hypotheses))  # (batch, hypotheses, frames)
        heard = scale + (share @ self.probs).flatten(0, 1).log().clamp(min=IMPOSSIBLE)
        # A repeated token needs a blank between, or it would be the same.
        last = self.last.clamp(min=0)
        repeated = (before_blank + self._heard(last)).logsumexp(-1, keepdim=True)
        last = last[:, None]
        heard = heard.scatter(1, last, torch.where(self.last[:, None] >= 0, repeated, heard.gather(1, last)))
        whole = torch.logaddexp(self.ends_in_token[:, -1], self.ends_in_blank[:, -1])
        heard[:, self.eos_token_ids] = whole[:, None]
        heard = (heard - self.prefix[:, None]).clamp(min=IMPOSSIBLE)
        if self.weight < 1:
            heard = self.weight * heard + (1 - self.weight) * scores.to(heard.dtype).log_softmax(-1)
        heard[:, self.unsaid_token_ids] = -torch.inf
        return heard.to(scores.dtype)


__all__ = ["EchoCTCPrefixLogitsProcessor"]

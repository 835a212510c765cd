"""Joint decoding by the decoder and the encoder's CTC head, for greedy search, beams and sampling.

The decoder alone may repeat itself or stop too soon; CTC knows how much of the speech a transcript accounts for. CTC
scores a single repeated token seldom low enough, but all repeated words together: so greedy search goes back to an
earlier end of sequence when the score of the text falls below that of the text that ended there."""

import bisect
import functools
import math
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
)
from transformers.generation import GenerationMixin

from .conditioning_echo import precise_dtype
from .configuration_echo import WHISPER_SETTINGS

IMPOSSIBLE = -1e10  # log-probability; finite, since a difference of infinities is NaN
# Greedy search goes back to an earlier end if the text scores lower by END_MARGIN (a factor of 7), and if CTC gives
# that end at least 1%: so it keeps speech of which only the decoder is unsure.
END_MARGIN = 2.0
LOG_LEAST_END = math.log(0.01)
DRAFT_LENGTH = 16  # tokens of the CTC head's text that the decoder scores in one pass
# Texts that it scores so together; among more, some draft soon fails. Decoding took 0.37 of the time for one, 0.47 for
# two, 0.68 for four, as long for eight.
DRAFT_ROWS = 4
TOO_CLOSE = 1e-3  # difference of two scores; float32 rounds passes of another length by about 1e-5

MAX_HYPOTHESES = 1000  # of an utterance in generate()
TOKEN_SETTINGS = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
)

WHOLE_NUMBERS = (
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "prompt_lookup_num_tokens"),
)
NUMBERS = (
    *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
    *("encoder_repetition_penalty", "length_penalty", "max_time", "penalty_alpha"),
)
SWITCHES = ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values")


def find_cut_off(ids: torch.Tensor, generation_config) -> torch.Tensor:
    """Which texts `(B, L)` of `generate()` were stopped for their length, `(B,)`; none without an `eos_token_id`."""
    if generation_config.eos_token_id is None:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    return ~torch.isin(ids, torch.as_tensor(generation_config.eos_token_id, device=ids.device)).any(-1)


def drop_whisper_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of generate() without those of Whisper.

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


def check_kinds(settings: dict[str, Any]):
    """Raises a `ValueError` that names a setting of `generate()` that is of another kind than it must be."""
    for names, kind, words in (
        (WHOLE_NUMBERS, Integral, "a whole number"),
        (NUMBERS, Real, "a number"),
        (SWITCHES, bool, "true or false"),
    ):
        for name in names:
            value = settings.get(name)
            is_of_kind = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
            if not (value is None or is_of_kind or torch.is_tensor(value)):
                raise ValueError(f"{name} must be {words}, or left out, got {value!r}.")
    decay = settings.get("exponential_decay_length_penalty")
    if decay is not None and not (
        isinstance(decay, list | tuple) and len(decay) == 2 and all(isinstance(value, Real) for value in decay)
    ):
        raise ValueError(
            f"exponential_decay_length_penalty must be two numbers, the first token and the factor, got {decay!r}."
        )


def check_generation_config(generation_config: GenerationConfig, vocab_size: int):
    """Raises a `ValueError` that names a setting of generate() that would fail deep inside it, or not at all."""
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
    """log x of `x_t = a_t * (x_{t-1} + b_t)` for all t at once, `x` before the first being 0, from log a and log b,
    each `(rows, frames)`. Divided by the product of all factors so far, the recurrence is a running sum."""
    products = factors.cumsum(-1)
    return products + torch.logcumsumexp(inputs + factors - products, dim=-1)


class EarlierEnd(NamedTuple):
    """The best end of sequence that each row of greedy search passed by.

    A score is a sum of log-probabilities and only falls: a text that scores less than an ended beginning of it will not
    catch up."""

    score: torch.Tensor  # (rows,), of the text so far
    best_score: torch.Tensor  # (rows,), the highest of a text that ended
    best_length: torch.Tensor  # (rows,), tokens of that text, without its end
    best_token: torch.Tensor  # (rows,), its end

    @classmethod
    def none(cls, score: torch.Tensor) -> "EarlierEnd":
        nothing = torch.zeros_like(score, dtype=torch.long)
        return cls(score, torch.full_like(score, -torch.inf), nothing, nothing)

    def consider(
        self, lengths: int | torch.Tensor, tokens: torch.Tensor, scores: torch.Tensor, is_possible: torch.Tensor
    ) -> "EarlierEnd":
        """With an end of the given score behind so many tokens, where it is possible; each `(rows,)`."""
        scores = self.score + scores
        better = (scores > self.best_score) & is_possible
        found = (scores, lengths, tokens)
        return EarlierEnd(self.score, *(torch.where(better, new, old) for new, old in zip(found, self[1:])))

    @property
    def is_passed(self) -> torch.Tensor:
        """Whether the text should have ended there, `(rows,)`."""
        return self.score < self.best_score - END_MARGIN


class PrefixState(NamedTuple):
    """What CTC knows of each row's transcript so far, in logarithms. Column 0 of frames is before the first."""

    ends_in_any: torch.Tensor  # (rows, 1 + frames), r^n + r^b
    ends_in_blank: torch.Tensor  # (rows, 1 + frames), r^b
    prefix: torch.Tensor  # (rows,), psi
    last_token: torch.Tensor  # (rows,), the blank if the transcript is empty
    heard_last: torch.Tensor  # (rows, frames), p_t of that token


class EchoCTCPrefixLogitsProcessor(LogitsProcessor):
    r"""Scores of the next token by decoder and CTC: `(1 - w) * log p_decoder + w * log p_CTC`.

    `p_CTC` of token c after the transcript g is `psi(g c) / psi(g)`, with `psi(g)` the probability, summed over all
    alignments, that the speech's transcript begins with g; for the end of sequence, that it is g (Watanabe et al.,
    2017, algorithm 2, https://doi.org/10.1109/JSTSP.2017.2763455). With `r^n_t(g)` and `r^b_t(g)` the probabilities
    that the frames up to t read g and end in its last token, or in a blank:

        phi_t   = r^b_{t-1}(g) + (r^n_{t-1}(g) unless c is g's last token)
        psi(gc) = sum_t phi_t p_t(c)
        r^n_t(gc) = p_t(c) (r^n_{t-1}(gc) + phi_t)
        r^b_t(gc) = p_t(blank) (r^b_{t-1}(gc) + r^n_{t-1}(gc))

    A step costs frames times vocabulary for each row, without a loop over frames. Probabilities are in float32, at
    least 1e-38; the recurrences are in float64.

    Args:
        logits (`torch.Tensor` of shape `(rows, frames, vocab_size)`):
            Of the CTC head, a row for each hypothesis; those of an utterance lie together.
        mask (`torch.Tensor` of shape `(rows, frames)`): 1 for real frames.
        blank_token_id, bos_token_id (`int`): Never written, unless they are ends of sequence too.
        eos_token_ids (`torch.Tensor` of shape `(ends,)`): Ends of sequence.
        weight (`float`): w; at 1 the decoder has no say.
        num_hypotheses (`int`, defaults to 1): Beams or samples of each utterance.

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
        self.blank_token_id = blank_token_id
        self.eos_token_ids = eos_token_ids
        self.weight = weight
        self.num_hypotheses = num_hypotheses
        # The hypotheses of an utterance share its frames.
        logits, mask = logits[::num_hypotheses], mask[::num_hypotheses] > 0
        probs = logits.float().softmax(-1).clamp_(min=torch.finfo(torch.float32).tiny)
        # Padding is blank for certain, which changes no probability.
        is_blank = torch.arange(logits.shape[-1], device=logits.device) == blank_token_id
        probs[~mask] = is_blank.float()
        self.probs = probs
        ends = eos_token_ids.tolist()
        unsaid = [token for token in (blank_token_id, bos_token_id) if token is not None and token not in ends]
        self.unsaid_token_ids = torch.tensor(unsaid, dtype=torch.long, device=logits.device)
        self.is_text = torch.ones_like(is_blank)
        self.is_text[torch.cat((eos_token_ids, self.unsaid_token_ids))] = False
        nothing = torch.full_like(probs[:1, 0], -torch.inf)  # (1, vocab_size)
        self.after_end, self.only_end = nothing, nothing.clone()
        self.only_end[:, eos_token_ids] = 0.0
        self.set_padding(blank_token_id)
        rows = torch.arange(len(probs) * num_hypotheses, device=logits.device)
        self.utterances = rows // num_hypotheses
        self.blanks = self.heard(torch.full_like(rows, blank_token_id))  # (rows, frames)
        self.goes_back = False  # set by greedy search
        self.prompt_length = None
        self.records = {}  # of the last calls, by length

    def heard(self, tokens: torch.Tensor) -> torch.Tensor:
        """log p_t of each row's own token, `(rows,)` to `(rows, frames)`."""
        probs = self.probs.transpose(1, 2)[self.utterances, tokens]
        return probs.to(precise_dtype(probs.device)).log().clamp(min=IMPOSSIBLE)

    def begin(self) -> PrefixState:
        """The state of the empty transcript."""
        ends_in_blank = torch.nn.functional.pad(self.blanks.cumsum(-1), (1, 0))
        empty = torch.full_like(self.utterances, self.blank_token_id)
        return PrefixState(ends_in_blank, ends_in_blank, torch.zeros_like(ends_in_blank[:, 0]), empty, self.blanks)

    def advance(self, state: PrefixState, tokens: torch.Tensor) -> PrefixState:
        """The state after one more token of each row, `(rows,)`. Blanks and ends of sequence change nothing."""
        repeats = (tokens == state.last_token)[:, None]  # they need a blank between
        inputs = torch.where(repeats, state.ends_in_blank[:, :-1], state.ends_in_any[:, :-1])
        heard = self.heard(tokens)
        ends_in_token = log_cumulative_products(heard, inputs)
        ends_in_token = torch.nn.functional.pad(ends_in_token, (1, 0), value=IMPOSSIBLE)
        ends_in_blank = log_cumulative_products(self.blanks, ends_in_token[:, :-1])
        ends_in_blank = torch.nn.functional.pad(ends_in_blank, (1, 0), value=IMPOSSIBLE)
        ends_in_any = torch.logaddexp(ends_in_token, ends_in_blank)
        after = (ends_in_any, ends_in_blank, (inputs + heard).logsumexp(-1), tokens, heard)
        is_text = self.is_text[tokens]
        if not is_text.all():
            where = [is_text[:, None] if new.dim() == 2 else is_text for new in after]
            after = map(torch.where, where, after, state)
        return PrefixState(*after)

    def score(self, state: PrefixState, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, `(rows, vocab_size)`, float32, from those of the decoder."""
        inputs, before_blank = state.ends_in_any[:, :-1], state.ends_in_blank[:, :-1]
        # log psi(g c), (rows, vocab_size): a product of matrices, scaled by the largest input, is a sum over frames.
        scale = inputs.amax(-1, keepdim=True)
        share = (inputs - scale).float().exp().unflatten(0, (-1, self.num_hypotheses))  # (batch, hypotheses, frames)
        prefix = state.prefix[:, None]
        heard = (share @ self.probs).flatten(0, 1).clamp(min=torch.finfo(torch.float32).tiny).log()
        heard = heard + (scale - prefix).float()
        # A repeated token needs a blank between.
        repeated = (before_blank + state.heard_last).logsumexp(-1, keepdim=True) - prefix
        heard = heard.scatter(1, state.last_token[:, None], repeated.float())
        heard[:, self.eos_token_ids] = (state.ends_in_any[:, -1:] - prefix).float()
        if self.weight < 1:
            heard = self.weight * heard + (1 - self.weight) * scores.float().log_softmax(-1)
        heard[:, self.unsaid_token_ids] = -torch.inf
        return heard

    def end_early(
        self,
        scores: torch.Tensor,
        state: PrefixState,
        earlier_end: EarlierEnd,
        lengths: int | torch.Tensor,
        is_going_on: torch.Tensor,
    ) -> tuple[torch.Tensor, EarlierEnd]:
        """Scores of the next token that allow only the end where the text should have ended before, and what is known
        of earlier ends."""
        end_scores, best = scores[:, self.eos_token_ids].max(-1)
        is_possible = (state.ends_in_any[:, -1] - state.prefix > LOG_LEAST_END) & is_going_on
        earlier_end = earlier_end.consider(lengths, self.eos_token_ids[best], end_scores, is_possible)
        return torch.where(earlier_end.is_passed[:, None], self.only_end, scores), earlier_end

    def set_padding(self, pad_token_id: int):
        """Sets what follows an end of sequence."""
        self.pad_token_id = pad_token_id
        self.after_end.fill_(-torch.inf)[:, pad_token_id] = 0.0

    def _follow(self, input_ids: torch.LongTensor) -> tuple[PrefixState, EarlierEnd | None]:
        """State and earlier ends of the transcripts `(rows, length)`: one step on from a recorded call if each
        continues a transcript of its utterance, else from the beginning."""
        record = self.records.get(input_ids.shape[1] - 1)
        if record is not None:
            known, state, earlier_end, scores = record
            tokens = input_ids[:, -1]
            if torch.equal(input_ids[:, :-1], known):
                if earlier_end is not None:
                    score = earlier_end.score + scores.gather(1, tokens[:, None])[:, 0]
                    earlier_end = earlier_end._replace(score=score)
                return self.advance(state, tokens), earlier_end
            # Beam search reorders the rows of an utterance.
            now, then = (ids.unflatten(0, (-1, self.num_hypotheses)) for ids in (input_ids[:, :-1], known))
            same = (now[:, :, None] == then[:, None]).all(-1)  # (batch, beams, beams)
            if same.any(-1).all():
                first = torch.arange(0, len(known), self.num_hypotheses, device=known.device)[:, None]
                parent = (same.to(torch.uint8).argmax(-1) + first).flatten()
                return self.advance(PrefixState(*(part[parent] for part in state)), tokens), None
        state = self.begin()
        for tokens in input_ids[:, 1:].unbind(-1):  # the first is the begin of sequence
            state = self.advance(state, tokens)
        is_prompt = self.goes_back and input_ids.shape[1] == self.prompt_length
        return state, EarlierEnd.none(torch.zeros_like(state.prefix)) if is_prompt else None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Joint scores, `(rows, vocab_size)`, of the transcripts `(rows, length)` from those of the decoder, logits or
        log-probabilities. Begin of sequence and padding have minus infinity; in finished rows all but padding has."""
        length = input_ids.shape[1]
        if self.prompt_length is None:
            self.prompt_length = length
        state, earlier_end = self._follow(input_ids)
        is_finished = ~self.is_text[input_ids[:, self.prompt_length :]].all(-1)
        joint = self.score(state, scores)
        if earlier_end is not None:
            joint, earlier_end = self.end_early(joint, state, earlier_end, length, ~is_finished)
        joint = torch.where(is_finished[:, None], self.after_end, joint)
        if len(input_ids) > 1:  # only assisted generation, of one row, rewinds
            self.records.clear()
        self.records[length] = (input_ids, state, earlier_end, joint)
        return joint.to(scores.dtype)

    def go_back(self, output, earlier_end: EarlierEnd | None = None):
        """The output of `generate()` with each text ended where it would have scored best."""
        sequences = output if torch.is_tensor(output) else output.sequences
        if earlier_end is None:
            _, earlier_end = self._follow(sequences)
        if earlier_end is None or not earlier_end.is_passed.any():
            return output
        lengths = torch.where(earlier_end.is_passed, earlier_end.best_length, sequences.shape[1])[:, None]
        places = torch.arange(sequences.shape[1], device=sequences.device)
        sequences = torch.where(places == lengths, earlier_end.best_token[:, None], sequences)
        sequences = sequences.masked_fill(places > lengths, self.pad_token_id)
        longest = int((sequences != self.pad_token_id).any(0).nonzero()[-1]) + 1
        sequences = sequences[:, :longest]
        if torch.is_tensor(output):
            return sequences
        output.sequences = sequences
        for name in ("scores", "logits", "decoder_attentions", "cross_attentions", "decoder_hidden_states"):
            if output.get(name) is not None:
                output[name] = output[name][: longest - self.prompt_length]
        if output.scores is not None:
            output.scores = tuple(
                torch.where(place > lengths, self.after_end.to(scores.dtype), scores)
                for place, scores in enumerate(output.scores, self.prompt_length)
            )
        return output


class CTCDraft:
    """The text of the CTC head alone: a draft, of which the decoder scores many tokens in one pass."""

    def __init__(self, joint: EchoCTCPrefixLogitsProcessor):
        self.blank_token_id, self.eos_token_id = joint.blank_token_id, int(joint.eos_token_ids[0])
        path = joint.probs.argmax(-1)
        before = torch.nn.functional.pad(path[:, :-1], (1, 0), value=joint.blank_token_id)
        begins = (path != before) & (path != joint.blank_token_id)
        self.frames = [row.nonzero()[:, 0].tolist() for row in begins]
        self.tokens = [row[here].tolist() for row, here in zip(path, begins)]

    def after(self, state: PrefixState) -> torch.Tensor:
        """The next `DRAFT_LENGTH` tokens of each text, `(rows, DRAFT_LENGTH)`: those that begin later than the frame in
        which the text so far has most likely been read, then an end of sequence and blanks."""
        rows = []
        for frame, frames, tokens in zip(state.ends_in_any.argmax(-1).tolist(), self.frames, self.tokens):
            first = bisect.bisect_left(frames, frame)
            row = [*tokens[first : first + DRAFT_LENGTH], self.eos_token_id]
            rows.append((row + [self.blank_token_id] * DRAFT_LENGTH)[:DRAFT_LENGTH])
        return torch.tensor(rows, device=state.prefix.device)


class EchoGenerationMixin(GenerationMixin):
    """Greedy search by decoder and CTC, which goes back to an end that it should not have passed by.

    In small batches the decoder scores the text of CTC, several tokens at a time. The result is the same as with one
    token at a time: what follows the first token that differs from the draft is drafted anew, and where the two best
    tokens are closer than the rounding of a longer pass, search starts over with one token at a time."""

    @functools.wraps(GenerationMixin._sample)
    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
        if self._can_verify_drafts(*arguments):
            joint, cache = logits_processor[0], kwargs["past_key_values"]
            joint.set_padding(generation_config._pad_token_tensor)
            sequences = self._verify_drafts(input_ids, joint, stopping_criteria.max_length, kwargs)
            if sequences is not None:
                return sequences
            cache.crop(-cache.get_seq_length())
        return self._go_back(super()._sample, *arguments)

    # `generate()` reads its arguments from the signature.
    @functools.wraps(GenerationMixin._assisted_decoding)
    def _assisted_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
        return self._go_back(super()._assisted_decoding, *arguments)

    def _go_back(self, search, input_ids, logits_processor, stopping_criteria, generation_config, kwargs):
        joint = next((each for each in logits_processor if isinstance(each, EchoCTCPrefixLogitsProcessor)), None)
        if joint is None or generation_config.is_assistant:  # an assistant is lent the processor
            return search(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        joint.set_padding(generation_config._pad_token_tensor)
        # Samples are other texts than the most likely, and a least length excludes earlier ends.
        has_least_length = generation_config.min_length or generation_config.min_new_tokens
        joint.goes_back = not (generation_config.do_sample or has_least_length or not len(joint.eos_token_ids))
        output = search(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        return joint.go_back(output) if joint.goes_back else output

    def _can_verify_drafts(self, input_ids, logits_processor, stopping_criteria, generation_config, kwargs) -> bool:
        """Whether only the texts of greedy search are wanted, from decoder and CTC alone."""
        joint = logits_processor[0] if len(logits_processor) == 1 else None
        if not isinstance(joint, EchoCTCPrefixLogitsProcessor) or joint.num_hypotheses > 1 or self.training:
            return False
        if len(input_ids) > DRAFT_ROWS or self.dtype != torch.float32:  # less precise ones round too much
            return False
        if generation_config.do_sample or generation_config.return_dict_in_generate or generation_config.is_assistant:
            return False
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        cache = kwargs.get("past_key_values")
        ends = [each.eos_token_id for each in stopping_criteria if type(each) is EosTokenCriteria]
        lengths = [each.max_length for each in stopping_criteria if type(each) is MaxLengthCriteria]
        return (
            {"encoder_outputs", "past_key_values", "use_cache"} <= given
            and given <= {"encoder_outputs", "attention_mask", "past_key_values", "use_cache"}
            and isinstance(cache, EncoderDecoderCache)
            and type(cache.self_attention_cache) is DynamicCache
            and cache.get_seq_length() == 0
            and len(ends) == len(lengths) == 1
            and len(stopping_criteria) == 2
            and torch.equal(ends[0].to(joint.eos_token_ids.device), joint.eos_token_ids)
        )

    def _verify_drafts(
        self, input_ids: torch.Tensor, joint: EchoCTCPrefixLogitsProcessor, max_length: int, kwargs: dict
    ) -> torch.Tensor | None:
        """Texts of greedy search, `(rows, length)`, or `None` where two tokens are too close to choose from."""
        cache = kwargs["past_key_values"]
        heard = {name: kwargs.get(name) for name in ("encoder_outputs", "attention_mask")}
        draft, state, pad = CTCDraft(joint), joint.begin(), int(joint.pad_token_id)
        for tokens in input_ids[:, 1:].unbind(-1):
            state = joint.advance(state, tokens)
        earlier_end = EarlierEnd.none(torch.zeros_like(state.prefix))
        rows = torch.arange(len(input_ids), device=input_ids.device)
        lengths = torch.full_like(rows, input_ids.shape[1])
        is_going_on = torch.ones_like(rows, dtype=torch.bool)
        while is_going_on.any():
            drafted = draft.after(state)
            ids = torch.nn.functional.pad(input_ids, (0, DRAFT_LENGTH + 1), value=pad)
            places = lengths[:, None] + torch.arange(DRAFT_LENGTH, device=ids.device)
            # From the last token of the shortest text, whose keys the cache lacks.
            start = int(lengths[is_going_on].min()) - 1
            stop = min(int(lengths[is_going_on].max()) + DRAFT_LENGTH, max_length)
            cache.crop(min(start - cache.get_seq_length(), 0))
            fed = ids.scatter(1, places, drafted)[:, start:stop]
            logits = self(decoder_input_ids=fed, past_key_values=cache, use_cache=True, **heard).logits
            is_open = is_going_on  # rows whose draft has held so far
            is_close = torch.zeros_like(is_open)
            for drafted_tokens in (*drafted.unbind(-1), None):
                here = (lengths - 1 - start).clamp(0, logits.shape[1] - 1)  # anywhere for rows that have ended
                scores = joint.score(state, logits[rows, here])
                scores, earlier_end = joint.end_early(scores, state, earlier_end, lengths, is_open)
                (best, second), (tokens, _) = (part.unbind(-1) for part in scores.topk(2))
                is_close |= is_open & (best - second < TOO_CLOSE)
                tokens = torch.where(is_open, tokens, pad)
                earlier_end = earlier_end._replace(score=earlier_end.score + torch.where(is_open, best, 0.0))
                ids[rows, lengths] = tokens  # or padding where padding is
                state = joint.advance(state, tokens)
                lengths = lengths + is_open
                has_ended = torch.isin(tokens, joint.eos_token_ids) | (lengths >= max_length)
                is_going_on = is_going_on & ~(is_open & has_ended)
                if drafted_tokens is None:
                    break
                is_open = is_open & is_going_on & (tokens == drafted_tokens)
                if not is_open.any():
                    break
            if is_close.any():
                return None
            input_ids = ids[:, : int(lengths.max())]
        return joint.go_back(input_ids, earlier_end)


__all__ = ["EchoCTCPrefixLogitsProcessor", "EchoGenerationMixin"]

"""When each token was said: the best monotone alignment of tokens to encoder frames, in numpy.

`align_by_ctc` uses the probabilities of the CTC head, `align_by_attention` the decoder's attention."""

from collections.abc import Sequence

import numpy as np

CERTAIN = 0.1  # of a token's largest attention; frames with less at the edges of its stretch are left out


def align_by_ctc(log_probs: np.ndarray, tokens: Sequence[int], blank: int = 0) -> np.ndarray | None:
    """The most probable path through CTC that spells the tokens, by Viterbi's algorithm over the states `- t1 - t2 -
    ... -` (Graves et al., https://doi.org/10.1145/1143844.1143891, section 4.1).

    Args:
        log_probs: shape `(frames, vocabulary)`.
        tokens: ids, none of them the blank.
        blank: id of the blank.

    Returns:
        int, shape `(tokens, 2)`: each token's first frame and the frame behind its last, without overlap. None if there
        are fewer frames than CTC needs: one a token, and one between two of the same.
    """
    num_frames, num_tokens = len(log_probs), len(tokens)
    if num_tokens == 0:
        return np.zeros((0, 2), dtype=int)
    states = np.full(2 * num_tokens + 1, blank)
    states[1::2] = tokens
    repeats = states[3::2] == states[1:-2:2]
    if num_frames < num_tokens + np.count_nonzero(repeats):
        return None
    # A blank may be skipped between two tokens, unless they are the same.
    may_skip = np.zeros(len(states), dtype=bool)
    may_skip[3::2] = ~repeats
    emissions = np.asarray(log_probs, dtype=np.float64)[:, states]
    score = np.full(len(states), -np.inf)
    score[:2] = emissions[0, :2]
    steps = np.zeros((num_frames, len(states)), dtype=np.int8)  # states to go back from each
    for frame in range(1, num_frames):
        came = np.full((3, len(states)), -np.inf)
        came[0] = score
        came[1, 1:] = score[:-1]
        came[2, 2:] = np.where(may_skip[2:], score[:-2], -np.inf)
        steps[frame] = came.argmax(axis=0)
        score = came.max(axis=0) + emissions[frame]
    state = len(states) - 1 if score[-1] >= score[-2] else len(states) - 2
    path = np.empty(num_frames, dtype=int)
    for frame in range(num_frames - 1, -1, -1):
        path[frame] = state
        state -= int(steps[frame, state])  # int8 would not hold the states of 64 tokens
    odd = np.arange(1, len(states), 2)
    return np.stack([np.searchsorted(path, odd, side="left"), np.searchsorted(path, odd, side="right")], axis=1)


def align_by_attention(weights: np.ndarray) -> np.ndarray:
    """Frames shared out among tokens, both in order, with the largest sum of attention: `max over i_1 <= ... <= i_S of
    the sum of weights[i_s, s]`, by dynamic programming.

    Args:
        weights: attention of each token to each frame, shape `(tokens, frames)`.

    Returns:
        int, shape `(tokens, 2)`: each token's first frame and the frame behind its last, without overlap and without
        frames at either edge with little attention. A token without a frame has an empty stretch.
    """
    num_tokens, num_frames = weights.shape
    if not num_tokens:
        return np.zeros((0, 2), dtype=int)
    score = np.zeros(num_tokens)
    came_from = np.zeros((num_frames, num_tokens), dtype=int)
    tokens = np.arange(num_tokens)
    for frame in range(num_frames):
        best = np.maximum.accumulate(score)
        # The last token up to here that has the best score.
        came_from[frame] = np.maximum.accumulate(np.where(score >= best, tokens, 0))
        score = best + weights[:, frame]
    path = np.empty(num_frames, dtype=int)
    token = int(score.argmax())
    for frame in range(num_frames - 1, -1, -1):
        path[frame] = token
        token = came_from[frame, token]
    spans = np.stack([np.searchsorted(path, tokens, side="left"), np.searchsorted(path, tokens, side="right")], axis=1)
    for token, (start, stop) in enumerate(spans):
        if stop > start:
            heard = np.flatnonzero(weights[token, start:stop] >= CERTAIN * weights[token, start:stop].max())
            spans[token] = start + heard[0], start + heard[-1] + 1
    return spans

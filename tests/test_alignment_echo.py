"""The alignments are the best of all: against brute force, and where the answer is known."""

from itertools import combinations_with_replacement, groupby, product

import numpy as np
import pytest

from echo_hf.alignment_echo import align_by_attention, align_by_ctc


def log_probabilities(path: list[int], vocabulary: int = 6, confidence: float = 0.9) -> np.ndarray:
    """Log-probabilities that favour a path."""
    probabilities = np.full((len(path), vocabulary), (1 - confidence) / (vocabulary - 1))
    probabilities[np.arange(len(path)), path] = confidence
    return np.log(probabilities)


def test_a_known_path_through_ctc():
    path = [0, 0, 3, 3, 0, 3, 4, 4, 4, 0, 5, 0, 0]
    spans = align_by_ctc(log_probabilities(path), [3, 3, 4, 5])
    assert spans.tolist() == [[2, 4], [5, 6], [6, 9], [10, 11]]


@pytest.mark.parametrize("num_tokens", [63, 64, 200])
def test_long_texts(num_tokens):
    tokens = [1 + i % 5 for i in range(num_tokens)]
    spans = align_by_ctc(log_probabilities([token for token in tokens for _ in range(2)]), tokens)
    assert spans.tolist() == [[2 * i, 2 * i + 2] for i in range(num_tokens)]


def test_ctc_finds_the_best_of_all_paths():
    generator = np.random.default_rng(0)
    for _ in range(60):
        num_frames, num_tokens = generator.integers(1, 7), generator.integers(1, 4)
        tokens = generator.integers(1, 3, num_tokens).tolist()
        log_probs = np.log(generator.dirichlet(np.ones(3), num_frames))
        best = max(
            (
                sum(log_probs[frame, token] for frame, token in enumerate(path))
                for path in product(range(3), repeat=num_frames)
                if [token for token, _ in groupby(path) if token] == tokens
            ),
            default=None,
        )
        spans = align_by_ctc(log_probs, tokens)
        if best is None:
            assert spans is None
            continue
        path = np.zeros(num_frames, dtype=int)
        for token, (start, stop) in zip(tokens, spans):
            assert not path[start:stop].any() and stop > start
            path[start:stop] = token
        assert [token for token, _ in groupby(path) if token] == tokens
        assert log_probs[np.arange(num_frames), path].sum() == pytest.approx(best)


def test_ctc_needs_a_frame_for_each_token_and_between_two_of_the_same():
    assert align_by_ctc(log_probabilities([0] * 2), [1, 2]) is not None
    assert align_by_ctc(log_probabilities([0] * 2), [1, 1]) is None
    assert align_by_ctc(log_probabilities([0] * 3), [1, 1]).tolist() == [[0, 1], [2, 3]]
    assert align_by_ctc(log_probabilities([0] * 3), []).shape == (0, 2)


def test_another_blank():
    spans = align_by_ctc(log_probabilities([5, 0, 0, 5, 1]), [0, 1], blank=5)
    assert spans.tolist() == [[1, 3], [4, 5]]


def test_attention_on_stretches_of_frames():
    stretches = [(0, 3), (3, 4), (4, 9), (9, 12)]
    weights = np.full((4, 12), 0.01)
    for token, (start, stop) in enumerate(stretches):
        weights[token, start:stop] = 1.0 / (stop - start)
    assert align_by_attention(weights).tolist() == [list(stretch) for stretch in stretches]


def test_no_tokens_have_no_stretches():
    assert align_by_attention(np.zeros((0, 5))).shape == (0, 2)


def test_frames_that_no_token_attends_to_are_left_out_at_the_edges():
    weights = np.zeros((2, 10))
    weights[0, 2:4] = 0.5
    weights[1, 7:8] = 1.0
    assert align_by_attention(weights).tolist() == [[2, 4], [7, 8]]


def test_attention_finds_the_best_of_all_monotone_paths():
    generator = np.random.default_rng(0)
    for _ in range(60):
        num_tokens, num_frames = generator.integers(1, 5), generator.integers(1, 7)
        weights = generator.dirichlet(np.ones(num_frames), num_tokens)
        best = max(
            combinations_with_replacement(range(num_tokens), num_frames),
            key=lambda path: sum(weights[token, frame] for frame, token in enumerate(path)),
        )
        spans = align_by_attention(weights)
        assert (np.diff(spans.ravel()) >= 0).all() and spans.min() >= 0 and spans.max() <= num_frames
        for token, (start, stop) in enumerate(spans):
            frames = [frame for frame in range(num_frames) if best[frame] == token]
            assert (stop > start) == bool(frames)
            if frames:  # but for the frames it hardly attends to
                assert frames[0] <= start < stop <= frames[-1] + 1
                assert weights[token, start:stop].max() == weights[token, frames].max()

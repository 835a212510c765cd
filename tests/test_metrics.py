"""Error rates of what the Trainer hands over."""

import numpy as np
import pytest
from transformers import EvalPrediction

from echo_hf.metrics import format_table, make_compute_metrics


class LetterTokenizer:
    """Ids 3.. are the letters from `a` on, 0 to 2 are special; enough to see what is decoded."""

    pad_token_id = 0

    def batch_decode(self, token_ids, skip_special_tokens):
        assert skip_special_tokens
        assert np.asarray(token_ids).min() >= 0, "-100 must not reach the tokenizer"
        return [" ".join(chr(ord("a") + token - 3) for token in row if token > 2) for row in token_ids]


def test_compute_metrics_ignores_padding_of_either_kind():
    compute_metrics = make_compute_metrics(LetterTokenizer())
    labels = np.array([[3, 4, 2, -100], [5, 2, -100, -100]])
    predictions = np.array([[1, 3, 4, 2, 0, 0], [1, 6, 2, -100, -100, -100]])
    metrics = compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
    assert metrics["wer"] == pytest.approx(1 / 3)
    assert (metrics["word_errors"], metrics["reference_words"], metrics["utterances"]) == (1, 3, 2)
    assert (predictions[1] == -100).sum() == 3, "the Trainer's arrays are left as they were"


def test_compute_metrics_counts_tones_where_there_are_any():
    class SyllableTokenizer:
        pad_token_id = 0

        def batch_decode(self, token_ids, skip_special_tokens):
            return [" ".join(["ma1", "ma2", "mo2"][token - 1] for token in row if token) for row in token_ids]

    labels, predictions = np.array([[1, 2], [3, -100]]), np.array([[1, 1], [3, 0]])
    metrics = make_compute_metrics(SyllableTokenizer())(EvalPrediction(predictions=predictions, label_ids=labels))
    assert metrics["wer"] == metrics["tone_error_rate"] == pytest.approx(1 / 3)
    assert metrics["base_syllable_error_rate"] == 0
    assert "tone_error_rate" not in make_compute_metrics(LetterTokenizer())(
        EvalPrediction(predictions=np.array([[3]]), label_ids=np.array([[3]]))
    )


def test_compute_metrics_refuses_logits():
    prediction = EvalPrediction(predictions=np.zeros((2, 3, 5)), label_ids=np.zeros((2, 3), dtype=int))
    with pytest.raises(ValueError, match="predict_with_generate"):
        make_compute_metrics(LetterTokenizer())(prediction)


def test_compute_metrics_counts_tones_that_are_accents():
    class AccentTokenizer:
        pad_token_id = 0

        def batch_decode(self, token_ids, skip_special_tokens):
            return [" ".join(["ng\u00e1", "nga"][token - 1] for token in row if token) for row in token_ids]

    prediction = EvalPrediction(predictions=np.array([[1, 1]]), label_ids=np.array([[1, 2]]))
    metrics = make_compute_metrics(AccentTokenizer(), tones="accents")(prediction)
    assert (metrics["wer"], metrics["tone_error_rate"], metrics["base_word_error_rate"]) == (0.5, 0.5, 0.0)


def test_a_table_has_all_columns_and_three_digits():
    rows = [{"a": "x", "b": 0.12345}, {"a": 2, "c": 12345.6, "b": None}]
    assert format_table(rows) == "| a | b | c |\n| --- | --- | --- |\n| x | 0.123 |  |\n| 2 |  | 12346 |"

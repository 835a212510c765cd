"""Error rates: known answers, corpus-level sums, and what the Trainer hands over."""

import math

import numpy as np
import pytest
from transformers import EvalPrediction

from echo_hf.metrics import RATES
from echo_hf.metrics import make_compute_metrics
from echo_hf.metrics import normalize_text
from echo_hf.metrics import score


class LetterTokenizer:
    """Ids 3.. are the letters from `a` on, 0 to 2 are special; enough to see what is decoded."""

    pad_token_id = 0

    def batch_decode(self, token_ids, skip_special_tokens):
        assert skip_special_tokens
        assert np.asarray(token_ids).min() >= 0, "-100 must not reach the tokenizer"
        return [" ".join(chr(ord("a") + token - 3) for token in row if token > 2) for row in token_ids]


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("  Hello,\tWORLD!\n", "hello world"),
        ("don\u2019t DON'T don\u02bct", "don't don't don't"),
        ("rock ' n ' roll", "rock n roll"),
        ("well-known", "well known"),
        ("\uff28\uff45\uff4c\uff4c\uff4f", "hello"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u0130STANBUL", normalize_text("i\u0307stanbul")),
        ("[laughter] (yes)", "laughter yes"),
        ("\u0939\u093f\u0928\u094d\u0926\u0940\u0964", "\u0939\u093f\u0928\u094d\u0926\u0940"),
        ("shang4 ren4", "shang4 ren4"),
        ("Nu:3, lu:e4 lu\u03084", "n\u00fc3 l\u00fce4 l\u00fc4"),
        ("menu:3 nu: 3 10:30", "menu 3 nu 3 10 30"),
        ("ma\u02e5\u02e9.", "ma\u02e5\u02e9"),
        ("50%", "50"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalize_text(text, normalized):
    assert normalize_text(text) == normalized
    assert normalize_text(normalized) == normalized


def test_counts_have_the_known_answer():
    result = score(["the cat sat", "on the", "mat"], ["the cat sit", "on", "mat today"])
    assert (result.words.substitutions, result.words.deletions, result.words.insertions) == (1, 1, 1)
    assert result.words.total == 6
    assert result.wer == pytest.approx(3 / 6)
    assert score(["sat"], ["sit"]).cer == pytest.approx(1 / 3)


def test_rates_are_sums_over_sums():
    result = score(["a", "a b c d e f g h i"], ["x", "a b c d e f g h i"])
    assert result.wer == pytest.approx(1 / 10)  # the mean of the two utterances' rates would be 1/2
    assert (result.exact, result.utterances) == (1, 2)


def test_an_empty_hypothesis_is_all_deletions():
    result = score(["one two"], [""])
    assert result.words.deletions == 2
    assert result.wer == 1.0 and result.cer == 1.0


def test_empty_references_count_insertions_and_are_named():
    result = score(["one two", "...", ""], ["one two", "uh huh", ""])
    assert result.empty_references == [1, 2]
    assert result.words.insertions == 2
    assert result.wer == pytest.approx(2 / 2)


def test_rate_of_silence_alone_is_undefined_but_counted():
    result = score(["", ""], ["thank you", ""])
    assert math.isnan(result.wer) and math.isnan(result.cer)
    assert result.words.errors == 2


def test_tones_and_base_syllables_have_the_known_answer():
    result = score(
        ["shang4 ren4", "n\u00fc3 ren2", "Baa1.", ""],  # other tone; no tone; other base; one too many
        ["shang4 ren2", "n\u00fc ren2", "maa1", "ma3"],
    )
    assert (result.words.errors, result.words.total) == (4, 5)
    assert (result.tones.substitutions, result.tones.insertions, result.tones.total) == (2, 1, 5)
    assert (result.base_syllables.substitutions, result.base_syllables.insertions) == (1, 1)
    assert result.tones.rate == pytest.approx(3 / 5) and result.base_syllables.rate == pytest.approx(2 / 5)
    metrics = result.to_dict()
    assert (metrics["tone_error_rate"], metrics["tone_errors"], metrics["reference_tones"]) == (3 / 5, 3, 5)
    assert (metrics["base_syllable_errors"], metrics["reference_base_syllables"]) == (2, 5)
    assert all(name in metrics for rate in RATES.values() for name in (rate.errors, rate.total))


@pytest.mark.parametrize(
    "hypothesis, tone_errors, base_errors",
    [
        ("ma3", 0, 0),
        ("ma4", 1, 0),
        ("mo3", 0, 1),
        ("ma", 1, 0),
        ("ma33", 1, 1),
        ("3", 1, 1),
        ("3ma", 1, 1),
        ("ma 3", 2, 1),
        ("m-a3", 1, 1),
        ("-", 1, 1),
        ("", 1, 1),
    ],
)
def test_a_word_that_is_no_toned_syllable_has_no_tone(hypothesis, tone_errors, base_errors):
    result = score(["ma3"], [hypothesis], normalize=None)
    assert (result.tones.errors, result.base_syllables.errors) == (tone_errors, base_errors)


def test_neither_tones_nor_base_syllables_have_more_errors_than_words():
    generator = np.random.default_rng(0)

    def draw():
        return " ".join(generator.choice(["ma1", "ma2", "mo1", "mo2", "ma", "1"], generator.integers(5)))

    for _ in range(100):
        reference = " ".join(word for word in draw().split() if len(word) == 3) or "ma1"
        result = score([reference], [draw()])
        assert result.tones.total == result.base_syllables.total == result.words.total
        assert max(result.tones.errors, result.base_syllables.errors) <= result.words.errors


@pytest.mark.parametrize("odd", ["hello", "ma", "ma33", "3", "3ma", "m3a", "two 2"])
def test_tones_are_counted_only_where_every_reference_word_has_one(odd):
    for references in (["ma3", odd], [f"ma3 {odd}"], [odd]):
        result = score(references, ["ma3"] * len(references))
        assert result.tones is None and result.base_syllables is None
        assert not any("tone" in name or "syllable" in name for name in result.to_dict())
    assert score(["", ""], ["ma3", ""]).tones is None, "no word, no tone"
    assert score(["ma3", ""], ["ma3", ""]).tones.total == 1
    assert score(["nu:3 lu:e4"], ["nu:3 lu:e4"], normalize=None).tones.errors == 0


def test_without_normalisation_case_counts():
    assert score(["One."], ["one"]).wer == 0
    assert score(["One."], ["one"], normalize=None).wer == 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="2 references .* 1 hypotheses"):
        score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="nothing to score"):
        score([], [])


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

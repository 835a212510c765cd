"""Error rates of words, characters and tones: of texts, and of what `Seq2SeqTrainer` predicts.

Errors are counted in [`echo_hf.speech_errors.error_counts`], which is also a metric of Hugging Face `evaluate`:
`evaluate.load(SPEECH_ERRORS)`. Scoring needs jiwer.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .speech_errors.error_counts import (
    MAX_CHARACTERS,
    RATES,
    ErrorCounts,
    Rate,
    Score,
    has_half_surrogate,
    normalize_text,
    score,
)

SPEECH_ERRORS = str(Path(__file__).parent / "speech_errors")  # the folder for `evaluate.load`, which takes no `Path`


def make_compute_metrics(
    tokenizer, normalize: Callable[[str], str] | None = normalize_text, tones: str = "digits"
) -> Callable[..., dict[str, float | int]]:
    """
    A `compute_metrics` for `Seq2SeqTrainer` with `predict_with_generate=True`.

    Args:
        tokenizer: the tokenizer of the labels, with `batch_decode` and `pad_token_id`.
        normalize (`Callable[[str], str]`, *optional*, defaults to [`normalize_text`]), tones: as of [`score`].

    Returns:
        A function of an `EvalPrediction` (ids, shape `(utterances, tokens)`, padded with -100 or the padding token)
        that returns [`Score.to_dict`]. It raises a `ValueError` for logits, which the Trainer gives without
        `predict_with_generate`: teacher-forced, they look far better than recognition is.
    """

    def decode(token_ids) -> list[str]:
        token_ids = np.where(np.asarray(token_ids) == -100, tokenizer.pad_token_id, token_ids)
        return tokenizer.batch_decode(token_ids, skip_special_tokens=True)

    def compute_metrics(prediction) -> dict[str, float | int]:
        predicted = prediction.predictions
        if isinstance(predicted, tuple) or np.asarray(predicted).ndim != 2:
            raise ValueError(
                "Error rates need generated token ids of shape (utterances, tokens), got logits: set"
                " `predict_with_generate=True` in the Seq2SeqTrainingArguments."
            )
        return score(decode(prediction.label_ids), decode(predicted), normalize, tones).to_dict()

    return compute_metrics


def format_table(rows: Sequence[dict[str, object]]) -> str:
    """Rows as a Markdown table, numbers to three digits; `None` and a missing cell are left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return str(value)

    lines = [columns, ["---"] * len(columns)] + [[cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


__all__ = [
    "MAX_CHARACTERS",
    "RATES",
    "SPEECH_ERRORS",
    "ErrorCounts",
    "Rate",
    "Score",
    "format_table",
    "has_half_surrogate",
    "make_compute_metrics",
    "normalize_text",
    "score",
]

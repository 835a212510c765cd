"""Error rates of words, characters and tones: of texts, and of what `Seq2SeqTrainer` predicts.

Errors are counted in [`echo_hf.speech_errors.error_counts`], which is a metric of Hugging Face `evaluate` as well:
`evaluate.load(SPEECH_ERRORS)`. Only scoring needs jiwer, and only the metric needs `evaluate`.
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


def decode_ids(tokenizer, token_ids: np.ndarray) -> list[str]:
    """
    Token ids of a batch as texts, without special tokens.

    Args:
        tokenizer: anything with `batch_decode` and `pad_token_id`, e.g. an `EchoTokenizer`.
        token_ids (`np.ndarray`): ids, shape `(batch, tokens)`; -100 stands for padding.

    Returns:
        `list[str]`: one text a row.
    """
    token_ids = np.asarray(token_ids)
    token_ids = np.where(token_ids == -100, tokenizer.pad_token_id, token_ids)
    return tokenizer.batch_decode(token_ids, skip_special_tokens=True)


def make_compute_metrics(
    tokenizer, normalize: Callable[[str], str] | None = normalize_text, tones: str = "digits"
) -> Callable[..., dict[str, float | int]]:
    """
    A `compute_metrics` for `Seq2SeqTrainer` with `predict_with_generate=True`.

    Args:
        tokenizer: the tokenizer of the labels; an `EchoProcessor` is not taken, its `tokenizer` is.
        normalize (`Callable[[str], str]`, *optional*, defaults to [`normalize_text`]):
            Applied to references and hypotheses; `None` compares them as they are.
        tones (`str`, defaults to `"digits"`): how the texts write tone, see [`score`].

    Returns:
        A function of an `EvalPrediction` (ids, shape `(utterances, tokens)`) that returns the flat dictionary of
        [`Score.to_dict`].

    Raises:
        `ValueError`: by the returned function, if predictions are logits and not ids, which the Trainer gives without
        `predict_with_generate`: teacher-forced, they would look far better than recognition is.
    """

    def compute_metrics(prediction) -> dict[str, float | int]:
        predicted = prediction.predictions
        if isinstance(predicted, tuple) or np.asarray(predicted).ndim != 2:
            raise ValueError(
                "Error rates need generated token ids of shape (utterances, tokens), got logits: set"
                " `predict_with_generate=True` in the Seq2SeqTrainingArguments."
            )
        references = decode_ids(tokenizer, prediction.label_ids)
        return score(references, decode_ids(tokenizer, predicted), normalize, tones).to_dict()

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
    "decode_ids",
    "format_table",
    "has_half_surrogate",
    "make_compute_metrics",
    "normalize_text",
    "score",
]

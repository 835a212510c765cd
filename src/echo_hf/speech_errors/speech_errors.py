"""The errors of [`error_counts`] as a metric of Hugging Face `evaluate`, for the predictions of any recognizer."""

# evaluate's loader reads these lines to learn what to copy and what must be installed. It misreads several modules on
# one line, and a comment behind an import.
import datasets
import evaluate

from .error_counts import check_text, check_texts, normalize_text, score

DESCRIPTION = """
Errors of words, characters, tones and base syllables of recognized speech, summed over a corpus: sums of errors over
sums of reference units, not means over utterances. Tone may be written as digits (toned pinyin, Jyutping) or as
combining accents (Mboshi, Yoruba).
"""

INPUTS = """
Args:
    predictions (`list[str]`): recognized texts, one an utterance; may be empty.
    references (`list[str]`): what was said, in the same order; may be empty (silence).
    normalize (`bool`, defaults to `True`): whether to compare in Unicode NFKC, in lower case and without punctuation.
    tones (`str`, defaults to `"digits"`): how tone is written, `"digits"` or `"accents"`.
Returns:
    `dict`: `wer` and `cer` as shares, their counts, and those of tones where these were counted; see README.md.
"""

CITATION = """
@software{jiwer,
  title = {jiwer: similarity measures for automatic speech recognition evaluation},
  author = {Vaessen, Nik},
  url = {https://github.com/jitsi/jiwer}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class SpeechErrors(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://en.wikipedia.org/wiki/Word_error_rate", "https://github.com/jitsi/jiwer"],
        )

    def add_batch(self, *, predictions=None, references=None):
        """Adds texts of several utterances, see `evaluate.EvaluationModule.add_batch`."""
        # datasets would store NaN as the text "nan", and checks only the first text of a batch.
        predictions, references = check_texts(predictions, "predictions"), check_texts(references, "references")
        if len(references) != len(predictions):
            raise ValueError(f"{len(references)} references cannot be compared with {len(predictions)} predictions.")
        super().add_batch(predictions=predictions, references=references)

    def add(self, *, prediction=None, reference=None):
        """Adds the texts of one utterance, see `evaluate.EvaluationModule.add`."""
        prediction, reference = check_text(prediction, "prediction"), check_text(reference, "reference")
        super().add(prediction=prediction, reference=reference)

    def _compute(self, predictions, references, normalize=True, tones="digits") -> dict[str, float | int]:
        if not isinstance(normalize, bool):
            raise ValueError(
                f"normalize={normalize!r} must be True or False; normalize otherwise before the texts are added."
            )
        return score(references, predictions, normalize_text if normalize else None, tones).to_dict()
